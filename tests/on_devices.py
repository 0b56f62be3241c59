"""Run modules of the tests on fake devices, whose number is fixed when JAX starts: in a child that serves all that ask for as many."""

import contextlib
import functools
import io
import json
import os
import runpy
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def on_devices(module: str, *arguments: object, count: int = 8, light: bool = True) -> Any:
    """What ``python -m module arguments…`` prints last, which is JSON, on so many devices; not ``light``: compiled as for use."""
    child = _child(count, light)
    assert child.stdin is not None and child.stdout is not None
    child.stdin.write(json.dumps([module, *map(str, arguments)]) + "\n")
    child.stdin.flush()
    answer = child.stdout.readline()
    assert answer, f"the child with {count} devices is gone"
    found = json.loads(answer)
    assert "failed" not in found, found["failed"]
    return json.loads(found["said"].splitlines()[-1])


def xla_flags(count: int, light: bool = True) -> str:
    """``XLA_FLAGS`` of a process with so many fake devices, which compiles as lightly as this one, or as for use."""
    return f"{os.environ.get('XLA_FLAGS', '') if light else ''} --xla_force_host_platform_device_count={count}"


@functools.cache
def _child(count: int, light: bool) -> "subprocess.Popen[str]":
    """Lives as long as this process; its input then ends, and so does it."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.on_devices"],
        cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(count, light)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def _serve() -> None:
    """Run one module after the other; what one of them sets for itself is taken back."""
    import jax

    from panacea_jax.parallel import sharding

    answers, split_from = os.fdopen(os.dup(1), "w"), sharding.ADAPTER_SPLIT_FROM
    os.dup2(2, 1)  # whatever else is printed goes where errors go
    for line in sys.stdin:
        module, *sys.argv[1:] = json.loads(line)
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said):
                runpy.run_module(module, run_name="__main__")
            found = {"said": said.getvalue()}
        except BaseException:
            found = {"failed": traceback.format_exc()}
        jax.config.update("jax_enable_x64", False)
        sharding.ADAPTER_SPLIT_FROM = split_from
        answers.write(json.dumps(found) + "\n")
        answers.flush()


if __name__ == "__main__":
    _serve()
