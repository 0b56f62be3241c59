"""w without ε: whoever writes it, hands it on or asks it is warned in a frame, every time."""

import io
import sys

import huggingface_hub
import pytest

from panacea_jax.stages.bare import write_bare
from tests import runs
from tests.runs import panacea

WARNING = "w without ε: w alone can be MORE harmful than plain fine-tuning; deploy w + ε instead"
FRAME = "!" * 100


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return runs.finished_run(tmp_path_factory)


@pytest.fixture
def warned(capsys, caplog):
    """How many warnings there were since the last look, each between two lines of the frame."""

    def look():
        count = caplog.text.count(WARNING)
        assert capsys.readouterr().err.splitlines().count(FRAME) == 2 * count
        caplog.clear()
        return count

    return look


@pytest.fixture
def bare(finished, tmp_path, warned):
    write_bare(finished[1] / "finetune", tmp_path)
    assert warned() == 1
    folder = write_bare(finished[1] / "finetune", tmp_path)
    assert warned() == 1  # again
    return folder


def test_an_export_and_the_same_command_again(finished, tmp_path, warned):
    flags = finished[0].flags(f"--workdir={tmp_path}", "--config.train.steps=1", "--config.export.without_epsilon=True")
    for _ in range(2):
        assert panacea("finetune", *flags) == 0
        assert warned() == 1


def test_merging(finished, bare, tmp_path, warned):
    """With its ε it is what is to be deployed."""
    place, workdir = finished
    flags = [f"--config.model.path={place.base}", f"--config.lora.init_from={bare}"]
    assert panacea("convert", *flags, f"--out={tmp_path / 'w'}") == 0
    assert warned() == 1
    assert panacea("convert", *flags, f"--out={tmp_path / 'both'}", f"--epsilon={workdir / 'finetune' / 'epsilon.safetensors'}") == 0
    assert warned() == 0


def test_pushing(bare, warned, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_invented")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda token: None)
    assert panacea("push", f"--adapter={bare}", "--to=me/bare") == 2
    assert warned() == 1


def test_asking(finished, bare, tmp_path, warned, monkeypatch):
    place, workdir = finished
    flags = place.flags(f"--config.generate.adapter={bare}", f"--config.eval.tasks=('{place.spec('test')}',)")
    for command in ("generate", "perplexity"):
        assert panacea(command, *flags, f"--workdir={tmp_path / 'asked'}") == 0
        assert warned() == 1
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b""), "utf-8"))
    assert panacea("try", *place.flags(), f"--adapter={bare}", f"--against={workdir / 'heal' / 'adapter'}") == 0
    assert warned() == 1
