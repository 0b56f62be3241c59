"""The first experiments that readers of the Panacea and Antidote papers ask for, each one command with a report at its end.

    panacea run --config=configs/experiments.py:rho_lambda --workdir=runs/rho_lambda

Variants, on miniature worlds (SEEDS of them) with the quickstart's base, alignment and fine-tuning (compare.py beside this file) at poison
ratio 0.1. What came out: docs/experiments.md.

    epochs            methods over 20 epochs; the checkpoints of one fine-tuning each are asked, nothing is trained twice
    rho_lambda        ρ × λ of Panacea as its paper varies them, and the quickstart's λ; noise of the same norms beside it
    layers            layer coefficients of Panacea's ε in three architectures
    mask_ratio        how much Antidote cuts
    masks             Antidote's Wanda scores against random and magnitude masks of as many entries
    learning_rates    learning rate × epochs of the attack against one setting of each method

The same on a base and data of one's own: --config.compare.world= with config.model, config.data and config.eval (docs/experiments.md).
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

from panacea_jax.errors import InputError

SEEDS = (80, 81, 82)
PANACEA = "panacea:rho=0.25,lam=0.2,final_epsilon=mean"
RHO, LAM = ("0.1", "0.5", "1", "2", "5"), ("1e-4", "1e-3", "1e-2", "0.2")
# A row of LoRA's B has rank = 8 entries: by eighths every kind of mask cuts equally many (defences/pruning.py).
EIGHTHS = (0.125, 0.25, 0.375, 0.5, 0.75)
PRUNING = ("antidote", "random_prune", "magnitude_prune")

METHODS = {
    # One of each stage with a curve, by the choices of docs/comparison_miniature.md.
    "epochs": (
        "vaccine:rho=5", "lisa:rho=10,alignment_steps=12,finetune_steps=108", "ldifs:rho=0.01", "vlguard:mode=sum,lam=10", PANACEA,
    ),
    "rho_lambda": (
        *(f"panacea:rho={rho},lam={lam},final_epsilon=mean" for rho in RHO for lam in LAM),
        *(f"random_perturbation:rho={rho}" for rho in RHO),
    ),
    "layers": (PANACEA,),
    "mask_ratio": tuple(f"antidote:dense_ratio={ratio}" for ratio in (0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)),
    "masks": tuple(f"{name}:dense_ratio={ratio}" for name in PRUNING for ratio in EIGHTHS),
    "learning_rates": ("vaccine:rho=5", "antidote:dense_ratio=0.25", "random_prune:dense_ratio=0.25", "realign:steps=50"),
}  # fmt: skip
VARY = {
    "layers": ("compare.world=miniature|miniature_qwen3|miniature_gemma",),
    "learning_rates": ("optimizer.learning_rate=2e-4|7e-4|2e-3", "train.epochs=5|10|20"),
}
# Records of an epoch, 12 steps: 20 of them are half the quickstart's steps.
EPOCH = {"epochs": 120, "learning_rates": 120}


def get_config(variant: str = "rho_lambda") -> ConfigDict:
    """The recipe of one variant.

    Raises:
        InputError: another variant.
    """
    if variant not in METHODS:
        raise InputError(f"--config: unknown variant {variant!r}; known are {', '.join(METHODS)}")
    config: ConfigDict = runpy.run_path(str(Path(__file__).with_name("compare.py")))["get_config"]("miniature")
    config.compare.grid, config.compare.development = (), ()
    config.compare.seeds, config.compare.ratios = SEEDS, (0.1,)
    config.compare.methods, config.compare.vary = METHODS[variant], VARY.get(variant, ())
    if variant in EPOCH:
        config.data.num_examples, config.train.steps, config.train.epochs = EPOCH[variant], 0, 20
    if variant == "epochs":
        config.eval.every = -1
    return config
