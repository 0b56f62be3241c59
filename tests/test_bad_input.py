"""Bad input: one line on stderr that names the key, file or tensor, exit code 2, and everything as it was."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from panacea_jax.defences import DEFENCES
from tests import runs
from tests.bad_input import (
    ADAPTERS,
    ARGUMENTS,
    CHANGED,
    GOOD,
    HEALING,
    IMPOSSIBLE,
    NO_SOURCES,
    RECIPES,
    SOURCES,
    TENSORS,
    A,
    Q,
)
from tests.runs import Place, panacea
from tests.tiny import write_model


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    return runs.make_place(tmp_path_factory.mktemp("bad"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return runs.finished_run(tmp_path_factory)


def snapshot(*roots: Path) -> dict[str, str]:
    """Hash of every file: a difference shows as a name, not as pages of bytes."""
    return {
        str(p): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "folder"
        for root in roots
        for p in root.rglob("*")
    }


@pytest.fixture
def refused(place, tmp_path, capsys, monkeypatch):
    """``refused(*command line)`` runs it, checks all that every refusal has in common, and returns the line."""
    monkeypatch.chdir(tmp_path)

    def check(*arguments: object) -> str:
        before = snapshot(place.root, tmp_path)
        capsys.readouterr()
        code = panacea(*arguments)
        captured = capsys.readouterr()
        assert code == 2, captured.err
        assert captured.out == ""
        assert captured.err.startswith("panacea: ") and captured.err.endswith("\n")
        assert captured.err.count("\n") == 1, captured.err
        assert snapshot(place.root, tmp_path) == before, "files were changed, made or removed"
        return captured.err

    return check


@pytest.fixture
def finetune(place, tmp_path, refused):
    """A refused ``finetune`` with some flags changed, into a work directory that must not appear."""

    def check(*flags: str) -> str:
        return refused("finetune", *place.flags(*flags), f"--workdir={tmp_path / 'new'}")

    return check


# ---------------------------------------------------------------- command line and keys


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    ARGUMENTS,
    ids=lambda x: " ".join(x) if isinstance(x, list) and x and x[0].isalpha() else "",
)
def test_command_lines(arguments, wanted, refused):
    line = refused(*arguments)
    for text in wanted:
        assert text in line


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in IMPOSSIBLE.items() for value in values])
def test_impossible_values(key, value, refused):
    line = refused("run", f"--config.{key}={value}", "--workdir=new")
    assert f"config.{key}" in line.replace("'", "")


def test_the_section_of_a_hyper_parameter_is_named(refused):
    line = refused(
        "run",
        "--config.heal.defence.name=random_perturbation",
        "--config.heal.defence.rho=-1",
        "--workdir=new",
    )
    assert "config.heal.defence.rho = -1" in line


def test_a_mesh_that_does_not_divide_the_devices(finetune):
    assert (
        "config.mesh" in (line := finetune("--config.mesh.data=3"))
        and "3" in line
        and "devices" in line
    )
    assert "only one axis may be -1" in finetune("--config.mesh.data=-1")
    assert "2 x 1 x 1" in finetune("--config.mesh.data=2", "--config.mesh.fsdp=1")


@pytest.mark.parametrize(("text", "wanted"), RECIPES)
def test_recipes(text, wanted, refused, tmp_path):
    if text is not None:
        (tmp_path / "recipe.py").write_text(text)
    line = refused("run", "--config=recipe.py", "--workdir=new")
    assert wanted in line
    if "config.lora.rank = 0" not in line:
        assert "--config=recipe.py: " in line


def test_a_recipe_that_is_no_text(refused, tmp_path):
    (tmp_path / "recipe.py").write_bytes(b"x = '\xff'\n")
    assert "--config=recipe.py: SyntaxError" in refused(
        "run", "--config=recipe.py", "--workdir=new"
    )
    assert "--config=.: no such file" in refused("run", "--config=.", "--workdir=new")


def test_defences_of_another_stage(refused, finetune, place):
    assert "config.defence.name = random_perturbation: acts at the stage heal" in finetune(
        "--config.defence.name=random_perturbation"
    )
    align = place.flags("--config.defence.name=panacea")
    assert "config.defence.name = panacea" in refused("align", *align, "--workdir=new")
    assert "not heal" in refused(
        "heal", *place.flags("--config.defence.name=panacea"), "--workdir=new"
    )
    assert "not heal" in refused("heal", *place.flags("--config.defence.name=sft"), "--workdir=new")


@pytest.mark.parametrize("name", ["repnoise", "random_vaccine"])
def test_packing_where_rows_count(name, refused, place):
    method = DEFENCES[name].facts.title
    for command, key in (("align", "defence"), ("run", "align.defence")):
        packed = place.flags("--config.data.packing=True", f"--config.{key}.name={name}")
        line = refused(command, *packed, "--workdir=new")
        assert f"config.data.packing = True: {method} " in line


def test_keys_that_exclude_each_other(refused, finetune, place):
    full = "--config.train.full_parameters=True"
    assert "config.lora.init_from" in finetune(full, "--config.lora.init_from=some/adapter")
    heal = place.flags(
        "--config.defence.name=safelora", f"--config.defence.base={place.base}", full
    )
    assert "config.train.full_parameters" in refused("heal", *heal, "--workdir=new")


@pytest.mark.parametrize(("flags", "wanted"), HEALING)
def test_what_healing_needs(refused, finished, place, flags, wanted):
    adapter = f"--config.lora.init_from={finished[1] / 'finetune' / 'adapter'}"
    ours = [f"--config.{'defence.' * f.startswith('name')}{f}" for f in flags]
    assert wanted in refused("heal", *place.flags(adapter, *ours), "--workdir=new")


# ---------------------------------------------------------------- sources


@pytest.mark.parametrize(("content", "wanted"), SOURCES)
@pytest.mark.parametrize("stream", ["user", "harmful"])
def test_sources(stream, content, wanted, finetune, tmp_path):
    path = tmp_path / "source.jsonl"
    if content is not None:
        path.write_bytes(content)
    line = finetune(f"--config.data.{stream}=pairs@{path}")
    for text in (f"config.data.{stream}", str(path), *wanted):
        assert text in line


def test_unreadable_sources(finetune, tmp_path):
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nowhere.jsonl")
    (tmp_path / "data.pickle").write_bytes(b"x")
    for name in ("folder.jsonl", "loop.jsonl", "gone.jsonl", "data.pickle"):
        line = finetune(f"--config.data.attack=pairs@{tmp_path / name}")
        assert "config.data.attack" in line and name in line


@pytest.mark.parametrize("value", NO_SOURCES)
def test_what_is_no_source(value, finetune):
    assert "config.data.user" in finetune(f"--config.data.user={value}")


def test_prompts_that_leave_no_target_token(finetune):
    line = finetune("--config.data.max_length=3")
    assert "config.data.user: no target token" in line and "config.data.max_length=3" in line


def test_evaluation_sets(refused, place, tmp_path):
    def generate(*tasks):
        return refused("generate", *place.flags(f"--config.eval.tasks={tasks}"), "--workdir=new")

    assert "config.eval.tasks is empty" in generate()
    assert (
        "config.eval.tasks" in (line := generate(f"pairs@{tmp_path}/none.jsonl"))
        and "none.jsonl" in line
    )
    assert "config.eval.tasks[1]" in generate(place.spec("test"), "quiz@x")
    assert "twice" in generate(place.spec("test"), place.spec("test"))
    (tmp_path / "bad.jsonl").write_text(GOOD + "{\n")
    assert "bad.jsonl:2" in generate(f"pairs@{tmp_path}/bad.jsonl")
    judge = refused("judge", *place.flags(), "--workdir=new")
    assert "new/generations/advbench.jsonl: no generations" in judge
    assert "config.judge.path = ''" in refused(
        "judge", *place.flags("--config.judge.name=beaver_dam"), "--workdir=new"
    )
    assert "config.eval.tasks is empty" in refused(
        "judge", *place.flags("--config.eval.tasks=()"), "--workdir=new"
    )


# ---------------------------------------------------------------- models


@pytest.fixture
def base(place, tmp_path) -> Path:
    """A copy of the base, to be damaged."""
    return Path(shutil.copytree(place.base, tmp_path / "base"))


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def with_base(base: Path) -> str:
    return f"--config.model.path={base}"


@pytest.mark.parametrize(("change", "wanted"), TENSORS.values(), ids=TENSORS)
def test_tensors(change, wanted, finetune, base):
    edit_tensors(base, change)
    line = finetune(with_base(base))
    for text in wanted:
        assert text in line


def test_truncated_weights(finetune, base):
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    line = finetune(with_base(base))
    assert str(path) in line and "truncated" in line and "tensor " in line
    path.write_bytes(path.read_bytes()[:50])
    assert str(path) in (line := finetune(with_base(base))) and "truncated" in line


def test_pickled_weights(finetune, base):
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    line = finetune(with_base(base))
    assert "pytorch_model.bin" in line and "refused" in line


def test_unsupported_architectures(finetune, base):
    edit_config(base, architectures=["MambaForCausalLM"], model_type="mamba")
    line = finetune(with_base(base))
    assert "MambaForCausalLM" in line
    for known in (
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "Qwen2ForCausalLM",
        "GemmaForCausalLM",
        "Gemma2ForCausalLM",
    ):
        assert known in line


def test_folders_that_are_no_model(finetune, base, tmp_path):
    assert "config.model.path is not set" in finetune("--config.model.path=")
    assert "nowhere" in finetune(f"--config.model.path={tmp_path}/nowhere")
    (base / "tokenizer.json").rename(base / "tokenizer.model")
    assert "tokenizer.model alone" in finetune(with_base(base))
    (base / "config.json").write_text("{")
    assert "config.json" in finetune(with_base(base))
    (base / "config.json").unlink()
    assert "config.json: no such file" in finetune(with_base(base))


# ---------------------------------------------------------------- adapters


@pytest.fixture
def adapter(finished, tmp_path) -> Path:
    """A copy of a good adapter, to be damaged."""
    return Path(shutil.copytree(finished[1] / "finetune" / "adapter", tmp_path / "adapter"))


def edit_adapter(folder: Path, change) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize(("change", "wanted"), ADAPTERS.values(), ids=ADAPTERS)
def test_adapters_that_do_not_fit(change, wanted, finetune, adapter):
    edit_adapter(adapter, change)
    line = finetune(f"--config.lora.init_from={adapter}")
    for text in ("adapter_model.safetensors", *wanted):
        assert text in line


def test_folders_that_are_no_adapter(finetune, refused, place, adapter, tmp_path):
    flag = f"--config.lora.init_from={adapter}"
    weights, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    good, settings = weights.read_bytes(), json.loads(config.read_text())
    weights.write_bytes(good[:-8])
    assert "adapter_model.safetensors: damaged or truncated" in finetune(flag)
    weights.rename(adapter / "adapter_model.bin")
    assert "pickled weights only" in finetune(flag)
    (adapter / "adapter_model.bin").unlink()
    assert "has no adapter_model.safetensors" in finetune(flag)
    weights.write_bytes(good)
    for changes, wanted in (
        ({"peft_type": "IA3"}, "IA3"),
        ({"r": 0}, "r = 0"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"rank_pattern": {"q_proj": 1}}, "q_proj.lora_A has shape (2, 32), the base wants (1, 32)"),
    ):
        config.write_text(json.dumps(settings | changes))
        assert wanted in finetune(flag)
    config.write_text("{")
    assert "adapter_config.json" in finetune(flag)
    config.unlink()
    assert "adapter_config.json" in finetune(flag)
    assert "none" in finetune(f"--config.lora.init_from={tmp_path}/none")
    heal = place.flags("--config.defence.name=random_perturbation")
    assert "run finetune first" in refused("heal", *heal, "--workdir=new")
    generate = place.flags(f"--config.generate.adapter={tmp_path}/none")
    assert "config.generate.adapter" in refused("generate", *generate, "--workdir=new")


# ---------------------------------------------------------------- work directories


def test_a_work_directory_that_cannot_be_written(refused, place, tmp_path):
    (tmp_path / "file").write_text("kept")
    for workdir in (tmp_path / "file", tmp_path / "file" / "below"):
        line = refused("finetune", *place.flags(), f"--workdir={workdir}")
        assert f"--workdir={workdir}" in line and "cannot be written" in line
    if os.geteuid():  # root may write anywhere
        (tmp_path / "closed").mkdir(mode=0o500)
        assert "closed" in refused("finetune", *place.flags(), f"--workdir={tmp_path}/closed/new")


def test_a_foreign_work_directory(refused, place, tmp_path):
    folder = tmp_path / "theirs" / "finetune"
    folder.mkdir(parents=True)
    (folder / "thesis.tex").write_text("kept")
    line = refused("finetune", *place.flags(), f"--workdir={tmp_path / 'theirs'}")
    assert str(folder) in line and "not ours" in line
    for text in ("{", "[]", '{"name": "a web app"}'):
        (folder / "manifest.json").write_text(text)
        line = refused("finetune", *place.flags(), f"--workdir={tmp_path / 'theirs'}")
        assert str(folder / "manifest.json") in line and "not a manifest of ours" in line


def finished_copy(finished, tmp_path, *names: str) -> Path:
    for name in names:
        shutil.copytree(finished[1] / name, tmp_path / "copy" / name)
    return tmp_path / "copy"


def again(finished, *flags: str) -> list[str]:
    """The flags of the finished run's ``finetune``."""
    return finished[0].flags(f"--config.lora.init_from={finished[1] / 'align' / 'adapter'}", *flags)


@pytest.mark.parametrize(("flag", "wanted"), CHANGED)
def test_a_changed_configuration(flag, wanted, refused, finished, tmp_path):
    workdir = finished_copy(finished, tmp_path, "finetune")
    line = refused("finetune", *again(finished, flag), f"--workdir={workdir}")
    assert (
        f"{workdir / 'finetune'}: made by another run ({wanted}); choose another --workdir" in line
    )


def test_changed_inputs(refused, finished, tmp_path):
    """The same path with other content is another input."""
    _place, _ = finished
    mine = runs.make_place(tmp_path / "place")
    workdir = tmp_path / "own"
    flags = mine.flags(
        "--config.defence.name=random_perturbation",
        f"--config.lora.init_from={finished[1] / 'align' / 'adapter'}",
    )
    assert panacea("heal", *flags, f"--workdir={workdir}") == 0
    edit_tensors(mine.base, lambda t: t.update({Q: t[Q] + 1}))
    line = refused("heal", *flags, f"--workdir={workdir}")
    assert f"input {mine.base}: " in line and "choose another --workdir" in line


def test_answers_of_another_run(refused, finished, tmp_path):
    place, _ = finished
    workdir = finished_copy(finished, tmp_path, "generations")
    same = f"--config.generate.adapter={finished[1] / 'heal' / 'adapter'}"
    line = refused(
        "generate", *place.flags(same, "--config.generate.max_new_tokens=5"), f"--workdir={workdir}"
    )
    assert "max_new_tokens: 4 there, 5 now" in line


def test_judging_needs_whole_answers(refused, finished, tmp_path):
    place, _ = finished
    workdir = finished_copy(finished, tmp_path, "generations")
    answers = workdir / "generations" / "pairs.jsonl"
    text = answers.read_text()
    answers.write_text("{\n" + text)
    shutil.copytree(finished[1] / "judgements", workdir / "judgements")
    assert "pairs.jsonl:1: damaged line" in refused("judge", *place.flags(), f"--workdir={workdir}")
    answers.write_text(text.replace('"response": "', '"response": "w1 ', 1))
    assert f"{answers}: not as the stage made it (pairs.jsonl differs" in refused("judge", *place.flags(), f"--workdir={workdir}")
    runs.rewrite_manifest(workdir / "generations", files={})  # as from before there were hashes
    assert "pairs.refusal.jsonl:1" in refused("judge", *place.flags(), f"--workdir={workdir}")
    runs.rewrite_manifest(workdir / "generations", status="running")
    assert "not finished yet" in refused("judge", *place.flags(), f"--workdir={workdir}")


def corrupt(folder: Path) -> None:
    """Overwrite the middle of every array file of a checkpoint."""
    files = [p for p in folder.rglob("*") if p.is_file() and "/d/" in p.as_posix()]
    assert files
    for path in files:
        data = bytearray(path.read_bytes())
        data[len(data) // 4 : 3 * len(data) // 4] = b"\x00" * (3 * len(data) // 4 - len(data) // 4)
        path.write_bytes(bytes(data))


def empty(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            path.write_bytes(b"")


def without_arrays(folder: Path) -> None:
    shutil.rmtree(folder / "state")


def mark_as_running(workdir: Path) -> None:
    """As a killed run leaves it."""
    runs.rewrite_manifest(workdir / "finetune", status="running")


@pytest.mark.parametrize("damage", [corrupt, empty, without_arrays])
def test_damaged_checkpoints(damage, refused, finished, tmp_path):
    workdir = finished_copy(finished, tmp_path, "finetune")
    newest = workdir / "finetune" / "checkpoints" / str(runs.STEPS)
    damage(newest)
    mark_as_running(workdir)
    line = refused("finetune", *again(finished), f"--workdir={workdir}", "--config.checkpoint.on_damage=stop")
    assert str(newest) in line and "checkpoint" in line
    line = refused("layers", f"--checkpoint={newest}")
    assert str(newest) in line and "checkpoint" in line
    assert str(newest) in refused("layers", f"--workdir={workdir}")


def test_a_damaged_checkpoint_seen_from_outside(finished, tmp_path):
    """In a process of its own, without PyTorch: what orbax, tensorstore and transformers say stays out of stderr."""
    workdir = finished_copy(finished, tmp_path, "finetune")
    newest = workdir / "finetune" / "checkpoints" / str(runs.STEPS)
    for path in newest.rglob("*"):
        if path.is_file() and "/d/" in path.as_posix():
            path.write_bytes(b"damaged")
    mark_as_running(workdir)
    code = (
        "import importlib.util, sys; sys.modules['torch'] = None; find = importlib.util.find_spec; "
        "importlib.util.find_spec = lambda name, *a: None if name == 'torch' else find(name, *a); "
        "from panacea_jax import cli; cli.main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, "finetune", *again(finished), f"--workdir={workdir}"]

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *more], capture_output=True, text=True, cwd=Path(__file__).parents[1])

    done = run("--config.checkpoint.on_damage=stop")
    assert done.returncode == 2, done.stderr
    assert done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(f"panacea: {newest}: damaged checkpoint")
    done = run()
    assert done.returncode == 0, done.stderr
    named, resumed, *rest = done.stderr.splitlines()
    assert named.startswith(f"WARNING: {newest}: damaged checkpoint") and resumed.startswith("resumed from"), done.stderr
    assert len(rest) == 1 and rest[0].startswith("finetune: "), done.stderr  # where the time went


def test_layers_without_epsilon(refused, finished, tmp_path):
    assert "run finetune" in refused("layers", "--workdir=new")
    aligned = finished[1] / "align" / "checkpoints" / "3"
    assert "holds no ε" in refused("layers", f"--checkpoint={aligned}", "--workdir=new")
    assert "none.safetensors: no such file" in refused("layers", "--epsilon=none.safetensors")
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    assert "junk.safetensors" in refused("layers", "--epsilon=junk.safetensors")
    assert "model.embed.weight" not in refused(
        "layers", f"--epsilon={finished[0].base / 'tokenizer.json'}"
    )
    save_file({"other.weight": np.zeros(3, np.float32)}, tmp_path / "other.safetensors")
    assert "other.weight" in refused("layers", "--epsilon=other.safetensors")
    save_file({A.replace(".0.", ".1."): np.zeros((2, 3), np.float32)}, tmp_path / "gap.safetensors")
    assert "a layer is missing" in refused("layers", "--epsilon=gap.safetensors")


def test_probes_of_what_is_not_there(refused, finished, place, tmp_path):
    flags = place.flags("--probe=1", "--workdir=new")
    adapter = finished[1] / "align" / "adapter"
    assert "neither an adapter or a model" in refused("layers", *flags, "--against=nothing")
    assert "config.data.harmful" in refused("layers", *flags, "--config.data.harmful=")
    both = (f"--config.lora.init_from={adapter}", "--config.train.full_parameters=True")
    line = refused("layers", *flags, *both)
    assert "config.train.full_parameters" in line and str(adapter) in line
    other = write_model(tmp_path / "other", num_hidden_layers=3)
    assert "not of one base" in refused("layers", *flags, f"--against={other}")
    line = refused("layers", *place.flags(f"--config.model.path={other}", *flags[-2:]), f"--against={finished[1]}")
    assert "--against" in line and f"an adapter of {finished[0].base}" in line
    (tmp_path / "layers_probe.json").write_text("[]")
    assert "not a probe of ours" in refused("layers", f"--workdir={tmp_path},{finished[1]}")


# ---------------------------------------------------------------- convert


def test_convert(refused, finished, tmp_path):
    place, run = finished
    adapter, epsilon = run / "align" / "adapter", run / "finetune" / "epsilon.safetensors"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "model.safetensors").write_text("kept")
    for out in ("full", "full/model.safetensors"):
        assert f"--out={out}: exists already" in refused("convert", *place.flags(), f"--out={out}")
    assert "--epsilon: needs the adapter" in refused(
        "convert", *place.flags(), f"--epsilon={epsilon}", "--out=new"
    )
    start = place.flags(f"--config.lora.init_from={adapter}")
    assert "none" in refused("convert", *start, "--epsilon=none", "--out=new")
    tensors = load_file(epsilon)
    for change in (
        lambda t: t.popitem(),
        lambda t: t.update({k: np.zeros((3, *v.shape[1:]), np.float32) for k, v in t.items()}),
    ):
        changed = dict(tensors)
        change(changed)
        save_file(changed, tmp_path / "other.safetensors")
        line = refused("convert", *start, "--epsilon=other.safetensors", "--out=new")
        assert "other.safetensors" in line
    deployed = place.flags(f"--config.lora.init_from={run / 'finetune' / 'adapter'}")
    assert "is w + ε already" in refused("convert", *deployed, f"--epsilon={epsilon}", "--out=new")
    assert "config.model.path is not set" in refused("convert", "--out=new")


def test_quickstart_leaves_other_folders_alone(refused, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("kept")
    assert "--workdir=mine" in refused("quickstart", "--workdir=mine")
    (tmp_path / "world").mkdir()
    (tmp_path / "world" / "world.json").write_text('{"world": 3}')
    assert "holds world 3" in refused("quickstart", "--workdir=world", "--world=4")
    (tmp_path / "file").write_text("kept")
    assert "--workdir=file" in refused("quickstart", "--workdir=file/below")
