"""Memory that does not suffice: said before, where the memory model says so; turned into advice, where it came to pass."""

import jax
import pytest

from panacea_jax.cli.parsing import parse_command
from panacea_jax.config import make_defence
from panacea_jax.parallel.chips import CHIPS
from panacea_jax.planning.plan import plans_for
from panacea_jax.planning.topology import Topology
from panacea_jax.stages import lineage, room
from tests.runs import make_place, panacea

XLA = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 4770354232 bytes."


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("room") / "place")


def flags(place, workdir, *more):
    return [*place.flags(*more), f"--workdir={workdir}"]


def needed(place, *more):
    _, config = parse_command("finetune", place.flags(*more))
    return config, room.needed_by_a_step(config, lineage.named(config), make_defence(config.defence))


def test_it_is_the_figure_of_the_plan(place):
    config, found = needed(place)
    [plan] = plans_for(config, Topology("v5e:1x1", CHIPS["v5e"], 1, None))
    assert sum(found.values()) == plan.total > 0


@pytest.mark.parametrize("there", ["too little", "enough", "unknown"])
def test_a_run_that_is_not_likely_to_fit_says_so_before_anything_is_loaded(place, tmp_path, monkeypatch, caplog, there):
    size = sum(needed(place)[1].values())
    found = {"too little": (size - 1, "of TPU v5e"), "enough": (size, "of TPU v5e"), "unknown": None}[there]
    monkeypatch.setattr(room, "room_of_a_device", lambda: found)
    (place.root / "broken.jsonl").write_text("{")
    assert panacea("finetune", *flags(place, tmp_path, f"--config.data.user=pairs@{place.root / 'broken.jsonl'}")) == 2
    said = [r.getMessage() for r in caplog.records if "memory model" in r.getMessage()]
    assert len(said) == (there == "too little") and not (tmp_path / "finetune").exists()
    for line in said:
        assert line.startswith("finetune: by the memory model a step needs 0.00 GiB on each of 1 devices (")
        assert "of TPU v5e: it may run out of memory. To need less: config.model.remat=full, config.train.accumulate=2, a smaller" in line


@pytest.mark.parametrize(
    ("where", "error", "said"),
    [
        ("finetune", jax.errors.JaxRuntimeError(XLA), "finetune: out of memory while running: 4.44 GiB were asked for. To need less: "),
        ("open_stage", jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 9.08G of 7.48G hbm."),
         "finetune: out of memory while compiling: 9.08 GiB were asked for. To need less: "),
        ("export", MemoryError("Unable to allocate 7.45 GiB for an array"),
         "finetune: out of memory while running: 7.45 GiB were asked for. To need less: "),
    ],
)  # fmt: skip
def test_errors_become_advice(place, tmp_path, monkeypatch, capsys, where, error, said):
    from panacea_jax.stages import train

    def fail(*_, **__):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(train, where, fail)
        assert panacea("finetune", *flags(place, tmp_path)) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("panacea: ")]
    assert len(lines) == 1 and lines[0].startswith(f"panacea: {said}")
    for part in ("config.model.remat=full", "config.train.accumulate=2", "config.train.harmful_batch_size", "config.data.max_length",
                 "config.mesh.fsdp", "by the memory model a step needs", "`panacea plan`"):  # fmt: skip
        assert part in lines[0]
    assert panacea("finetune", *flags(place, tmp_path)) == 0


def test_only_keys_that_are_left_are_named(place):
    more = ("--config.model.remat=full", "--config.train.accumulate=4", "--config.model.quantization=nf4")
    config, _ = needed(place, *more)
    said = room.keys_of_training(config, lineage.named(config), make_defence(config.defence))
    assert said == (
        "a smaller config.train.batch_size, a smaller config.train.harmful_batch_size, a smaller config.data.max_length, more devices on "
        "config.mesh.fsdp or .tensor"
    )


def test_other_commands_have_keys_of_their_own(place, tmp_path, monkeypatch, capsys):
    from panacea_jax.stages import convert, generate

    def fail(*_, **__):
        raise jax.errors.JaxRuntimeError(XLA)

    monkeypatch.setattr(generate, "_answer", fail)
    assert panacea("generate", *flags(place, tmp_path, "--config.generate.adapter=none")) == 1
    assert "generate: out of memory while running: 4.44 GiB were asked for. To need less: a smaller config.generate.batch_size" in (
        capsys.readouterr().err
    )
    monkeypatch.setattr(convert, "load", fail)
    assert panacea("convert", f"--config.model.path={place.base}", f"--out={tmp_path / 'out'}") == 1
    assert capsys.readouterr().err.startswith("panacea: convert: out of memory while running: 4.44 GiB were asked for; smaller batches")
