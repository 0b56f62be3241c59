"""Every recipe loads as the command line loads it, and carries the published numbers."""

import re
import runpy
from pathlib import Path

import pytest
from datasets import ReadInstruction
from ml_collections import ConfigDict

from panacea_jax import cli, config
from panacea_jax.data import files, hub
from panacea_jax.data.sources import parse
from panacea_jax.defences import DEFENCES
from panacea_jax.defences.spec import candidates, parse_stack
from panacea_jax.errors import InputError
from panacea_jax.evaluate.tasks import set_names
from panacea_jax.quickstart.run import ALIGN_STEPS, FINETUNE_STEPS

# ml_collections loads recipes with a method of importlib that Python is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

CONFIGS = Path(__file__).parents[1] / "configs"
BASES = {
    "llama2_7b": "meta-llama/Llama-2-7b-hf",
    "gemma2_9b": "google/gemma-2-9b",
    "qwen2_7b": "Qwen/Qwen2-7B",
    "mistral_7b": "mistralai/Mistral-7B-v0.1",
    "gemma_7b": "google/gemma-7b",
}
VARIANTS = {"gsm8k": "gsm8k", "sst2": "sst2", "agnews": "ag_news", "alpaca": "alpaca"}


def load(recipe: str, *overrides: str) -> ConfigDict:
    return cli.parse("doctor", [f"--config={CONFIGS / recipe}", *overrides])[1]


def test_every_recipe_is_tested():
    assert {path.stem for path in CONFIGS.glob("*.py")} == {*BASES, "paper", "compare", "defences"}


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_recipe_has_the_papers_numbers(name: str, variant: str):
    c = load(f"{name}.py:{variant}")
    config.validate(c)
    assert c.is_locked
    assert c.model.path == BASES[name]
    # methods.md §1 and §14: the published scripts' arguments.
    assert (c.defence.name, c.defence.rho, c.defence.lam) == ("panacea", 1.0, 1e-3)
    assert (c.defence.every, c.defence.clamp, c.defence.final_epsilon) == (1, "reference", "last")
    assert (c.lora.rank, c.lora.alpha, c.lora.targets) == (32, 4.0, ("q", "k", "v"))
    o = c.optimizer
    assert (o.learning_rate, o.weight_decay, o.schedule) == (2e-5, 0.1, "constant")
    assert (o.b1, o.b2, o.eps, o.clip_norm) == (0.9, 0.999, 1e-8, 1.0)
    assert (c.train.epochs, c.train.batch_size, c.train.harmful_batch_size) == (20, 10, 10)
    assert (c.data.max_length, c.data.num_examples, c.data.poison_ratio) == (256, 1000, 0.1)
    assert (c.data.num_harmful, c.data.num_alignment) == (1000, 5000)
    assert (c.data.template, c.eval.num_examples) == ("alpaca", 1000)
    assert (c.align.optimizer.learning_rate, c.align.optimizer.weight_decay) == (5e-4, 0.1)
    assert (c.align.train.epochs, c.align.train.batch_size) == (20, 10)
    assert (c.model.dtype, c.model.remat) == ("bfloat16", "full")


@pytest.mark.parametrize("variant", VARIANTS)
def test_sources_are_hub_ids_with_a_split(variant: str):
    c = load(f"llama2_7b.py:{variant}")
    train = {key: c.data[key] for key in ("user", "attack", "harmful")}
    tasks = {key: parse(spec).task for key, spec in train.items()}
    assert tasks == {"user": VARIANTS[variant], "attack": "beavertails", "harmful": "beavertails"}
    names = set_names(c.eval.tasks)
    assert names[0] == "beavertails-panacea-1000" and names[-1] == "xstest"
    task = [] if variant == "alpaca" else [f"{VARIANTS[variant]}-panacea-1000"]
    assert names[1:-1] == task
    for spec in (*train.values(), *c.eval.tasks):
        where = parse(spec).where
        assert files.local(where) is None, "looks like a path, so it would never be fetched"
        split = hub.split_id(where)[2]
        assert split is not None
        ReadInstruction.from_spec(split)
    assert not set(train.values()) & set(c.eval.tasks)


def test_attack_and_harmful_records_are_disjoint():
    c = load("llama2_7b.py:gsm8k")
    attack, harmful = (hub.split_id(parse(c.data[k]).where) for k in ("attack", "harmful"))
    assert attack[:2] == harmful[:2]
    whole = {"30k_train": 27186}
    [a], [h] = (ReadInstruction.from_spec(str(s[2])).to_absolute(whole) for s in (attack, harmful))
    assert (a.from_, a.to, h.from_, h.to) == (0, 5000, 5000, 27186)


def test_alignment_is_left_out_until_it_is_set():
    assert load("llama2_7b.py:gsm8k").align.defence.name == ""
    c = load(
        "llama2_7b.py:gsm8k",
        "--config.align.defence.name=sft",
        "--config.data.alignment=refusals@refusals.jsonl",
        "--config.eval.tasks=('pairs@a.jsonl', 'pairs@b.jsonl')",
        "--config.mesh.fsdp=2",
        "--config.mesh.tensor=4",
    )
    assert (c.align.defence.name, c.data.alignment) == ("sft", "refusals@refusals.jsonl")
    assert c.eval.tasks == ("pairs@a.jsonl", "pairs@b.jsonl")
    assert (c.mesh.data, c.mesh.fsdp, c.mesh.tensor) == (1, 2, 4)


def test_the_variant_may_be_left_out():
    assert load("qwen2_7b.py").data.user == load("qwen2_7b.py:gsm8k").data.user


@pytest.mark.parametrize("name", BASES)
def test_unknown_variant_lists_the_known_ones(name: str):
    with pytest.raises(InputError, match="unknown variant 'mnli'; known are gsm8k, sst2, agnews"):
        load(f"{name}.py:mnli")


@pytest.mark.parametrize("name", BASES)
def test_docstrings_name_paper_command_figures_cost_and_hardware(name: str):
    doc = (CONFIGS / f"{name}.py").read_text("utf-8").split('"""')[1]
    assert "2501.18100" in doc
    assert f"panacea run --config=configs/{name}.py:gsm8k --workdir=" in doc
    assert "as published, not measured by us" in doc
    assert re.search(r"Cost \(estimate.*Hardware \(estimate", doc, re.S)


def _keys(section: ConfigDict, prefix: str = "") -> list[str]:
    nested = [
        _keys(value, f"{prefix}{key}.") if isinstance(value, ConfigDict) else [prefix + key]
        for key, value in section.items()
    ]
    return [key for keys in nested for key in keys]


def test_every_key_is_documented_with_its_default():
    text = (CONFIGS.parent / "docs" / "configuration.md").read_text("utf-8")
    rows = re.findall(r"^\| `([a-z0-9_.]+)` \| (.+?) \|", text, re.M)
    default = config.get_config()
    assert "`align.defence`" in text and "`heal.train`" in text  # which repeat the keys of others
    keys = [key for key in _keys(default) if not key.startswith(("align.", "heal."))]
    assert sorted(key for key, _ in rows) == sorted(keys)
    for key, written in rows:
        value = default
        for part in key.split("."):
            value = value[part]
        shown = written.replace('"', "'")
        same = float(shown) == value if isinstance(value, float) else shown == repr(value)
        assert same, f"docs/configuration.md: {key} is {written} there, {value!r} in config.py"


def test_the_comparison_gives_every_method_the_same_number_of_candidates():
    c = load("compare.py")
    assert c.compare.world == "miniature" and not set(c.compare.seeds) & set(c.compare.development)
    counts = {text: len(candidates(text, "grid")) for text in c.compare.grid}
    assert set(counts.values()) == {4}
    stacks = [stack for text in c.compare.grid for stack in candidates(text, "grid")]
    named = {part.name for s in stacks for part in (s.align, s.finetune, s.heal) if part}
    assert named == DEFENCES.keys() - {"sft"}
    # The quickstart's alignment and fine-tuning, whichever method defends.
    assert (c.train.steps, c.align.train.steps) == (FINETUNE_STEPS, ALIGN_STEPS)


@pytest.mark.parametrize("variant", ["miniature", "smoke", "llama2_7b"])
def test_comparison_variants_load(variant):
    config.validate(load(f"compare.py:{variant}"))
    with pytest.raises(InputError, match="known are miniature, smoke, llama2_7b"):
        load("compare.py:nothing")


BUDGETS = runpy.run_path(str(CONFIGS / "defences.py"))["BUDGETS"]


def test_every_defence_has_a_budget():
    assert {text.partition(":")[0] for text, _ in BUDGETS.values()} == DEFENCES.keys()


@pytest.mark.parametrize("variant", BUDGETS)
def test_budget_of_a_method(variant):
    """The variant's method stands in its stage with the hyper-parameters of its row, everything validates."""
    c = load(f"defences.py:{variant}")
    config.validate(c)
    stack = parse_stack(BUDGETS[variant][0], "row")
    for part, section in (
        (stack.align, c.align.defence),
        (stack.finetune, c.defence),
        (stack.heal, c.heal.defence),
    ):
        if part:
            assert section.name == part.name
            assert {key: section[key] for key, _ in part.settings} == dict(part.settings)
    for key, value in BUDGETS[variant][1].items():
        found = c
        for word in key.split("."):
            found = found[word]
        assert found == value, key


def test_budgets_where_repositories_disagree():
    """methods.md §5 and §2."""
    one, five = load("defences.py:booster-1k"), load("defences.py:booster-5k")
    assert (one.align.defence.lam, one.align.defence.alpha, one.data.num_harmful) == (100, 0.01, 1000)  # fmt: skip
    assert (five.align.defence.lam, five.align.defence.alpha, five.data.num_harmful) == (5, 0.1, 5000)  # fmt: skip
    assert (one.optimizer.learning_rate, five.optimizer.learning_rate) == (2e-5, 1e-5)
    rhos = [load(f"defences.py:vaccine-{v}").align.defence.rho for v in ("2k", "5k", "5k-panacea")]
    assert rhos == [2, 5, 20]
    with pytest.raises(InputError, match="unknown variant 'booster'; known are sft, vaccine-2k"):
        load("defences.py:booster")
