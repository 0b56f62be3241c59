"""The regularised fine-tuning methods as runs: resumed bit for bit, from the command line, on eight devices."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from panacea_jax.data.batches import Stream
from panacea_jax.defences import Bds, ConstrainedSft, Ewc, Kl, Ldifs, Lisa, SafeGrad, Sbr, Vlguard
from panacea_jax.models import lora
from panacea_jax.models.model import load
from panacea_jax.train.checkpoints import Checkpoints
from panacea_jax.train.loop import finetune
from panacea_jax.train.optimizer import make_optimizer
from tests import runs
from tests.on_devices import on_devices
from tests.tiny import write_model
from tests.train.test_loop import assert_equal, examples

METHODS = {
    # The checkpoint after step 3 falls into Lisa's second turn.
    "lisa": Lisa(rho=0.5, alignment_steps=2, finetune_steps=3, warmup_steps=1),
    "ldifs": Ldifs(rho=1.0),
    "ewc": Ewc(lam=10.0),
    "kl": Kl(lam=1.0),
    "vlguard": Vlguard(mode="sum", lam=0.5),
    "sbr": Sbr(lam=50.0, prompts=5),
    "constrained_sft": ConstrainedSft(beta=2.0),
    "safegrad": SafeGrad(rho=2.0),
    "bds": Bds(logit_rate=0.1),
}
# Of which all parameters are trained on eight devices too.
FULL = ("ewc", "sbr", "constrained_sft", "safegrad", "bds")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(write_model(tmp_path_factory.mktemp("tiny") / "base"), dtype="float32")


def run(model, defence, steps, folder=None):
    """Training that saves each third step, if it has a folder."""
    params = lora.init(model, 2, 4, ("q", "up"), key=jax.random.key(0))
    streams = {
        "user": Stream("user", examples(1), 4, 0, True, (16,)),
        "alignment": Stream("alignment", examples(2), 3, 0, True, (16,)),
        "harmful": Stream("harmful", examples(3), 3, 0, True, (16,)),
    }
    checkpoints = None if folder is None else Checkpoints(folder, every=3)
    optimizer = make_optimizer(1e-2)
    return finetune(
        model, params, defence, streams, optimizer=optimizer, steps=steps, checkpoints=checkpoints
    )


@pytest.mark.parametrize("name", METHODS)
def test_stop_and_resume_is_bit_for_bit(model, name, tmp_path):
    """Six steps at once are three and three; the state too, which EWC does not make anew."""
    whole = run(model, METHODS[name], 6)
    assert run(model, METHODS[name], 3, tmp_path / "c").steps == 3
    resumed = run(model, METHODS[name], 6, tmp_path / "c")
    assert_equal(whole.params, resumed.params)
    assert whole.compilations == resumed.compilations == 1
    if name != "vlguard":  # which has no state
        assert_equal(whole.state, resumed.state)


def test_eight_devices_train_what_one_does(tmp_path):
    """mesh fsdp = 4, tensor = 2: the same adapters and states, and the same weights where all are trained."""
    folder = write_model(tmp_path / "base")
    found = on_devices("tests.defences.sharded", folder)
    assert found.keys() == {*METHODS, *(f"{name}_full" for name in FULL)}
    for name, (error, moved, compilations) in found.items():
        assert error < 1e-5 < 1e-2 < moved and compilations == 1, f"{name}: {found[name]}"


# ---------------------------------------------------------------- command line


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return runs.make_place(tmp_path_factory.mktemp("finetuning"))


def command(place, workdir, *more):
    return runs.panacea("finetune", *place.flags(*more), f"--workdir={workdir}")


COMMANDS = {
    "lisa": ("--config.defence.alignment_steps=1", "--config.defence.finetune_steps=2"),
    "ldifs": ("--config.defence.gate=0.0",),
    "ewc": ("--config.defence.lam=100.0",),
    "kl": (),
    "vlguard": ("--config.defence.mode=sum",),
    "safegrad": (),
    "bds": ("--config.defence.logit_rate=0.5",),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_finetune(place, name, tmp_path):
    flags = (f"--config.defence.name={name}", *COMMANDS[name])
    assert command(place, tmp_path, *flags) == 0
    rows = [json.loads(x) for x in (tmp_path / "finetune/metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [1, 2, 3, 4]
    assert len({frozenset(r) for r in rows}) == 1  # every step logs the same scalars
    if name == "lisa":
        assert [r["alignment_state"] for r in rows] == [1, 0, 0, 1]
        assert [r["proximal"] > 0 for r in rows] == [False, False, True, False]
    penalty = {
        "ldifs": "penalty", "ewc": "penalty", "kl": "kl", "vlguard": "alignment_loss", "safegrad": "kl", "bds": "alignment_loss",
    }  # fmt: skip
    if name in penalty:
        assert rows[-1][penalty[name]] > 0
    adapter = load_file(tmp_path / "finetune/adapter/adapter_model.safetensors")
    assert all(np.linalg.norm(x) > 0 for x in adapter.values())
    manifest = json.loads((tmp_path / "finetune/manifest.json").read_text())
    uses = name in ("lisa", "ewc", "vlguard", "safegrad", "bds")
    assert (place.spec("alignment") in manifest["inputs"]) == uses
    wanted = {"user": 12, "alignment": 8} if uses else {"user": 12}
    assert manifest["outcome"]["records"] == wanted


def test_what_bds_learnt_of_the_records(place, tmp_path, capsys):
    """Each of 12 by its number, with a weight and nothing that it says; the manifest names those below a half. The same after a stop."""
    flags = ("--config.defence.name=bds", "--config.defence.logit_rate=0.5")
    assert command(place, tmp_path / "whole", *flags) == 0
    assert "record_weights.jsonl: the weight of each of the user's 12 records" in capsys.readouterr().err
    folder = tmp_path / "whole" / "finetune"
    rows = [json.loads(line) for line in (folder / "record_weights.jsonl").read_text().splitlines()]
    assert all(row.keys() == {"record", "weight"} for row in rows)
    assert [row["record"] for row in rows] == list(range(1, 13))
    weights = np.asarray([row["weight"] for row in rows])
    assert weights.mean() == pytest.approx(1, rel=1e-5)
    report = json.loads((folder / "manifest.json").read_text())["outcome"]["report"]
    below = [int(i) + 1 for i in np.argsort(weights, kind="stable") if weights[i] < 0.5]
    assert report == {"suspected": len(below), "suspected_records": below} and below
    # ---- cut short after step 3, and gone on with
    runs.rewrite_manifest(folder, status="running")
    before = (folder / "record_weights.jsonl").read_bytes()
    shutil.rmtree(folder / "checkpoints" / "4")
    (folder / "record_weights.jsonl").unlink()
    assert command(place, tmp_path / "whole", *flags) == 0
    assert "checkpoints/3" in capsys.readouterr().err
    assert (folder / "record_weights.jsonl").read_bytes() == before


def test_mixing_lengthens_the_epoch(place, tmp_path):
    """12 user records and 8 of alignment in batches of 4: five steps an epoch; nothing is poisoned."""
    flags = ("--config.defence.name=vlguard", "--config.train.steps=0", "--config.train.epochs=1")
    assert command(place, tmp_path, *flags, "--config.data.poison_ratio=0.0") == 0
    outcome = json.loads((tmp_path / "finetune/manifest.json").read_text())["outcome"]
    assert outcome["records"] == {"user": 20} and outcome["steps"] == 5


@pytest.mark.parametrize("name", ["lisa", "ewc", "vlguard", "safegrad", "bds"])
def test_without_alignment_data(place, name, tmp_path, capsys):
    flags = (f"--config.defence.name={name}", "--config.data.alignment=")
    assert command(place, tmp_path / "new", *flags) == 2
    assert "config.data.alignment is not set" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
