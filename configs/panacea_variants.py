"""Panacea's options side by side in miniature worlds, one question a variant; see docs/defences.md, "Panacea's options".

    panacea run --config=configs/panacea_variants.py:layers --workdir=runs/panacea-layers

layers
    One radius a layer by each rule, at one total, and each rule's control: the same radii in another order.
auto
    λ and ρ by what is measured, and each of its four pieces alone, at a learning rate that does not fall, where ρ 0.25 and λ 0.2 run away.
cheap
    Fewer harmful passes: at every second or fourth step, and in the last half or quarter of training only.
trusted
    Trusted rows at w + ε, and ε off the task's and the benign gradient.

All on the miniature of compare.py beside this file: worlds 60 to 64, poison ratios 0, 0.1 and 0.3, a fine-tuning of 480 steps on a base of
0.7 M weights a cell. Nothing is chosen. Other worlds: --config.compare.seeds="(0,1)".
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

from panacea_jax.errors import InputError

PLAIN = "panacea:rho=0.25,lam=0.2,final_epsilon=mean"
LAST = "panacea:rho=0.25,lam=0.2"  # ε of the last batch, since ε off the task's gradient is one of a step

METHODS: dict[str, tuple[str, ...]] = {
    "layers": (
        PLAIN, f"{PLAIN},rho_per_layer=uniform",
        *(f"{PLAIN},rho_per_layer={rule}{seed}" for rule in ("proportional", "inverse", "top:2") for seed in ("", ",layer_seed=1")),
    ),
    "auto": (
        PLAIN, "panacea:rho=auto,final_epsilon=mean", f"{PLAIN},tau=0.5", f"{PLAIN},rho_relative=0.1", f"{PLAIN},ceiling=1",
        "panacea:rho=0.25,lam=2,by_poison=True,final_epsilon=mean",
    ),
    "cheap": (
        PLAIN, f"{PLAIN},every=2", f"{PLAIN},every=4", f"{PLAIN},every=2,between=skip", f"{PLAIN},every=4,between=skip",
        f"{PLAIN},start=0.5", f"{PLAIN},start=0.75", f"{PLAIN},start=0.5,every=2",
    ),
    "trusted": (
        PLAIN, f"{PLAIN},trusted=('benign',)", f"{PLAIN},trusted=('alignment',)", f"{PLAIN},trusted=('benign','alignment')",
        f"{PLAIN},off=('benign',)", LAST, f"{LAST},off=('user',)", f"{LAST},off=('user','benign')",
    ),
}  # fmt: skip


def get_config(variant: str = "layers") -> ConfigDict:
    """The recipe of one variant, a key of METHODS.

    Raises:
        InputError: another variant.
    """
    if variant not in METHODS:
        raise InputError(f"--config: unknown variant {variant!r}; known are {', '.join(METHODS)}")
    compare = runpy.run_path(str(Path(__file__).with_name("compare.py")))
    config: ConfigDict = compare["get_config"]("miniature")
    config.compare.grid, config.compare.development = (), ()
    config.compare.methods = METHODS[variant]
    if variant == "auto":
        config.optimizer.schedule = "constant"
    return config
