"""The commands: what each does in a line, what runs it, and the flags it reads.

A new command is a file in ``stages/``, a function here that starts it, and its line in ``COMMANDS``. A function imports what it needs when
it runs, so that ``--help`` and bad flags answer at once.
"""

import glob
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from panacea_jax.errors import InputError

if TYPE_CHECKING:
    from absl.flags import FlagValues
    from ml_collections import ConfigDict


class Command(NamedTuple):
    """One command.

    Attributes:
        summary: what it does, in a line.
        run: starts it; returns the path that it wrote.
        flags: that it reads besides ``--config``.
        several: whether several processes may run it together.
        reads: keys and sections of the configuration that it reads, for ``--help``.
    """

    summary: str
    run: "Callable[[FlagValues, ConfigDict], Path | None]"
    flags: tuple[str, ...] = ("workdir", "show_records")
    several: bool = False
    reads: tuple[str, ...] = ()


def _workdir(values: "FlagValues") -> Path:
    if not values.workdir:
        raise InputError("--workdir is not set: name a folder for the results")
    if glob.escape(values.workdir) != values.workdir:  # orbax would write checkpoints there that it cannot read
        raise InputError(f"--workdir={values.workdir}: a name with *, ? or [ in it is taken for a pattern; choose another")
    return _written(values.workdir)


def _written(text: str) -> Path:
    """The folder to write for one that a flag names."""
    import jax

    from panacea_jax.parallel import processes
    from panacea_jax.stores import is_address, working_copy

    if not (is_address(text) and processes.together()):
        return working_copy(text)
    if not text.startswith("gs:"):
        raise InputError(f"{text}: several processes write checkpoints to gs://… alone, or to a folder that all see (docs/stores.md)")
    if processes.first():
        working_copy(text)
    processes.barrier()  # what the others fetch is of a folder that is ours
    return working_copy(text, jax.process_index())


def _read(text: str) -> Path:
    """The folder or file to read for one that a flag names."""
    from panacea_jax.stores import stand_in

    return stand_in(text)


def _out(text: str) -> Path | None:
    return _written(text) if text else None


def _path(text: str) -> Path | None:
    return _read(text) if text else None


def _items(text: str) -> list[str]:
    return [item for item in text.split(",") if item]


def _paths(text: str) -> list[Path]:
    return [_read(item) for item in _items(text)]


def _quickstart(values: "FlagValues", config: "ConfigDict") -> Path:
    if values.base == "smollm2":
        from panacea_jax.comparison.testbed import testbed

        if not values.data:
            raise InputError("--data is not set: name the folder of the public sets (docs/real_language.md)")
        return testbed(_written(values.workdir or "smollm2_results"), _read(values.data), values.task, _path(values.gguf))
    from panacea_jax.stages.quickstart import quickstart

    if values.base != "miniature":
        raise InputError(f"--base={values.base}: one of miniature, smollm2")
    return quickstart(_written(values.workdir or "quickstart_results"), values.world)


def _train(name: str) -> "Callable[[FlagValues, ConfigDict], Path]":
    def run(values: "FlagValues", config: "ConfigDict") -> Path:
        from panacea_jax.stages.train import train_stage
        from panacea_jax.train.watch import Profile

        profile = Profile.parse(values.profile)
        return train_stage(config, _workdir(values), name, profile=profile)

    return run


def _heal(values: "FlagValues", config: "ConfigDict") -> Path:
    if config.heal.methods:
        from panacea_jax.stages.heal import heal_stage

        return heal_stage(config, _workdir(values))
    return _train("heal")(values, config)


def _generate(values: "FlagValues", config: "ConfigDict") -> Path:
    if values.prompts_only:
        from panacea_jax.stages.prompts import prompts_stage

        return prompts_stage(config, _workdir(values))
    from panacea_jax.stages.generate import generate_stage

    return generate_stage(config, _workdir(values))


def _judge(values: "FlagValues", config: "ConfigDict") -> Path:
    from panacea_jax.stages.judge import judge_stage

    return judge_stage(config, _workdir(values))


def _score(values: "FlagValues", config: "ConfigDict") -> Path:
    from panacea_jax.stages.score import score_stage

    return score_stage(
        config, _workdir(values), generations=values.generations, template=values.template,
        against=_paths(values.against),
        undefended=_path(values.undefended), aligned=_path(values.aligned),
    )  # fmt: skip


def _verify(values: "FlagValues", config: "ConfigDict") -> Path:
    from panacea_jax.stages.verify import verify_stage

    named = ("against", "aligned", "undefended")
    others = {name: _read(str(values[name].value)) for name in named if values[name].value}
    return verify_stage(config, _workdir(values), _path(values.gate), others, _path(values.signed_by))


def _try(values: "FlagValues", config: "ConfigDict") -> None:
    from panacea_jax.stages.ask import ask_stage

    ask_stage(config, _path(values.workdir), values.adapter, values.against)


def _perplexity(values: "FlagValues", config: "ConfigDict") -> Path:
    from panacea_jax.stages.perplexity import perplexity_stage

    return perplexity_stage(config, _workdir(values))


def _run(values: "FlagValues", config: "ConfigDict") -> Path:
    if config.sweep.over:
        raise InputError("config.sweep.over: many runs; start `panacea sweep`")
    if config.compare.methods or config.compare.grid:
        from panacea_jax.comparison.run import compare_methods

        if values.profile:
            raise InputError(f"--profile={values.profile}: of the steps of one run, and a comparison has many")
        return compare_methods(config, _workdir(values))
    from panacea_jax.stages.run import run_stages
    from panacea_jax.train.watch import Profile

    return run_stages(config, _workdir(values), Profile.parse(values.profile), show_records=values.show_records)


def _sweep(values: "FlagValues", config: "ConfigDict") -> Path | None:
    from panacea_jax.sweep.run import list_runs, sweep

    if not values.list:
        return sweep(config, _workdir(values), values.index)
    command = shlex.join(["panacea", *(a for a in sys.argv[1:] if a.partition("=")[0] not in ("-list", "--list"))])
    for number, changed in enumerate(list_runs(config), start=1):
        print(f"{command} --index={number}  # {changed}")
    return None


def _compare(values: "FlagValues", config: "ConfigDict") -> Path:
    from panacea_jax.comparison.own import compare_own

    return compare_own(config, _workdir(values))


def _layers(values: "FlagValues", config: "ConfigDict") -> Path:
    out = _out(values.out)
    if values.probe:
        from panacea_jax.stages.layer_probe import probe_layers

        one = "a probe looks at one model, that of --workdir or config.lora.init_from"
        for flag in ("epsilon", "checkpoint", "label"):
            if values[flag].value:
                raise InputError(f"--{flag}: {one}")
        if len(_items(values.workdir)) > 1:
            raise InputError(f"--workdir={values.workdir}: {one}")
        return probe_layers(config, _workdir(values), values.probe, values.against, out)
    from panacea_jax.stages.layers import layers_stage

    if values.against:
        raise InputError("--against: needs harmful batches; say how many with --probe=N")
    home, *others = _items(values.workdir) or [""]
    workdirs = [_written(home), *map(_read, others)] if home else []
    return layers_stage(workdirs, _paths(values.epsilon), _paths(values.checkpoint), labels=_items(values.label), out=out)


def _report(values: "FlagValues", config: "ConfigDict") -> Path:
    from panacea_jax.reporting.report import write_report

    return write_report(_workdir(values), _paths(values.against), _out(values.out), show_records=values.show_records)


def _convert(values: "FlagValues", config: "ConfigDict") -> Path:
    from panacea_jax.stages.convert import convert

    if not values.out:
        raise InputError("--out is not set: name the folder to write")
    return convert(config, _written(values.out), _path(values.epsilon), _path(values.gguf))


def _push(values: "FlagValues", config: "ConfigDict") -> None:
    from panacea_jax.stages.push import push_adapter

    if not values.adapter:
        raise InputError("--adapter is not set: name the PEFT folder to push")
    push_adapter(_read(values.adapter), values.to, public=values.public)


def _defences(values: "FlagValues", config: "ConfigDict") -> None:
    from panacea_jax.stages.defences import print_defences

    print_defences()


def _doctor(values: "FlagValues", config: "ConfigDict") -> None:
    from panacea_jax.stages.doctor import doctor

    doctor(config)


def _plan(values: "FlagValues", config: "ConfigDict") -> Path | None:
    from panacea_jax.stages.plan import plan_stage

    return plan_stage(config, values.topology, values.search, _out(values.workdir), values.price, values.explain)


def _launch(values: "FlagValues", config: "ConfigDict") -> None:
    from panacea_jax.stages.launch import print_script

    print_script(values.print)


TRAINING = ("workdir", "profile", "show_records")
# Keys and sections that several commands read.
PROMPTS = (
    "data.format", "data.columns", "data.template", "data.thinking", "data.date", "data.special_tokens", "eval.tasks", "eval.num_examples",
    "attack",
)  # fmt: skip
STALL = ("watch.stall", "watch.on_stall")
ANSWERS = ("seed", "model", "lora.init_from", "train.full_parameters", "generate", "mesh", *STALL, *PROMPTS)
STEPS = (
    "seed", "model", "lora", "data", "attack", "defence", "optimizer", "train", "checkpoint", "mesh", "export", "track", "watch",
    "eval.every",
)  # fmt: skip
CHOOSING = ("heal.sets", "heal.held_out", "heal.num_held_out", "heal.new_tokens", "budget", "generate.batch_size", "judge")
WHOLE = (*STEPS, "align", "heal", "budget", "eval", "generate", "judge", "compare", "after")
COMMANDS = {
    "quickstart": Command(
        "the whole experiment in a miniature world, no download, minutes on a laptop; or with a real small model on real rows", _quickstart,
        ("workdir", "world", "base", "data", "task", "gguf"),
    ),
    "run": Command(
        "every stage of a recipe: align, finetune, heal, generate, judge, layers (perplexity if asked for)", _run, TRAINING, several=True,
        reads=(*WHOLE, "sweep.over"),
    ),
    "compare": Command(
        "one's own model before, after SFT, with noise, and with the defence and its w alone; one table", _compare,
        reads=WHOLE,
    ),
    "sweep": Command(
        "many runs that differ in some keys: a grid, random draws, or a search by Optuna; several processes share them", _sweep,
        ("workdir", "over", "sampler", "trials", "list", "index", "show_records"),
        reads=(*WHOLE, "sweep"),
    ),
    "align": Command("safety alignment of the base on config.data.alignment", _train("align"), TRAINING, several=True, reads=STEPS),
    "finetune": Command(
        "fine-tuning on user data with config.defence", _train("finetune"), TRAINING, several=True, reads=(*STEPS, *CHOOSING),
    ),
    "heal": Command(
        "a post-fine-tuning defence, or several side by side, on a finished adapter or model", _heal, TRAINING, several=True,
        reads=(*STEPS, "heal.methods", *CHOOSING),
    ),
    "generate": Command("answers to config.eval.tasks", _generate, ("workdir", "prompts_only", "show_records"), True, ANSWERS),
    "judge": Command("verdicts and scores.json from the answers", _judge, reads=("judge", "eval.tasks", *STALL)),
    "score": Command(
        "figures from the verdicts that are there: again, of answers made elsewhere, or side by side", _score,
        ("workdir", "generations", "template", "against", "undefended", "aligned", "show_records"),
        reads=("judge", "eval.tasks", "generate.max_new_tokens", "data.format", "data.columns"),
    ),
    "verify": Command(
        "whether a model is as it was made and judged, ε applied, and keeps a gate's bounds: exit code 0 or 3, and verdict.json", _verify,
        ("workdir", "gate", "signed_by", "against", "aligned", "undefended"), reads=("gate", "model.path"),
    ),
    "try": Command(
        "answers to prompts that are typed or piped in, of two models side by side", _try,
        ("workdir", "adapter", "against", "show_records"),
        reads=(*ANSWERS, "data.max_length"),
    ),
    "perplexity": Command(
        "perplexity.json: the model's surprise at the answers of config.eval.tasks", _perplexity, several=True,
        reads=(
            "seed", "model", "lora.init_from", "generate.adapter", "mesh", *PROMPTS, "data.max_length", "data.loss_on",
            "train.batch_size", "train.full_parameters", *STALL,
        ),
    ),
    "layers": Command(
        "layer safety coefficients of a run, of several beside each other, or by a probe: JSON, CSV, PNG", _layers,
        ("workdir", "epsilon", "checkpoint", "label", "probe", "against", "out", "show_records"),
        reads=("seed", "model", "lora", "data", "train.harmful_batch_size", "train.full_parameters", "generate.adapter", "mesh"),
    ),
    "report": Command(
        "one page of what came out, of a comparison, a sweep or runs side by side: HTML, Markdown, CSV, Parquet", _report,
        ("workdir", "against", "out", "show_records"),
    ),
    "convert": Command(
        "base (+ adapter, + ε), or a GGUF file, to one Hugging Face folder", _convert, ("out", "epsilon", "gguf"),
        reads=("model.path", "lora.init_from", "mesh"),
    ),
    "push": Command("an exported adapter, its tokenizer and its card to a repository of the hub", _push, ("adapter", "to", "public")),
    "defences": Command("every defence: stage, data, passes a step, memory, paper", _defences, ()),
    "doctor": Command(
        "what this machine has, and what a configuration will use of it", _doctor, ("show_records",), several=True,
        reads=(
            "seed", "model", "lora", "data", "attack", "defence", "align.defence", "heal.defence", "optimizer", "train", "eval.tasks",
            "judge", "mesh",
        ),
    ),
    "plan": Command(
        "memory and least time of a step, hours and cost of the recipe, on a machine that is not there", _plan,
        ("workdir", "topology", "search", "explain", "price", "show_records"),
        reads=(
            "model", "lora", "data", "attack", "defence", "optimizer", "train", "align", "heal", "eval.tasks", "eval.num_examples",
            "generate.batch_size", "generate.max_new_tokens", "mesh",
        ),
    ),
    "launch": Command("the launch scripts for SLURM, TPU pods, GKE and others, for a machine without a clone", _launch, ("print",)),
}  # fmt: skip
