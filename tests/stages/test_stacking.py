"""Methods of the three stages combine from the configuration alone, and both policies of the starting adapter."""

import itertools
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from panacea_jax.defences import DEFENCES
from panacea_jax.defences.protocol import hyper_parameters
from tests import runs
from tests.runs import panacea

ALIGN = (
    "--config.align.train.steps=2",
    "--config.align.train.batch_size=4",
)
MERGED = "--config.lora.policy=merged"
FULL = ("--config.train.full_parameters=True", "--config.optimizer.learning_rate=1e-3")

# align + finetune + heal: further flags. {root} is the folder of the sources.
STACKS = {
    "vaccine+sft+antidote": ["--config.heal.defence.safety_mask=True", "--config.heal.defence.dense_ratio=0.5"],
    "random_vaccine+panacea+realign": [
        MERGED, "--config.heal.defence.steps=4", "--config.heal.train.batch_size=3", "--config.heal.optimizer.learning_rate=1e-2",
        "--config.data.benign=pairs@{root}/user.jsonl", "--config.heal.train.log_every=1",
    ],
    "sft+sft+safelora": ["--config.heal.defence.base={root}/base", "--config.heal.defence.num_layers=2"],
    "sft+sft+magnitude_prune": [MERGED, *FULL],
    "+panacea+random_prune": ["--config.heal.defence.dense_ratio=0.5"],
    "triplet+sft+safe_delta": [MERGED, "--config.data.benign=pairs@{root}/user.jsonl", "--config.heal.defence.budget=0.05"],
}  # fmt: skip

# Every other method that trains, once: only that the command line runs it between others. Answers are left out, which are above.
TRAINED = {
    "t_vaccine+lisa+random_perturbation": [
        "--config.align.defence.layers=1", "--config.defence.alignment_steps=1", "--config.defence.finetune_steps=1",
    ],
    "booster+ldifs+ascent": ["--config.heal.defence.rho=0.5"],
    "booster_vaccine+ewc+random_perturbation": [],
    "repnoise+kl+unlearn": ["--config.align.defence.paired=False"],
    "sft+safegrad+random_perturbation": [],
    "sft+bds+random_perturbation": [],
    "tar+vlguard+random_perturbation": [
        "--config.align.defence.inner_steps=2", "--config.align.defence.inner_every=1", "--config.defence.mode=sum",
    ],
    "sft+sbr+random_perturbation": ["--config.defence.prompts=4"],
    "sft+constrained_sft+random_perturbation": [],
}  # fmt: skip
# Those that compare with the base before its alignment, which here is where the alignment stage starts.
COMPARING = {
    "lox+asft+resta": ["--config.defence.base={root}/base", "--config.heal.defence.base={root}/base", "--config.align.defence.k=1"],
    "sft+asft+safemerge": [
        "--config.defence.base={root}/base", "--config.heal.defence.base={root}/base", "--config.heal.defence.threshold=1",
    ],
}  # fmt: skip


def flags(place, stack):
    align, finetune, heal = stack.split("+")
    named = [f"--config.defence.name={finetune}", f"--config.heal.defence.name={heal}"]
    if align:
        named += [f"--config.align.defence.name={align}", *ALIGN]
        if "rho" in hyper_parameters(DEFENCES[align]):
            named.append("--config.align.defence.rho=0.1")
    more = (STACKS | TRAINED | COMPARING)[stack]
    return place.flags(*named, *(flag.format(root=place.root) for flag in more))


@pytest.fixture(scope="module", params=STACKS)
def stacked(request, tmp_path_factory):
    """(name, place, work directory of the finished run)."""
    root = tmp_path_factory.mktemp("stack")
    place = runs.make_place(root / "place")
    assert panacea("run", *flags(place, request.param), f"--workdir={root / 'run'}") == 0
    return request.param, place, root / "run"


def manifest(workdir, stage):
    return json.loads((workdir / stage / "manifest.json").read_text())


def deployed(workdir, stage):
    for part in ("adapter/adapter_model.safetensors", "model/model.safetensors"):
        if (workdir / stage / part).is_file():
            return load_file(workdir / stage / part)
    raise AssertionError(f"{stage} deployed nothing")


def test_the_heal_stage_heals_and_is_what_answers(stacked):
    stack, place, workdir = stacked
    heal, full = stack.split("+")[2], FULL[0] in STACKS[stack]
    before, after = deployed(workdir, "finetune"), deployed(workdir, "heal")
    assert before.keys() == after.keys()
    changed = {n for n in before if not np.array_equal(before[n], after[n])}
    outcome = manifest(workdir, "heal")["outcome"]
    if heal in ("antidote", "random_prune", "magnitude_prune"):
        cut = sum(int(((before[n] != 0) & (after[n] == 0)).sum()) for n in before)
        assert cut == outcome["report"]["pruned"] > 0
        assert all(
            np.array_equal(after[n][after[n] != 0], before[n][after[n] != 0]) for n in before
        )
    elif heal == "safelora":
        assert changed and all("lora_B" in n for n in changed)
        assert sum(map(len, outcome["report"]["projected"].values())) >= 2
        assert manifest(workdir, "heal")["config"]["defence"]["aligned"] == str(
            workdir / "align" / "adapter"
        )
    elif heal == "safe_delta":  # merged: the base is the aligned model, and the rank stays
        assert changed == {n for n in before if "lora_A" in n}
        assert {len(k) for k in outcome["report"]["kept_inputs"].values()} == {2}
        assert manifest(workdir, "heal")["config"]["defence"]["aligned"] == ""
    else:
        assert len(changed) == len(before) and outcome["steps"] == 4
        assert outcome["records"] == {"user": 12}
    merged = workdir / "base" / "model"
    assert merged.is_dir() is (MERGED in STACKS[stack])
    base = str(merged if MERGED in STACKS[stack] else place.base)
    answered = manifest(workdir, "generations")["config"]
    if full:
        assert (answered["model"]["path"], answered["adapter"]) == (
            str(workdir / "heal" / "model"),
            "",
        )
    else:
        assert answered["adapter"] == str(workdir / "heal" / "adapter")
        assert answered["model"]["path"] == base == outcome["base"]
        for stage in ("finetune", "heal"):
            config = json.loads((workdir / stage / "adapter" / "adapter_config.json").read_text())
            assert config["base_model_name_or_path"] == base
    assert (workdir / "scores.json").is_file()
    # the newest stage with an ε is the fine-tuning, if that has one
    assert (workdir / "layers.json").is_file() is ("panacea" in stack)


def test_a_second_run_skips_all_stages_and_one_cut_short_goes_on(stacked, capsys):
    stack, place, workdir = stacked
    stages = [s for s in ("align", "base", "finetune", "heal") if (workdir / s).is_dir()]
    times = {s: (workdir / s / "manifest.json").stat().st_mtime_ns for s in stages}
    healed = deployed(workdir, "heal")
    runs.rewrite_manifest(workdir / "heal", status="running")
    for part in ("adapter", "checkpoints/4"):
        shutil.rmtree(workdir / "heal" / part, ignore_errors=True)
    capsys.readouterr()
    assert panacea("run", *flags(place, stack), f"--workdir={workdir}") == 0
    said = capsys.readouterr().err
    # align, finetune and generations; the merged base is not even looked at
    assert said.count("done already, skipped") == (2 if stack.startswith("+") else 3)
    assert ("resumed from" in said) is stack.endswith("realign")
    for stage in stages[:-1]:
        assert (workdir / stage / "manifest.json").stat().st_mtime_ns == times[stage]
    for name, value in deployed(workdir, "heal").items():
        np.testing.assert_array_equal(value, healed[name], err_msg=name)


@pytest.mark.parametrize("stacked", ["random_vaccine+panacea+realign"], indirect=True)
def test_merged_starts_afresh_on_the_merged_base(stacked, tmp_path):
    """Base + s·BA of alignment, and on it a fresh adapter; what is deployed answers as base, alignment and adapter in one."""
    _, place, workdir = stacked
    aligned = load_file(workdir / "align" / "adapter" / "adapter_model.safetensors")
    old, new = (
        load_file(f / "model.safetensors") for f in (place.base, workdir / "base" / "model")
    )
    moved = 0
    for name, value in new.items():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        if f"{key}A.weight" in aligned:
            delta = 2.0 * aligned[f"{key}B.weight"] @ aligned[f"{key}A.weight"]  # α/r = 4/2
            moved += np.abs(delta).max() > 1e-4
            np.testing.assert_allclose(value, old[name] + delta, rtol=1e-5, atol=1e-6)
        else:
            np.testing.assert_array_equal(value, old[name])
    assert moved == 6
    whole = tmp_path / "whole"
    adapter = f"--config.lora.init_from={workdir / 'heal' / 'adapter'}"
    merge = [f"--config.model.path={workdir / 'base' / 'model'}", adapter]
    assert panacea("convert", *merge, f"--out={whole}") == 0
    generate = place.flags(f"--config.model.path={whole}")
    assert panacea("generate", *generate, f"--workdir={tmp_path / 'w'}") == 0
    # called alone with the original base, generate finds the one that the adapter belongs to
    shutil.move(workdir / "generations", tmp_path / "before")
    assert panacea("generate", *place.flags(), f"--workdir={workdir}") == 0
    for name in ("advbench", "pairs", "xstest"):
        lines = [
            [
                json.loads(line)["response"]
                for line in (f / f"{name}.jsonl").read_text().splitlines()
            ]
            for f in (tmp_path / "before", tmp_path / "w" / "generations", workdir / "generations")
        ]
        assert lines[0] == lines[1] == lines[2] and any(lines[0])


def test_every_method_is_in_a_stack():
    methods = {method for stack in (*STACKS, *TRAINED, *COMPARING) for method in stack.split("+") if method}
    assert methods == DEFENCES.keys()


@pytest.mark.parametrize("stack", TRAINED)
def test_the_command_line_trains_with_every_method(stack, tmp_path):
    """Each stage goes on from what the one before deployed, and its steps move that."""
    place = runs.make_place(tmp_path / "place")
    few = ("--config.eval.tasks=()", "--config.train.steps=2", "--config.checkpoint.every=0")
    workdir = tmp_path / "run"
    assert panacea("run", *flags(place, stack), *few, f"--workdir={workdir}") == 0
    weights = []
    for stage, method, steps in zip(("align", "finetune", "heal"), stack.split("+"), (2, 2, 0)):
        made = manifest(workdir, stage)
        assert (made["status"], made["config"]["defence"]["name"]) == ("done", method)
        assert made["outcome"]["steps"] == steps
        weights.append(deployed(workdir, stage))
        assert all(np.isfinite(x).all() for x in weights[-1].values())
    started = manifest(workdir, "finetune")["config"]["lora"]["init_from"]
    assert started == str(workdir / "align" / "adapter")
    for before, after in itertools.pairwise(weights):
        moved = [np.abs(after[name] - x).max() for name, x in before.items()]
        assert min(moved) > 0 and max(moved) < 1


@pytest.mark.parametrize("stack", COMPARING)
def test_what_compares_with_the_unaligned_base(stack, tmp_path):
    """The healed adapter has the ranks of two, and answers as the base with all of it merged."""
    place = runs.make_place(tmp_path / "place")
    workdir = tmp_path / "run"
    few = ("--config.train.steps=2", "--config.checkpoint.every=0")
    assert panacea("run", *flags(place, stack), *few, f"--workdir={workdir}") == 0
    aligned, tuned, healed = (deployed(workdir, stage) for stage in ("align", "finetune", "heal"))
    assert manifest(workdir, "finetune")["config"]["defence"]["base"] == str(place.base)
    assert manifest(workdir, "heal")["config"]["defence"]["aligned"] == str(workdir / "align" / "adapter")
    old = load_file(place.base / "model.safetensors")
    whole = tmp_path / "whole"
    flag = f"--config.lora.init_from={workdir / 'heal' / 'adapter'}"
    assert panacea("convert", f"--config.model.path={place.base}", flag, f"--out={whole}") == 0
    own, other = (1.0, 1.0) if stack.endswith("resta") else (0.8, 0.2)
    for name, w in load_file(whole / "model.safetensors").items():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        if f"{key}A.weight" not in healed:
            np.testing.assert_array_equal(w, old[name])
            continue
        assert healed[f"{key}A.weight"].shape[0] == 4
        parts = (2.0 * x[f"{key}B.weight"] @ x[f"{key}A.weight"] for x in (tuned, aligned))  # α/r = 4/2
        np.testing.assert_allclose(w, old[name] + sum(c * x for c, x in zip((own, other), parts)), rtol=1e-5, atol=1e-6)
    answered = manifest(workdir, "generations")["config"]
    assert answered["adapter"] == str(workdir / "heal" / "adapter") and (workdir / "scores.json").is_file()
