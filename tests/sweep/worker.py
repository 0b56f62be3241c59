"""A sweep whose runs cost nothing, as a process of its own: ``python -m tests.sweep.worker WORKDIR SECONDS FLAG=VALUE …``.

Each run writes what it does into WORKDIR/log: "begin NAME PID" and "end NAME PID".
"""

import os
import sys
import time
from pathlib import Path

from panacea_jax.config import get_config
from panacea_jax.sweep.run import sweep

SIXTY = ("defence.rho=0.1,0.5,1,2,5", "defence.lam=1e-4..1e-2:log3", "seed=0..3")


def settings(**sweep_keys):
    """A configuration whose sources are never opened."""
    config = get_config()
    config.model.path = "a_base"
    config.data.user, config.data.harmful = "pairs@user.jsonl", "pairs@harmful.jsonl"
    config.eval.tasks = ("advbench@goals.jsonl", "pairs@test.jsonl")
    config.sweep.over = SIXTY
    for key, value in sweep_keys.items():
        config.sweep[key] = value
    return config


def figures(config):
    """HS falls and FA falls with ρ, so no run beats all others; a seed moves both."""
    hs = 90.0 / (1 + config.defence.rho) + config.seed
    fa = 60.0 - 8 * config.defence.rho - 1000 * config.defence.lam - config.seed
    return {"hs": {"value": hs, "ci95": [hs - 5, hs + 5]}, "fa": {"value": fa, "ci95": [fa - 5, fa + 5]}}


def recorded(log, seconds=0.0):
    """A runner that notes what it does."""

    def run(config, folder):
        for word in ("begin", "end"):
            with log.open("a") as file:
                file.write(f"{word} {folder.name} {os.getpid()}\n")
            time.sleep(seconds * (word == "begin"))
        return {"figures": figures(config), "passes": 30.0, "step_seconds": 1.0, "step_bytes": 2**20}

    return run


if __name__ == "__main__":
    place, wait = Path(sys.argv[1]), float(sys.argv[2])
    keys = dict(argument.split("=") for argument in sys.argv[3:])
    if "trials" in keys:
        keys["trials"], keys["over"] = int(keys["trials"]), ("defence.rho=0.1..5:log", "defence.lam=1e-4,1e-3,1e-2")
    place.mkdir(exist_ok=True)
    (place / f"ready.{os.getpid()}").touch()
    while (place / "hold").exists():  # until all are here, however long their imports take
        time.sleep(0.01)
    sweep(settings(**keys), place, runner=recorded(place / "log", wait))
