"""`panacea perplexity` against transformers and peft, record by record, without padding or batches."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from panacea_jax.stages import perplexity
from tests import runs, torch_oracle
from tests.on_devices import xla_flags
from tests.tiny import write_pairs


@pytest.fixture(scope="module")
def place_and_run(tmp_path_factory):
    """An adapter to measure, and more records than a batch."""
    place, workdir = runs.finished_run(tmp_path_factory)
    root = tmp_path_factory.mktemp("perplexity")
    write_pairs(root / "test.jsonl", 11, seed=5)
    return place, workdir, root / "test.jsonl"


def oracle(place: runs.Place, adapter: Path | None, source: Path, max_length: int):
    """Σ of −log p over output and EOS, and their number."""
    if adapter is None:
        model = torch_oracle.load_full(place.base, torch.float64)
    else:
        model = torch_oracle.load(place.base, adapter, torch.float64)
    return torch_oracle.answers_loss(model, place.base, source, max_length)


@pytest.mark.parametrize(("adapted", "max_length"), [(False, 32), (True, 32), (True, 12)])
def test_equals_transformers(place_and_run, tmp_path, adapted, max_length):
    place, workdir, source = place_and_run
    adapter = workdir / "heal" / "adapter" if adapted else None
    # The harmful set and XSTest are among the tasks and have no answers to measure.
    tasks = (place.spec("goals"), f"pairs@{source}", place.spec("safe"))
    flags = place.flags(
        f"--config.eval.tasks={tasks}", f"--config.generate.adapter={adapter or 'none'}",
        f"--config.data.max_length={max_length}", f"--workdir={tmp_path}",
    )  # fmt: skip
    assert runs.panacea("perplexity", *flags) == 0
    found = json.loads((tmp_path / "perplexity.json").read_text())
    assert found["sets"].keys() == {"pairs"}
    total, tokens = oracle(place, adapter, source, max_length)
    pairs = found["sets"]["pairs"]
    assert (pairs["tokens"], pairs["records"]) == (tokens, 11)
    assert pairs["nll"] == pytest.approx(total / tokens, rel=1e-5)
    assert pairs["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-5)
    assert (pairs["cut"] > 0) == (max_length == 12)
    assert found["template"].startswith("chat-") and found["max_length"] == max_length


def test_the_batch_size_and_num_examples(place_and_run, tmp_path):
    place, _, source = place_and_run
    figures = []
    for size in (1, 3, 20):
        flags = place.flags(
            f"--config.eval.tasks=('pairs@{source}',)", "--config.generate.adapter=none",
            f"--config.train.batch_size={size}", "--config.eval.num_examples=7", f"--workdir={tmp_path / str(size)}",
        )  # fmt: skip
        assert runs.panacea("perplexity", *flags) == 0
        figures.append(
            json.loads((tmp_path / str(size) / "perplexity.json").read_text())["sets"]["pairs"]
        )
    assert figures[0]["records"] == 7
    for other in figures[1:]:
        assert other["tokens"] == figures[0]["tokens"]
        assert other["nll"] == pytest.approx(figures[0]["nll"], rel=1e-6)


def test_over_eight_devices(place_and_run, tmp_path):
    """Rows over two pairs of devices, matrices over two: the same figures as on one device."""
    place, _, source = place_and_run
    figures = []
    for devices, mesh in ((1, ()), (8, ("data=2", "fsdp=2", "tensor=2"))):
        workdir = tmp_path / str(devices)
        flags = place.flags(
            f"--config.eval.tasks=('pairs@{source}',)", "--config.generate.adapter=none", f"--workdir={workdir}",
            *(f"--config.mesh.{axis}" for axis in mesh),
        )  # fmt: skip
        environment = os.environ | {"XLA_FLAGS": xla_flags(devices)}
        command = [sys.executable, "-m", "panacea_jax.cli", "perplexity", *map(str, flags)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        manifest = json.loads((workdir / "perplexity" / "manifest.json").read_text())
        assert len(manifest["devices"]) == devices
        figures.append(json.loads((workdir / "perplexity.json").read_text())["sets"]["pairs"])
    one, eight = figures
    assert (eight["tokens"], eight["records"], eight["cut"]) == (one["tokens"], 11, one["cut"])
    assert eight["nll"] == pytest.approx(one["nll"], rel=1e-6)


@pytest.mark.parametrize(("total", "nll"), [(7001.0, 700.1), (math.nan, None), (math.inf, None)])
def test_a_ruined_model_gives_null_not_broken_json(
    place_and_run, tmp_path, monkeypatch, total, nll
):
    place, _, source = place_and_run
    monkeypatch.setattr(perplexity, "sum_nll", lambda *_: (total, 10))
    flags = place.flags(
        f"--config.eval.tasks=('pairs@{source}',)", "--config.generate.adapter=none", f"--workdir={tmp_path}"
    )  # fmt: skip
    assert runs.panacea("perplexity", *flags) == 0
    pairs = json.loads((tmp_path / "perplexity.json").read_text())["sets"]["pairs"]
    assert pairs["perplexity"] is None
    assert pairs["nll"] == (nll if nll is None else pytest.approx(nll))


def test_done_is_skipped_and_another_configuration_refused(place_and_run, tmp_path, capsys):
    place, _, source = place_and_run
    task = f"--config.eval.tasks=('pairs@{source}',)"
    flags = place.flags(task, "--config.generate.adapter=none", f"--workdir={tmp_path}")
    assert runs.panacea("perplexity", *flags) == 0
    before = (tmp_path / "perplexity.json").read_bytes()
    assert runs.panacea("perplexity", *flags) == 0
    assert "done already, skipped" in capsys.readouterr().err
    assert runs.panacea("perplexity", *flags, "--config.data.max_length=16") == 2
    assert "max_length: 32 there, 16 now" in capsys.readouterr().err
    assert runs.panacea("perplexity", *flags, "--config.model.quantization=nf4") == 2
    assert "model.quantization: None there, 'nf4' now" in capsys.readouterr().err
    assert (tmp_path / "perplexity.json").read_bytes() == before


def test_sets_without_answers_are_refused(place_and_run, tmp_path, capsys):
    place, _, _ = place_and_run
    tasks = (place.spec("goals"), place.spec("safe"))
    flags = place.flags(f"--config.eval.tasks={tasks}", f"--workdir={tmp_path / 'new'}")
    assert runs.panacea("perplexity", *flags) == 2
    assert "config.eval.tasks: no set with answers" in capsys.readouterr().err
    assert runs.panacea("run", *flags, "--config.eval.perplexity=True") == 2
    assert (
        "config.eval.perplexity: no set of config.eval.tasks has answers" in capsys.readouterr().err
    )
    assert not (tmp_path / "new").exists()


def test_a_run_writes_it_when_asked(place_and_run, tmp_path):
    place, workdir, _ = place_and_run
    assert not (workdir / "perplexity.json").exists()
    flags = place.flags(
        "--config.eval.perplexity=True", f"--config.eval.tasks=('{place.spec('test')}',)", f"--workdir={tmp_path}"
    )  # fmt: skip
    assert runs.panacea("run", *flags) == 0
    found = json.loads((tmp_path / "perplexity.json").read_text())
    assert found["adapter"] == str(tmp_path / "finetune" / "adapter")
    assert found["sets"]["pairs"]["perplexity"] > 1
