"""The command line: ``panacea <command> --config=FILE[:variant] --config.a.b=value --workdir=DIR``.

Parses and dispatches, nothing else. Exit codes: 0 done, 1 failed, 2 bad input (one line says what), 3 a gate is not met, 75 preempted and
saved: start the same command again, 130 interrupted. Nothing here imports JAX before a command runs.
"""

from panacea_jax.cli.commands import COMMANDS
from panacea_jax.cli.dispatch import main, run

__all__ = ["COMMANDS", "main", "run"]
