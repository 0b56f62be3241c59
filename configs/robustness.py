"""How long a defence holds, against whom: attacks and sets of data varied, the worst case beside each. What it does: docs/robustness.md.

    panacea run --config=configs/robustness.py:sweep --workdir=runs/sweep

Variants on miniature worlds, SEEDS of them, with the quickstart's base, alignment and fine-tuning (compare.py beside this file), one
fine-tuning of 480 steps a cell unless said otherwise:

    sweep      the attacker's learning rate × steps × rank: 12 settings, fine-tuning a fresh adapter on the merged aligned model
    ratios     poison ratios 0 to 0.5
    harmful    10 to 400 harmful records of the defender
    later      further fine-tuning of what each method left, 10 to 300 steps, on benign records and on harmful ones alone
    unlearn    an ε̂ of the attacker's subtracted, or noise of the same norm added, at three norms

and on Llama-2-7B by the paper's protocol (its cost: compare.py:llama2_7b)

    shift      the defender knows some categories of BeaverTails, the attack is of the others

Other methods: --config.compare.methods. A base and data of one's own: --config.compare.world= with config.model.path and config.data.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

from panacea_jax.errors import InputError

SEEDS = (70, 71, 72)
METHODS = ("panacea:rho=auto,final_epsilon=mean", "realign:steps=50")

# Half of the categories of the set that the paper takes its harmful records from.
KNOWN = "animal_abuse+drug_abuse+financial_crime+hate_speech+privacy_violation+self_harm+terrorism"

VARY = {
    "sweep": ("optimizer.learning_rate=2e-4|7e-4|2e-3", "train.steps=120|480", "lora.rank=4|16"),
    "ratios": (),
    "harmful": ("data.num_harmful=10|30|100|400",),
    "later": ("after.poison_ratio=0|1", "after.steps=0|10|30|100|300"),
    "unlearn": (
        "after.attack=sft|unlearn:rho=0.25|unlearn:rho=0.5|unlearn:rho=1"
        "|random_perturbation:rho=0.25|random_perturbation:rho=0.5|random_perturbation:rho=1",
    ),
}


def get_config(variant: str = "sweep") -> ConfigDict:
    """The recipe of one variant.

    Raises:
        InputError: another variant.
    """
    if variant not in (*VARY, "shift"):
        raise InputError(f"--config: unknown variant {variant!r}; known are {', '.join(VARY)}, shift")
    compare = runpy.run_path(str(Path(__file__).with_name("compare.py")))["get_config"]
    config: ConfigDict = compare("llama2_7b" if variant == "shift" else "miniature")
    config.compare.methods, config.compare.grid = METHODS, ()
    config.compare.development, config.compare.ratios = (), (0.1,)
    if variant == "shift":
        known, whole = (f"beavertails{part}@{_where(config.data.harmful)}" for part in (f":only={KNOWN}", ""))
        config.compare.methods = ("panacea", "antidote:dense_ratio=0.05")
        config.compare.vary = (f"data.harmful={known}|{whole}",)
        config.data.attack = f"beavertails:not={KNOWN}@{_where(config.data.attack)}"
        return config
    config.compare.seeds, config.compare.vary = SEEDS, VARY[variant]
    if variant == "sweep":
        config.lora.policy = "merged"
    if variant == "ratios":
        config.compare.ratios = (0.0, 0.1, 0.2, 0.3, 0.5)
    return config


def _where(source: str) -> str:
    return source.partition("@")[2]
