"""Runs one command line and ends with its exit code."""

import contextlib
import errno
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from panacea_jax.cli.commands import COMMANDS
from panacea_jax.cli.help import HELP, HELPFULL, VERSION, command_help, usage, version
from panacea_jax.cli.huge_pages import in_huge_pages
from panacea_jax.errors import (
    GateNotMet,
    InputError,
    OutOfMemory,
    StoreFailed,
    no_space,
    out_of_memory,
    out_of_reach,
    record_text,
    without_secrets,
)
from panacea_jax.terminal import safe_line, safe_text

if TYPE_CHECKING:
    from absl.flags import FlagValues
    from ml_collections import ConfigDict

# Characters of a record that are shown behind an error about it, when asked for.
RECORD = 200
EXIT_FAILED, EXIT_BAD_INPUT, EXIT_GATE, EXIT_PREEMPTED, EXIT_INTERRUPTED = 1, 2, 3, 75, 130


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``panacea``; ends the process with the command's exit code."""
    if argv is None and len(sys.argv) > 1 and _computes(sys.argv[1]):
        in_huge_pages()
    signal.signal(signal.SIGINT, _interrupted)
    with contextlib.ExitStack() as together:
        try:
            code = run(sys.argv[1:] if argv is None else argv, together)
            sys.stdout.flush()
        except BrokenPipeError:  # whoever read along, such as head, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = EXIT_FAILED
        if code:
            _abandon(code)
    if code == EXIT_FAILED:  # threads of a failed write may be left, whose last words are tracebacks
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _computes(name: str) -> bool:
    """Whether a command has steps, answers or evaluation batches of its own, or has commands that do."""
    return name == "quickstart" or (name in COMMANDS and _is_watched(name))


def _is_watched(name: str) -> bool:
    return any(key.partition(".")[0] == "watch" for key in COMMANDS[name].reads)


def run(arguments: Sequence[str], together: contextlib.ExitStack | None = None) -> int:
    """Run one command line and return its exit code.

    Args:
        arguments: of the command line.
        together: where this process leaves the others that it joined; by default at the end of this call.
    """
    name, *rest = arguments or ("",)
    if name in VERSION:
        print(version())
        return 0
    if name in ("", "help", *HELP, *HELPFULL):
        print(usage(name in HELPFULL))
        return 0 if name else EXIT_BAD_INPUT
    if name not in COMMANDS:
        print(f"panacea: unknown command {safe_line(name, RECORD)!r}; known are {', '.join(COMMANDS)}", file=sys.stderr)
        return EXIT_BAD_INPUT
    if any(a in (*HELP, *HELPFULL) for a in rest):
        print(command_help(name, any(a in HELPFULL for a in rest)))
        return 0
    # transformers advises to install PyTorch, which is not needed here.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    with contextlib.ExitStack() as stack:
        return _run_command(name, rest, together or stack)


def _run_command(name: str, arguments: Sequence[str], together: contextlib.ExitStack) -> int:
    import jax

    from panacea_jax import stores, workdir
    from panacea_jax.cli.parsing import parse_command
    from panacea_jax.parallel import processes
    from panacea_jax.train.signals import Diverged, Preempted

    _log_plainly()
    values = None
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
        with _watched(name, values, config), _one_voice(_folders(arguments)), stores.session():
            path = COMMANDS[name].run(values, config)
        processes.leave()
    except InputError as error:
        record = record_text(error) if values is not None and "show_records" in values and values.show_records else None
        return _fail(str(error) + (f": {safe_line(record, RECORD)}" if record is not None else ""), EXIT_BAD_INPUT)
    except GateNotMet as error:
        return _fail(str(error), EXIT_GATE)
    except KeyboardInterrupt:
        return _fail(
            "interrupted; the same command goes on from the last checkpoint", EXIT_INTERRUPTED
        )
    except Preempted as error:
        return _fail(f"{error}; start the same command again to go on", EXIT_PREEMPTED)
    except StoreFailed as error:
        return _fail(f"{error}; what was published stays: start the same command again to go on", EXIT_FAILED)
    except (Diverged, OutOfMemory) as error:
        return _fail(str(error), EXIT_FAILED)
    except BrokenPipeError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.ELOOP):  # only the user names such paths
            return _fail(f"{str(error.filename)[:RECORD]}: {error.strerror}", EXIT_BAD_INPUT)
        if full := no_space(error):
            file, reason = full
            where = file or next(iter(_written(arguments)), "the disk")
            return _fail(f"{where}: cannot be written ({reason}); make room and start the same command again", EXIT_FAILED)
        if gone := out_of_reach(error, _folders(arguments)):
            file, reason = gone
            line = f"{file or 'the disk'}: cannot be used any more ({reason}); put that right and start the same command again"
            return _fail(line, EXIT_FAILED)
        if asked := out_of_memory(error):
            line = f"{name}: out of memory while {asked}; smaller batches, more devices on config.mesh.fsdp or .tensor, or another machine"
            return _fail(f"{line}: `panacea plan` says what fits where", EXIT_FAILED)
        if isinstance(error, jax.errors.JaxRuntimeError):
            processes.wait_for_verdict()
        processes.leave(f"{type(error).__name__}: {error}")
        if processes.together():
            traceback.print_exc()
            processes.abandon(EXIT_FAILED)
        raise
    if path is not None and processes.first():
        shown = stores.by_address(path)
        print(shown if stores.is_address(shown) else os.path.relpath(path))
    return 0


def _interrupted(*_: object) -> None:
    """The first Ctrl-C ends the command by way of what it has open, such as a checkpoint that is being saved; the second leaves at once."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(EXIT_INTERRUPTED))
    raise KeyboardInterrupt


def _log_plainly() -> None:
    """Warnings and errors on stderr, as a line that begins with their level; nothing in them acts on a terminal, and no key is in them."""
    import logging

    import absl.logging
    from absl import flags

    from panacea_jax.stores import by_address

    class Safe(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            return safe_text(without_secrets(by_address(super().format(record))))

    flags.FLAGS.mark_as_parsed()  # ours are in a set of their own; absl's logging looks at the global one
    absl.logging.use_absl_handler()
    absl.logging.set_verbosity(absl.logging.WARNING)
    absl.logging.get_absl_handler().setFormatter(Safe("%(levelname)s: %(message)s"))


@contextlib.contextmanager
def _watched(name: str, values: "FlagValues", config: "ConfigDict") -> Iterator[None]:
    """A command that has steps, answers or evaluation batches is watched."""
    from panacea_jax.stores import is_address
    from panacea_jax.watchdog import watched

    if not _is_watched(name):
        yield
        return
    folder = Path(values.workdir) if values.workdir and not is_address(values.workdir) else None
    with watched(config.watch.stall, folder, config.watch.on_stall == "stop"):
        yield


@contextlib.contextmanager
def _one_voice(folders: Sequence[str]) -> Iterator[None]:
    """Threads of libraries that meet a full or lost disk leave it to the command to say so."""
    previous = threading.excepthook

    def hook(event: "threading.ExceptHookArgs") -> None:
        error = event.exc_value
        if error is None or not (no_space(error) or out_of_reach(error, folders)):
            previous(event)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = previous


def _folders(arguments: Sequence[str]) -> list[str]:
    """What the flags say that a command writes to."""
    return [flag.partition("=")[2] for flag in _written(arguments)]


def _written(arguments: Sequence[str]) -> list[str]:
    """The flags that say where a command writes, as --name=value."""
    joined = (f"{a}={value}" if re.fullmatch("--?(workdir|out)", a) else a for a, value in zip(arguments, [*arguments[1:], ""]))
    return [a for a in joined if re.match("--?(workdir|out)=", a)]


def _fail(message: str, code: int) -> int:
    from panacea_jax.parallel import processes
    from panacea_jax.stores import by_address

    print(f"panacea: {safe_text(without_secrets(by_address(message)))}", file=sys.stderr, flush=True)
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
