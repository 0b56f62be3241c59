"""Shapes and types checked in every test (jaxtyping, by beartype), compiled programs kept, and which tests run where and when."""

import fnmatch
import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile the same small programs over and over: all processes share them, also those of the next session. No limit of size: with
# one JAX reads the time of every kept program under a lock before it keeps another. ``make clean`` makes room.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Small programs compile for longer than they run, and each worker of pytest-xdist has one core. Without the fusion emitters, which go
# through MLIR, a step compiles in half the time.
os.environ.setdefault(
    "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_cpu_multi_thread_eigen=false --xla_cpu_use_fusion_emitters=false"
)
# Commands in processes of their own start once: large pages gain nothing at this size (test_cli.py has them).
os.environ.setdefault("GLIBC_TUNABLES", "")

from jaxtyping import install_import_hook  # noqa: E402 - the environment comes first

install_import_hook("panacea_jax", "beartype.beartype")

# Files that take longest, cold, on one core: first of all, so that no worker is left with one of them at the end.
LONGEST = (
    "parallel/test_processes.py", "generate/test_decode.py", "defences/test_vaccines.py", "models/test_fused.py", "stages/test_stacking.py",
    "defences/test_finetuning_oracle.py", "train/test_packing.py", "train/test_accumulate.py", "models/test_quantise.py",
    "defences/test_finetuning_runs.py", "defences/test_tar.py", "models/test_model.py", "defences/test_booster.py",
    "planning/test_plan.py", "test_launch.py", "parallel/test_sharding.py", "test_passes.py", "train/test_loop.py",
)  # fmt: skip


def slow_tests() -> list[tuple[str, bool]]:
    """Patterns of test names that ``make test`` leaves to ``make test-all``; False: that it does not, after all."""
    lines = (ROOT / "tests" / "slow.txt").read_text("utf-8").splitlines()
    patterns = (re.split(r"\s+# ", line)[0].strip() for line in lines if line and line[0] != "#")
    return [(name.removeprefix("!"), not name.startswith("!")) for name in patterns]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the slow ones, and begin with the longest files; pytest-xdist keeps a file together on one worker (loadfile)."""
    patterns, used = slow_tests(), set()
    order = {f"tests/{name}": place for place, name in enumerate(LONGEST)}
    files = {item.nodeid.partition("::")[0] for item in items}
    for item in items:
        found = [(name, slow) for name, slow in patterns if fnmatch.fnmatchcase(item.nodeid, name)]
        used.update(name for name, _ in found)
        if found and found[-1][1]:
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: order.get(item.nodeid.partition("::")[0], len(order)))
    gone = [name for name, _ in patterns if name not in used]
    if gone and len(files) > 80:  # the whole suite is there, not a choice on the command line
        raise pytest.UsageError(f"tests/slow.txt: {gone[0]} is the name of no test")
