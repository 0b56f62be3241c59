"""The command line: ``panacea <command> --config=FILE[:variant] --config.a.b=value --workdir=DIR``.

Parses and dispatches, nothing else. Exit codes: 0 done, 1 failed, 2 bad input (one line says what), 75 preempted and saved: start the same
command again.
"""

import contextlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from absl import flags, logging

from panacea_jax.errors import InputError, no_space

if TYPE_CHECKING:
    from ml_collections import ConfigDict

# Nothing above imports JAX, and a command imports what it needs when it runs: --help and bad flags answer at once.

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_PREEMPTED, EXIT_INTERRUPTED = 1, 2, 75, 130


class Command(NamedTuple):
    """One command: what it does in a line, what runs it, and the flags it reads besides --config."""

    summary: str
    run: Callable[[flags.FlagValues, "ConfigDict"], Path | None]
    flags: tuple[str, ...] = ("workdir",)
    several: bool = False  # whether several processes may run it together


def _workdir(values: flags.FlagValues) -> Path:
    if not values.workdir:
        raise InputError("--workdir is not set: name a folder for the results")
    return Path(values.workdir)


def _path(text: str) -> Path | None:
    return Path(text) if text else None


def _items(text: str) -> list[str]:
    return [item for item in text.split(",") if item]


def _paths(text: str) -> list[Path]:
    return [Path(item) for item in _items(text)]


def _quickstart(values: flags.FlagValues, config: "ConfigDict") -> Path:
    if values.base == "smollm2":
        from panacea_jax.comparison.testbed import testbed

        if not values.data:
            raise InputError("--data is not set: name the folder of the public sets (docs/real_language.md)")
        return testbed(Path(values.workdir or "smollm2_results"), Path(values.data), values.task, _path(values.gguf))
    from panacea_jax.stages.quickstart import quickstart

    if values.base != "miniature":
        raise InputError(f"--base={values.base}: one of miniature, smollm2")
    return quickstart(Path(values.workdir or "quickstart_results"), values.world)


def _train(name: str) -> Callable[[flags.FlagValues, "ConfigDict"], Path]:
    def run(values: flags.FlagValues, config: "ConfigDict") -> Path:
        from panacea_jax.stages.train import train_stage
        from panacea_jax.train.watch import Profile

        profile = Profile.parse(values.profile)
        return train_stage(config, _workdir(values), name, profile=profile)

    return run


def _heal(values: flags.FlagValues, config: "ConfigDict") -> Path:
    if config.heal.methods:
        from panacea_jax.stages.heal import heal_stage

        return heal_stage(config, _workdir(values))
    return _train("heal")(values, config)


def _generate(values: flags.FlagValues, config: "ConfigDict") -> Path:
    if values.prompts_only:
        from panacea_jax.stages.prompts import prompts_stage

        return prompts_stage(config, _workdir(values))
    from panacea_jax.stages.generate import generate_stage

    return generate_stage(config, _workdir(values))


def _judge(values: flags.FlagValues, config: "ConfigDict") -> Path:
    from panacea_jax.stages.judge import judge_stage

    return judge_stage(config, _workdir(values))


def _score(values: flags.FlagValues, config: "ConfigDict") -> Path:
    from panacea_jax.stages.score import score_stage

    return score_stage(
        config, _workdir(values), generations=values.generations, template=values.template,
        against=_paths(values.against),
        undefended=_path(values.undefended), aligned=_path(values.aligned),
    )  # fmt: skip


def _perplexity(values: flags.FlagValues, config: "ConfigDict") -> Path:
    from panacea_jax.stages.perplexity import perplexity_stage

    return perplexity_stage(config, _workdir(values))


def _run(values: flags.FlagValues, config: "ConfigDict") -> Path:
    if config.compare.methods or config.compare.grid:
        from panacea_jax.comparison.run import compare_methods

        return compare_methods(config, _workdir(values))
    from panacea_jax.stages.run import run_stages
    from panacea_jax.train.watch import Profile

    return run_stages(config, _workdir(values), Profile.parse(values.profile))


def _layers(values: flags.FlagValues, config: "ConfigDict") -> Path:
    out = _path(values.out)
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
    sources = [_paths(text) for text in (values.workdir, values.epsilon, values.checkpoint)]
    return layers_stage(*sources, labels=_items(values.label), out=out)


def _report(values: flags.FlagValues, config: "ConfigDict") -> Path:
    from panacea_jax.reporting.report import write_report

    return write_report(_workdir(values), _paths(values.against), _path(values.out))


def _convert(values: flags.FlagValues, config: "ConfigDict") -> Path:
    from panacea_jax.stages.convert import convert

    if not values.out:
        raise InputError("--out is not set: name the folder to write")
    return convert(config, Path(values.out), _path(values.epsilon), _path(values.gguf))


def _defences(values: flags.FlagValues, config: "ConfigDict") -> None:
    from panacea_jax.stages.defences import print_defences

    print_defences()


def _doctor(values: flags.FlagValues, config: "ConfigDict") -> None:
    from panacea_jax.stages.doctor import doctor

    doctor(config)


def _plan(values: flags.FlagValues, config: "ConfigDict") -> Path | None:
    from panacea_jax.stages.plan import plan_stage

    return plan_stage(config, values.topology, values.search, _path(values.workdir))


def _launch(values: flags.FlagValues, config: "ConfigDict") -> None:
    from panacea_jax.stages.launch import print_script

    print_script(values.print)


TRAINING = ("workdir", "profile")
COMMANDS = {
    "quickstart": Command(
        "the whole experiment in a miniature world, no download, minutes on a laptop; or with a real small model on real rows", _quickstart,
        ("workdir", "world", "base", "data", "task", "gguf"),
    ),
    "run": Command(
        "every stage of a recipe: align, finetune, heal, generate, judge, layers (perplexity if asked for)", _run, TRAINING, True,
    ),
    "align": Command("safety alignment of the base on config.data.alignment", _train("align"), TRAINING, True),
    "finetune": Command("fine-tuning on user data with config.defence", _train("finetune"), TRAINING, True),
    "heal": Command("a post-fine-tuning defence, or several side by side, on a finished adapter or model", _heal, TRAINING, True),
    "generate": Command("answers to config.eval.tasks", _generate, ("workdir", "prompts_only"), several=True),
    "judge": Command("verdicts and scores.json from the answers", _judge),
    "score": Command(
        "figures from the verdicts that are there: again, of answers made elsewhere, or side by side", _score,
        ("workdir", "generations", "template", "against", "undefended", "aligned"),
    ),
    "perplexity": Command("perplexity.json: the model's surprise at the answers of config.eval.tasks", _perplexity, several=True),
    "layers": Command(
        "layer safety coefficients of a run, of several beside each other, or by a probe: JSON, CSV, PNG", _layers,
        ("workdir", "epsilon", "checkpoint", "label", "probe", "against", "out"),
    ),
    "report": Command(
        "one page of what came out, of a comparison, a sweep or runs side by side: HTML, Markdown, CSV, Parquet", _report,
        ("workdir", "against", "out"),
    ),
    "convert": Command("base (+ adapter, + ε), or a GGUF file, to one Hugging Face folder", _convert, ("out", "epsilon", "gguf")),
    "defences": Command("every defence: stage, data, passes a step, memory, paper", _defences, ()),
    "doctor": Command("what this machine has, and what a configuration will use of it", _doctor, (), several=True),
    "plan": Command("memory and least time of a step on a machine that is not there", _plan, ("workdir", "topology", "search")),
    "launch": Command("the launch scripts for SLURM, TPU pods, GKE and others, for a machine without a clone", _launch, ("print",)),
}  # fmt: skip

# Where a process stands among several; without them the launcher's environment says so.
PROCESS_FLAGS = {
    "coordinator": "HOST:PORT of process 0, the same for all; auto on a TPU slice",
    "num_processes": "how many there are",
    "process_id": "which one this is, 0 …",
}


class Flag(NamedTuple):
    """A flag of some commands: what ``--help`` says, and the default, whose type is the flag's."""

    help: str
    default: str | int | bool = ""


FLAGS = {
    "workdir": Flag("folder for the results; a run in it goes on where it stopped; for layers several with commas"),
    "world": Flag("seed of the miniature world", 0),
    "base": Flag("miniature, or smollm2: SmolLM2-135M-Instruct, about two hours on two cores", "miniature"),
    "data": Flag("folder of the public sets that --base=smollm2 draws on"),
    "task": Flag("the user's task on --base=smollm2: sst2 or ag_news", "sst2"),
    "prompts_only": Flag("write the prompts alone, for a server that answers in our place; loads no weights", False),
    "generations": Flag("answers made elsewhere: [TASK@]FILE, several with commas, or a folder"),
    "template": Flag("id of the template that --generations were made with, like alpaca-1"),
    "against": Flag("work directories to compare with, commas between them; for a probe one, a PEFT or model folder, or none (the base)"),
    "undefended": Flag("work directory of the model attacked without a defence"),
    "aligned": Flag("work directory of the model before the attack"),
    "epsilon": Flag("exported ε (epsilon.safetensors); for layers several with commas"),
    "gguf": Flag("GGUF file: to convert in place of a base, or the model of --base=smollm2"),
    "checkpoint": Flag("checkpoint folder (…/checkpoints/<step>), several with commas"),
    "label": Flag("names of the models that several sources are runs of, with commas; by default those of their bases"),
    "probe": Flag("number of harmful batches to look at without training", 0),
    "topology": Flag("machine to plan for: v5e:4x4, 2*v5p:2x2x1 (two slices), tpu7x:2x2x1, gpu:h100x8 …"),
    "search": Flag("try meshes, batch sizes and remat policies; the cheapest that fits comes first", False),
    "out": Flag("folder to write: of convert a Hugging Face folder, of layers one in place of --workdir, of report of WORKDIR/report"),
    "profile": Flag("record steps with jax.profiler, STEP:COUNT, into WORKDIR/<stage>/profile"),
    "print": Flag("name of the script; without it all names are listed"),
}


def _define(values: flags.FlagValues, name: str) -> None:
    text, default = FLAGS[name]
    if isinstance(default, bool):
        flags.DEFINE_boolean(name, default, text, flag_values=values)
    elif isinstance(default, int):
        flags.DEFINE_integer(name, default, text, 0, flag_values=values)
    else:
        flags.DEFINE_string(name, default, text, flag_values=values)


def _usage() -> str:
    lines = [
        "usage: panacea <command> [--config=RECIPE[:variant]] [--config.KEY=VALUE …] [--workdir=DIR]",
        "",
        "commands:",
    ]
    lines += [f"  {name:<11} {command.summary}" for name, command in COMMANDS.items()]
    lines += [
        "",
        "panacea <command> --help shows the command's flags and every config key with its default.",
    ]
    return "\n".join(lines)


def _command_help(name: str) -> str:
    from ml_collections.config_flags import config_path

    from panacea_jax import config as config_module

    command = COMMANDS[name]
    lines = [
        f"panacea {name}: {command.summary}",
        "",
        "flags:",
        "  --config=RECIPE[:variant]  a file, or the name of one that comes with the package; without it the defaults below",
    ]
    for flag in command.flags:
        text, default = FLAGS[flag]
        lines.append(f"  --{flag}={'…' if default == '' else str(default).lower()}  {text}")
    if command.several:
        lines += ["", "as one of several processes (docs/processes.md):"]
        lines += [f"  --{flag}=…  {text}" for flag, text in PROCESS_FLAGS.items()]
    lines += ["", "config keys (override with --config.KEY=VALUE):"]
    default = config_module.get_config()
    lines += [
        f"  {key} = {config_path.get_value(key, default)!r}" for key in config_module.keys(default)
    ]
    return "\n".join(lines)


def parse_command(
    command: str, arguments: Sequence[str]
) -> "tuple[flags.FlagValues, ConfigDict]":
    """Flags and the validated configuration of a command.

    Raises:
        InputError: an unknown flag or key, a value of the wrong type, an unreadable recipe, an impossible value.
    """
    from ml_collections import config_flags

    from panacea_jax import config as config_module

    values = flags.FlagValues()
    for name in COMMANDS[command].flags:
        _define(values, name)
    if COMMANDS[command].several:
        flags.DEFINE_string("coordinator", "", PROCESS_FLAGS["coordinator"], flag_values=values)
        for name in ("num_processes", "process_id"):
            flags.DEFINE_integer(name, None, PROCESS_FLAGS[name], flag_values=values)
    recipe, arguments = _take_recipe(arguments)
    config = config_module.load_recipe(recipe) if recipe else config_module.get_config()
    for argument in arguments:
        if override := _OVERRIDE.match(argument):
            config_module.require_key(config, override[1])
    argv = [f"panacea {command}", *arguments]
    try:
        config_flags.DEFINE_config_dict("config", config, "recipe", values, sys_argv=argv)
        rest = values(argv)[1:]
    except (flags.Error, TypeError, ValueError) as error:
        raise InputError(str(error)) from error
    if rest:
        raise InputError(f"unexpected argument {rest[0]!r}; flags are --name=value")
    config_module.validate(values.config)
    return values, values.config


# --config.a.b=1, --config.a.b 1, --noconfig.a.b and, for one entry of a list, --config.a.b[0]=1
_OVERRIDE = re.compile(r"--?(?:no)?config\.([^=\[]*)")


def _take_recipe(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """What ``--config=`` names, and the other arguments."""
    rest, found = list(arguments), []
    for i in range(len(rest) - 1, -1, -1):
        name, equals, value = rest[i].partition("=")
        if name not in ("-config", "--config"):
            continue
        if not equals and i + 1 < len(rest):
            value = rest.pop(i + 1)
        found.append(value)
        del rest[i]
    if len(found) > 1 or "" in found:
        raise InputError(
            "--config is given twice"
            if len(found) > 1
            else "--config: name a recipe, FILE[:variant] or NAME[:variant]"
        )
    return (found[0] if found else ""), rest


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``panacea``; ends the process with the command's exit code."""
    with contextlib.ExitStack() as together:
        code = run(sys.argv[1:] if argv is None else argv, together)
        if code:
            _abandon(code)
    if code == EXIT_FAILED:  # threads of a failed write may be left, whose last words are tracebacks
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def run(arguments: Sequence[str], together: contextlib.ExitStack | None = None) -> int:
    """Run one command line and return its exit code.

    Args:
        arguments: of the command line.
        together: where this process leaves the others that it joined; by default at the end of this call.
    """
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if arguments else EXIT_BAD_INPUT
    name, *rest = arguments
    if name not in COMMANDS:
        print(f"panacea: unknown command {name!r}; known are {', '.join(COMMANDS)}", file=sys.stderr)
        return EXIT_BAD_INPUT
    if any(a in ("-h", "--help") for a in rest):
        print(_command_help(name))
        return 0
    flags.FLAGS.mark_as_parsed()  # ours are in a set of their own; absl's logging looks at the global one
    logging.use_absl_handler()
    logging.set_verbosity(logging.WARNING)
    # transformers advises to install PyTorch, which is not needed here.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    with contextlib.ExitStack() as stack:
        return _run_command(name, rest, together or stack)


def _run_command(name: str, arguments: Sequence[str], together: contextlib.ExitStack) -> int:
    import jax

    from panacea_jax import workdir
    from panacea_jax.parallel import processes
    from panacea_jax.train.signals import Diverged, Preempted

    try:
        values, config = parse_command(name, arguments)
        if COMMANDS[name].several:
            place = processes.find_place(
                values.coordinator, values.num_processes, values.process_id
            )
            together.enter_context(processes.joined(place))
            environment = {k: v for k, v in os.environ.items() if k in processes.SETTINGS}
            facts = {"config": config.to_dict(), "environment": environment}
            processes.agree(f"panacea {name}", workdir.plain(facts))
        path = COMMANDS[name].run(values, config)
        processes.leave()
    except InputError as error:
        return _fail(str(error), EXIT_BAD_INPUT)
    except KeyboardInterrupt:
        return _fail(
            "interrupted; the same command goes on from the last checkpoint", EXIT_INTERRUPTED
        )
    except Preempted as error:
        return _fail(f"{error}; start the same command again to go on", EXIT_PREEMPTED)
    except Diverged as error:
        return _fail(str(error), EXIT_FAILED)
    except Exception as error:
        if full := no_space(error):
            file, reason = full
            where = file or _written(arguments)
            return _fail(f"{where}: cannot be written ({reason}); make room and start the same command again", EXIT_FAILED)
        if isinstance(error, jax.errors.JaxRuntimeError):
            processes.wait_for_verdict()
        processes.leave(f"{type(error).__name__}: {error}")
        if processes.together():
            traceback.print_exc()
            processes.abandon(EXIT_FAILED)
        raise
    if path is not None and processes.first():
        print(os.path.relpath(path))
    return 0


def _written(arguments: Sequence[str]) -> str:
    """The flag that says where a command writes."""
    return next((a for a in arguments if re.match("--?(workdir|out)=", a)), "the disk")


def _fail(message: str, code: int) -> int:
    from panacea_jax.parallel import processes

    print(f"panacea: {message}", file=sys.stderr, flush=True)
    if code == EXIT_PREEMPTED:
        processes.barrier()  # the first one's end would cut the others off from their coordinator
        message = ""
    processes.leave(message, code)
    return code


def _abandon(code: int) -> None:
    """End at once where others would be waited for."""
    if "jax" in sys.modules:
        from panacea_jax.parallel import processes

        processes.abandon(code)


if __name__ == "__main__":
    main()
