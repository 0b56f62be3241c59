"""Every row of the table of bad input: exit code 2, one line that names the culprit, nothing written."""

import gzip
import json
import shutil
import signal
from pathlib import Path

import pytest
from ml_collections.config_flags import config_path

from panacea_jax import cli
from panacea_jax.config import get_config, keys
from tests import runs
from tests.bad_input import DAMAGES, KINDS, LINES, VALUES, WRONG
from tests.runs import panacea

# Numbers and switches take turns at what they do not take; all of it, for every key, is `make test-all`.
DEFAULTS = get_config()
SECONDS = 30
TYPED = {key: kind for key in keys(DEFAULTS) if (kind := config_path.get_type(key, DEFAULTS)) in WRONG}
# Those of the other stages are the same checks again.
OWN = [key for key in TYPED if not key.startswith(("align.", "heal.optimizer", "heal.train", "heal.defence"))]
TURNS = [(key, WRONG[TYPED[key]][i % len(WRONG[TYPED[key]])]) for i, key in enumerate(OWN)]
OTHERS = [(key, value) for key, kind in TYPED.items() for value in WRONG[kind] if (key, value) not in TURNS]


def files_below(root: Path) -> dict[str, tuple[int, int]]:
    """What would show a write: names, sizes and times; a pipe has no content to read."""
    return {str(p): (s.st_size, s.st_mtime_ns) for p in root.rglob("*") if (s := p.lstat()) and not p.is_dir()}


class Hangs(BaseException):
    """Nothing catches it: a TimeoutError would be one of reading."""


def hang(*_: object) -> None:
    raise Hangs


@pytest.fixture
def refused(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    signal.signal(signal.SIGALRM, hang)

    def check(arguments: list[str], *names: str) -> None:
        before = files_below(tmp_path)
        signal.alarm(SECONDS)  # as reading of a pipe may
        try:
            code = panacea(*arguments)
        finally:
            signal.alarm(0)
        captured = capsys.readouterr()
        assert code == 2, captured.err
        assert captured.out == "" and captured.err.startswith("panacea: ") and captured.err.count("\n") == 1, captured.err
        assert captured.err[:-1].isprintable() and len(captured.err) < 2000
        for name in names:
            assert name in captured.err
        assert files_below(tmp_path) == before

    return check


def short(value: object) -> str:
    return ascii(value)[:40]


@pytest.mark.parametrize(("key", "value"), TURNS, ids=short)
def test_keys_of_a_type(key, value, refused):
    refused(["run", f"--config.{key}={value}", "--workdir=new"], key)


@pytest.mark.parametrize("key", TYPED)
def test_keys_of_a_type_in_full(key, refused):
    for other, value in OTHERS:
        if other == key:
            refused(["run", f"--config.{key}={value}", "--workdir=new"], key)


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in VALUES.items() for value in values], ids=short)
def test_keys(key, value, refused):
    refused(["run", f"--config.{key}={value}", "--workdir=new"], key.rpartition(".")[2])


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_commands(command, refused):
    refused([command, "--nonsense=1"], "nonsense")
    refused([command, "stray"], "stray")


@pytest.mark.parametrize("name", LINES)
def test_command_lines(name, refused):
    line, culprit = LINES[name]
    refused(line.split(" "), culprit)


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """One file of every kind, all of them good."""
    import datasets
    import numpy as np
    import pyarrow
    import pyarrow.parquet
    from safetensors.numpy import save_file

    root = tmp_path_factory.mktemp("good")
    runs.make_place(root)
    rows = [{"instruction": f"w{i} w2", "output": "w3"} for i in range(3)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "rows.jsonl.gz").write_bytes(gzip.compress((root / "rows.jsonl").read_bytes()))
    (root / "rows.json").write_text(json.dumps(rows))
    (root / "rows.csv").write_text("instruction,output\n" + "w1,w3\n" * 3)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), root / "rows.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(str(root / "saved"))
    (root / "pairs_other.json").write_text(json.dumps([{"prompt": row["instruction"], "response": "w3"} for row in rows]))
    (root / "sharded").mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(root / "base" / name, root / "sharded")
    (root / "sharded" / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    (root / "adapter").mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (root / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    module = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    shapes = {"A": (2, 32), "B": (32, 2)}
    factors = {module.format(layer, name): np.zeros(shape, np.float32) for layer in (0, 1) for name, shape in shapes.items()}
    save_file(factors, root / "adapter" / "adapter_model.safetensors")
    save_file({"a": np.zeros(16, np.float32)}, root / "epsilon.safetensors")
    (root / "model.gguf").write_bytes(b"GGUF" + (3).to_bytes(4, "little") + bytes(16))
    (root / "recipe.py").write_text("from panacea_jax.config import get_config as defaults\nget_config = defaults(")
    (root / "recipe.json").write_text('{"lora": {"rank": 0}}')
    (root / "recipe.yaml").write_text("lora: {rank: 0}\n")
    (root / "gate.json").write_text('{"bounds": ["hs <= 10"]}')
    (root / "radii.json").write_text("[1, 2, 3]\n")
    answers = root / "judged" / "generations"
    answers.mkdir(parents=True)
    config = {"template": "alpaca-1", "eval": {"tasks": [f"pairs@{root}/rows.jsonl"]}, "decoding": {"max_new_tokens": None}}
    manifest = {"stage": "generations", "status": "done", "config": config, "inputs": {}}
    (answers / "manifest.json").write_text(json.dumps(manifest))
    (answers / "pairs.jsonl").write_text('{"prompt": "w1", "response": "w3", "reference": "w3"}\n' * 2)
    return root


ROWS = [(kind, damage) for kind in KINDS for damage in (*DAMAGES, "hostile") if damage not in KINDS[kind].but]
# Several hostile contents of one file are one kind of damage more, not a new kind of file.
ROWS = [(kind, damage) for kind, damage in ROWS if damage == "hostile" or "," not in kind]


@pytest.mark.parametrize(("kind", "damage"), ROWS)
def test_files(kind, damage, good, refused, tmp_path):
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    path = tmp_path / KINDS[kind].path
    if damage == "hostile":
        path.write_bytes(KINDS[kind].hostile)
    else:
        DAMAGES[damage](path)
    refused(KINDS[kind].command.format(root=tmp_path).split(), KINDS[kind].names)


def test_there_are_rows_enough():
    assert len(TURNS) + len(ROWS) + len(LINES) + 2 * len(cli.COMMANDS) + sum(map(len, VALUES.values())) >= 150
