"""Recipes of keys and values, JSON or YAML: what they set, and that they run nothing."""

import pytest

from panacea_jax.cli.parsing import parse_command
from panacea_jax.config import get_config, load_recipe
from panacea_jax.errors import InputError

NESTED = """
seed: 3
lora: {rank: 4, targets: [q, v]}
optimizer: {learning_rate: 1e-5}   # which YAML reads as a text
defence: {name: panacea, rho: [0.1, 0.2], every: 2}
generate.seed: 7
config.eval.tasks: [pairs@a.jsonl, pairs@b.jsonl]
"""
DOTTED = """{"seed": 3, "lora.rank": 4, "lora.targets": ["q", "v"], "optimizer.learning_rate": 0.00001, "defence.name": "panacea",
"defence": {"rho": [0.1, 0.2], "every": 2}, "generate": {"seed": 7}, "eval.tasks": ["pairs@a.jsonl", "pairs@b.jsonl"]}"""


@pytest.mark.parametrize(("name", "text"), [("a.yaml", NESTED), ("a.yml", NESTED), ("a.json", DOTTED)])
def test_it_is_the_default_with_these_values(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    expected = get_config()
    expected.update_from_flattened_dict({
        "seed": 3, "lora.rank": 4, "lora.targets": ("q", "v"), "optimizer.learning_rate": 1e-5, "defence.rho": (0.1, 0.2),
        "defence.every": 2, "generate.seed": 7, "eval.tasks": ("pairs@a.jsonl", "pairs@b.jsonl"),
    })  # fmt: skip
    assert load_recipe(str(tmp_path / name)).to_dict() == expected.to_dict()
    made = parse_command("run", [f"--config={tmp_path / name}", "--config.lora.rank=5", "--config.eval.tasks=pairs@c.jsonl"])[1]
    assert (made.lora.rank, made.seed, made.eval.tasks) == (5, 3, ("pairs@c.jsonl",))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("lora: {rnak: 4}", "config.lora.rnak: no such key; did you mean --config.lora.rank?"),
        ("lora: 4", "config.lora is a section"),
        ("lora: {rank: x}", "config.lora.rank = 'x': takes int"),
        ("lora: {rank: 2.5}", "config.lora.rank = 2.5: takes int"),
        ("lora: {rank: true}", "config.lora.rank = True: takes int"),
        ("lora: {rank: null}", "config.lora.rank = None: takes int"),
        ("lora: {rank: [4]}", "config.lora.rank = (4,): takes int"),
        ("data: {shuffle: 1}", "config.data.shuffle = 1: takes bool"),
        ("model: {path: 3}", "config.model.path = 3: takes str"),
        ("seed: 1\nseed: 2", "key 'seed' is there twice"),
        ("a: &x 1\nseed: *x", "an alias"),
        ("seed: !!python/object/apply:os.mkdir [new]", "tag:yaml.org,2002:python/object/apply:os.mkdir"),
        ("[1, 2]", "not an object of keys and values"),
        ("", "not an object of keys and values"),
        ("1: 2", "config.1: no such key"),
    ],
)
def test_what_it_may_not_say(text, wanted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(InputError) as caught:
        load_recipe("a.yaml")
    assert str(caught.value).startswith("--config=a.yaml: ") and wanted in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.yaml"]
