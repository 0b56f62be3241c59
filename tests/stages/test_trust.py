"""`panacea verify` without a gate: whether a work directory is what it says; and random damage to a finished one."""

import json
import shutil
import sys

import minisign
import numpy as np
import pytest
from safetensors.numpy import load_file

from panacea_jax.data.files import sha256
from panacea_jax.models.peft import read_notes
from panacea_jax.models.tensorfile import entries_of, write_tensors
from panacea_jax.signatures import signed_by
from panacea_jax.stages import trust
from panacea_jax.stages.bare import write_bare
from panacea_jax.stages.trust import DIFFERS, HOLDS, UNKNOWN, check_workdir
from panacea_jax.sums import sha256_folder, sums_of
from panacea_jax.train.checkpoints import read_checkpoint
from panacea_jax.workdir import MANIFEST, read_manifest
from tests import runs
from tests.faults import FOUND, HARMLESS, Faults
from tests.runs import panacea, rewrite_manifest


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return runs.finished_run(tmp_path_factory)


@pytest.fixture
def workdir(finished, tmp_path):
    """A copy; what its manifests name lies where the run was."""
    return shutil.copytree(finished[1], tmp_path / "run")


def outcomes(workdir, **more):
    return {check.what: check.outcome for check in check_workdir(workdir, **more)}


def wrong(workdir, **more):
    return {check.what: check.why for check in check_workdir(workdir, **more) if check.outcome == DIFFERS}


def flip(path, at=-9):
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def test_a_sound_run(finished, capsys):
    place, workdir = finished
    before = {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()}
    assert panacea("verify", f"--workdir={workdir}", f"--config.model.path={place.base}") == 0
    said = capsys.readouterr().out.splitlines()
    verdict = json.loads((workdir / "verdict.json").read_text())
    (workdir / "verdict.json").unlink()
    assert {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()} == before
    assert verdict["met"] and "findings" not in verdict
    found = {check["what"]: check["outcome"] for check in verdict["checks"]}
    assert len(said) == len(found) + 1 and set(found.values()) == {HOLDS}
    wanted = ("align: files", "finetune: checkpoints", "finetune: ε applied", "heal: ε applied", "heal: base", "answers", "scores",
              "judgements: files", "generations: inputs")  # fmt: skip
    assert set(wanted) <= found.keys()
    # The chain: each stage names the manifest of the one whose adapter it took up.
    made = read_manifest(workdir / "heal")["made_by"]
    assert made == {str(workdir / "finetune" / "adapter"): read_manifest(workdir / "finetune")["sha256"]}


def test_epsilon_left_out(workdir):
    """w alone in place of w + ε, under a manifest that fits it."""
    stage = workdir / "finetune"
    path, epsilon = stage / "adapter" / "adapter_model.safetensors", load_file(stage / "epsilon.safetensors")
    tensors = load_file(path)
    w = {name: np.asarray(x - epsilon[name]) for name, x in tensors.items()}
    write_tensors(path, entries_of(w), {"format": "pt"} | read_notes(stage / "adapter"))
    rewrite_manifest(stage, files=sums_of(stage, MANIFEST))
    assert "is not w + ε" in wrong(workdir)["finetune: ε applied"]
    write_tensors(path, entries_of(tensors), {"format": "pt", "epsilon": "left out"})
    assert "says: left out; w alone must not be deployed" in wrong(workdir)["finetune: ε applied"]


def test_epsilon_left_out_of_all_weights(tmp_path_factory, tmp_path):
    _, made = runs.finished_full_run(tmp_path_factory)
    workdir = shutil.copytree(made, tmp_path / "run")
    stage = workdir / "finetune"
    assert wrong(workdir) == {} and outcomes(workdir)["finetune: ε applied"] == HOLDS
    bare = write_bare(stage, tmp_path)
    shutil.copy(bare / "model.safetensors", stage / "model" / "model.safetensors")
    rewrite_manifest(stage, files=sums_of(stage, MANIFEST))
    found = wrong(workdir)
    assert found.keys() == {"finetune: ε applied"} and found["finetune: ε applied"].endswith("but w alone")


def test_another_base(workdir, finished, tmp_path):
    other = shutil.copytree(finished[0].base, tmp_path / "other")
    assert wrong(workdir, base=str(other)) == {}  # a copy is the same
    flip(other / "model.safetensors")
    assert set(wrong(workdir, base=str(other))) == {"align: base", "finetune: base", "heal: base"}
    path = workdir / "heal" / "adapter" / "adapter_config.json"
    path.write_text(path.read_text().replace(str(finished[0].base), str(other)))
    found = wrong(workdir)
    assert "adapter/adapter_config.json differs" in found["heal: files"] and str(other) in found["heal: base"]


def test_one_flipped_bit(workdir, capsys):
    path = workdir / "heal" / "adapter" / "adapter_model.safetensors"
    flip(path)
    assert wrong(workdir)["heal: files"] == "adapter/adapter_model.safetensors differs from its sha256"
    assert panacea("verify", f"--workdir={workdir}") == 3
    said = capsys.readouterr()
    assert "differs       heal: files" in said.out and said.err.startswith("panacea: ") and "checks do not hold" in said.err
    flip(path)
    flip(workdir / "finetune" / "checkpoints" / "4" / "state" / "_METADATA", 0)
    assert "4: damaged checkpoint" in wrong(workdir)["finetune: checkpoints"]


def test_scores_of_another_adapter(workdir, finished):
    """Answers of the model before healing; and scores that were changed."""
    assert outcomes(workdir)["answers"] == HOLDS
    shutil.rmtree(workdir / "heal")
    assert "not of" in wrong(workdir)["answers"]
    scores = json.loads((workdir / "scores.json").read_text())
    (workdir / "scores.json").write_text(json.dumps(scores | {"hs": 0.0, "empty": 1.0}))
    assert "is not what the verdicts say" in wrong(workdir)["scores"]


def test_inputs_that_are_files(workdir, tmp_path):
    """Of answers made elsewhere, and of a method that reads one."""
    stage, file = workdir / "generations", tmp_path / "radii.json"
    file.write_text("[1, 2]")
    inputs = read_manifest(stage)["inputs"]
    for digest in (sha256(file), sha256_folder(tmp_path, (file.name,))):
        file.write_text("[1, 2]")
        rewrite_manifest(stage, inputs=inputs | {str(file): digest})
        assert outcomes(workdir)["generations: inputs"] == HOLDS
        file.write_text("[1, 3]")
        assert wrong(workdir)["generations: inputs"] == f"{file} is not what was read"
    file.unlink()
    assert outcomes(workdir)["generations: inputs"] == UNKNOWN


def test_a_checkpoint_of_another_run(workdir):
    shutil.copytree(workdir / "align" / "checkpoints" / "3", workdir / "finetune" / "checkpoints" / "9")
    found = wrong(workdir)
    assert "9: damaged checkpoint (it is of another run)" in found["finetune: checkpoints"]
    assert "it is of another run" in found["finetune: ε applied"]  # it would be the newest


def test_every_checkpoint_is_read_once(finished, monkeypatch):
    read = []
    monkeypatch.setattr(trust, "read_checkpoint", lambda folder, run: read.append(folder) or read_checkpoint(folder, run))
    check_workdir(finished[1])
    assert sorted(read) == sorted(path for path in finished[1].glob("*/checkpoints/*") if path.name.isdecimal())


def test_what_nobody_made_is_not_deployed(workdir):
    """A file beside the weights that the stage did not write, and weights of a stage that left no manifest."""
    (workdir / "heal" / "adapter" / "adapter_model.bin").write_bytes(b"0")
    assert wrong(workdir) == {"heal: files": "adapter_model.bin is not of this stage"}
    (workdir / "heal" / "manifest.json").unlink()
    assert "nobody knows what made" in wrong(workdir)["heal: manifest"]


@pytest.fixture
def signed(workdir, tmp_path):
    """Signs what the documentation says, and gives the public key's file."""
    pair = minisign.KeyPair.generate()
    for path in (*workdir.glob("*/manifest.json"), workdir / "judgements" / "SHA256SUMS"):
        pair.secret_key.sign_file(path, trusted_comment="invented", drop_signature=True)
    key = tmp_path / "minisign.pub"
    key.write_bytes(bytes(pair.public_key) + b"\n")
    return key


def verify(workdir, key):
    return panacea("verify", f"--workdir={workdir}", f"--signed_by={key}")


def test_a_signed_run(workdir, signed, capsys):
    assert verify(workdir, signed) == 0
    said = capsys.readouterr().out
    for name in ("align", "finetune", "heal", "generations", "judgements"):
        assert f"holds         {name}: signature" in said
    assert "invented" in said


def test_a_signed_run_that_was_changed(workdir, signed, capsys):
    """A file; a file and the manifest that names it; a signature that is gone; a stage that was put in; a key of somebody else."""
    stage = workdir / "heal"
    path = stage / "adapter" / "adapter_config.json"
    whole, manifest = path.read_bytes(), (stage / MANIFEST).read_bytes()
    path.write_bytes(whole.replace(b"LORA", b"LoRA"))
    assert verify(workdir, signed) == 3
    assert "differs       heal: files" in capsys.readouterr().out
    rewrite_manifest(stage, files=sums_of(stage, MANIFEST))
    assert verify(workdir, signed) == 3
    said = capsys.readouterr().out
    assert "holds         heal: files" in said and "differs       heal: signature" in said
    path.write_bytes(whole)
    (stage / MANIFEST).write_bytes(manifest)
    (stage / "manifest.json.minisig").rename(stage / "kept")
    assert verify(workdir, signed) == 3
    assert "manifest.json: not signed (no manifest.json.minisig)" in capsys.readouterr().out
    (stage / "kept").rename(stage / "manifest.json.minisig")
    assert verify(workdir, signed) == 0
    signed.write_bytes(bytes(minisign.KeyPair.generate().public_key))
    assert verify(workdir, signed) == 3
    captured = capsys.readouterr()
    assert "incompatible key identifiers" in captured.out and len(captured.err.splitlines()) == 1


def test_a_signature_on_no_file(workdir, signed):
    """Of a stage that was cut short: whatever lies there later would be called signed."""
    stage, pair = workdir / "heal", minisign.KeyPair.generate()
    rewrite_manifest(stage, status="running", files={})
    pair.secret_key.sign_file(stage / MANIFEST, drop_signature=True)
    signed.write_bytes(bytes(pair.public_key))
    assert wrong(workdir, signed=signed_by(signed))["heal: signature"] == "signed, but the manifest names the hash of no file"


def test_signatures_that_cannot_be_looked_at(finished, tmp_path, signed, monkeypatch, capsys):
    workdir, before = finished[1], sorted(finished[1].rglob("*"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.pub").write_text("untrusted comment: no key\nRWQ\n")
    for folder, key, said in (
        (workdir, tmp_path / "none.pub", "none.pub: cannot be read"), (workdir, tmp_path / "bad.pub", "bad.pub: not a public key"),
        (tmp_path / "empty", signed, "holds no stage of ours that could be signed"),
    ):  # fmt: skip
        assert verify(folder, key) == 2
        assert said in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "minisign", None)
    assert verify(workdir, signed) == 2
    [said] = capsys.readouterr().err.splitlines()
    assert said == "panacea: --signed_by: needs py-minisign, the extra [sign]: pip install 'panacea_jax[sign]'"
    assert sorted(workdir.rglob("*")) == before


def test_without_checkpoints(workdir):
    """As they are deleted to save room: w of fine-tuning is known no longer, that of noise is what it was added to."""
    for folder in workdir.glob("*/checkpoints"):
        shutil.rmtree(folder)
    found = outcomes(workdir)
    assert found["finetune: ε applied"] == UNKNOWN and found["heal: ε applied"] == HOLDS and DIFFERS not in found.values()


def test_from_before_there_were_hashes(workdir):
    """It goes on working, and says what it cannot know."""
    for path in workdir.glob("*/manifest.json"):
        manifest = json.loads(path.read_text())
        path.write_text(json.dumps({k: v for k, v in manifest.items() if k not in ("sha256", "files", "made_by")}))
    for path in workdir.glob("*/checkpoints/*/meta/metadata"):
        notes = json.loads(path.read_text())
        path.write_text(json.dumps({k: v for k, v in notes.items() if k not in ("sha256", "checksums", "run")}))
    (workdir / "judgements" / "SHA256SUMS").unlink()
    found = outcomes(workdir)
    for what in ("finetune: files", "finetune: checkpoints", "judgements: files"):
        assert found[what] == UNKNOWN
    assert found["finetune: ε applied"] == found["scores"] == HOLDS


def test_a_stage_that_is_no_longer_what_it_was_is_not_gone_on_from(workdir, finished, capsys):
    """Neither healed, nor answered with, nor skipped as done."""
    flags = finished[0].flags(f"--workdir={workdir}")
    flip(workdir / "finetune" / "adapter" / "adapter_model.safetensors")
    shutil.rmtree(workdir / "heal")
    shutil.rmtree(workdir / "generations")
    for command, more in (
        ("heal", ("--config.defence.name=random_perturbation", "--config.defence.rho=0.25")),
        ("generate", ()),
        ("finetune", (f"--config.lora.init_from={read_manifest(workdir / 'finetune')['config']['lora']['init_from']}",)),
    ):
        assert panacea(command, *finished[0].flags(*more, f"--workdir={workdir}")) == 2, flags
        err = capsys.readouterr().err.splitlines()[-1]
        assert "adapter/adapter_model.safetensors differs from its sha256" in err
    assert not (workdir / "heal").exists() and not (workdir / "generations").exists()


def test_a_run_goes_on_from_the_checkpoint_before(workdir, finished, capsys, caplog):
    """Cut short after its last checkpoint, which then was damaged: the same bytes in the end."""
    stage = workdir / "finetune"
    exports = ("adapter/adapter_model.safetensors", "adapter/adapter_config.json", "epsilon.safetensors", "epsilon_mean.safetensors")
    before = {name: (stage / name).read_bytes() for name in exports}
    began = read_manifest(stage)["config"]["lora"]["init_from"]
    rewrite_manifest(stage, status="running", files={}, outcome={})
    for name in exports:
        (stage / name).unlink()
    largest = max((stage / "checkpoints" / "4").rglob("d/*"), key=lambda p: p.stat().st_size)
    flip(largest)
    flags = finished[0].flags(f"--config.lora.init_from={began}", f"--workdir={workdir}")
    assert panacea("finetune", *flags, "--config.checkpoint.on_damage=stop") == 2
    assert "4: damaged checkpoint" in capsys.readouterr().err
    assert panacea("finetune", *flags) == 0
    assert caplog.text.count("damaged checkpoint") == 1
    assert f"resumed from {stage / 'checkpoints' / '3'}" in capsys.readouterr().err
    assert {name: (stage / name).read_bytes() for name in exports} == before


def test_random_damage_is_found_or_harmless(finished, tmp_path):
    """Sixty of the thousand of `make faults`."""
    faults = Faults(finished[1], tmp_path, seed=17)
    drawn = [faults.draw(checkpoint=i % 3 == 0) for i in range(60)]
    assert {outcome for _, _, outcome in drawn} <= {FOUND, HARMLESS}, drawn
    assert sum(outcome == FOUND for _, _, outcome in drawn) > 30
