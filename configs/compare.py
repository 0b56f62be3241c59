"""Every defence under equal conditions: methods × seeds × poison ratios, one table.

    panacea run --config=configs/compare.py --workdir=runs/compare
"""

from ml_collections import ConfigDict

from panacea_jax.config import get_config as defaults


def get_config(variant: str = "miniature") -> ConfigDict:
    config = defaults()
    if variant == "smoke":
        config.compare.world = "tiny"
        config.compare.methods = ("sft", "panacea:rho=0.25,lam=0.2")
        config.compare.seeds = (0,1)
        config.align.defence.name = "sft"
        config.align.train.steps = 3
        config.train.steps = 3
        config.train.log_every = 1
        config.align.train.log_every = 1
        config.data.num_examples = 40
        config.data.num_harmful = 0
        config.data.num_alignment = 0
    return config
