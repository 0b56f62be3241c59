"""Every defence under equal conditions: methods × seeds × poison ratios, one table. How it works: docs/comparison.md.

    panacea run --config=configs/compare.py --workdir=runs/compare             # the miniature world
    panacea run --config=configs/compare.py:smoke --workdir=runs/smoke         # two methods, a few steps
    panacea run --config=configs/compare.py:llama2_7b --workdir=runs/llama2_7b-compare \\
        --config.data.alignment=refusals@refusals.jsonl --config.data.benign=alpaca@tatsu-lab/alpaca:train

miniature
    The quickstart's base, alignment and fine-tuning for every method; only the defence differs. Of each method four candidates, listed in
    GRID, around its paper's and its repository's values; one is chosen on the worlds DEVELOPMENT by the rule of docs/comparison.md and
    reported on the worlds SEEDS at poison ratios 0, 0.1 and 0.3. The candidates of Panacea stand around what docs/quickstart.md found by
    hand on other worlds, which no other method had; `--config.compare.grid=()` and `--config.compare.methods` compare anything else.
    Cost: 4 candidates × methods + 15 cells × methods, each a fine-tuning of 480 steps on a base of 0.7 M weights.
    One method: --config.compare.grid="('panacea:rho=0.1|0.25|0.5|1,lam=0.2',)"

smoke
    A tiny world that learns next to nothing: to see the command work.

llama2_7b
    The hyper-parameters of the papers and repositories, nothing chosen, on Panacea's protocol (paper.py beside this file): GSM8K, ratios
    0, 0.1, 0.3, one seed. All but the defence is Panacea's for every method, so none but Panacea is at its own scripts' setting, which
    defences.py beside this file has. What differs most: T-Vaccine looks at 10 harmful records of 1000 for its importance, not at 1 of
    200; Lisa's guide set is the 5000 refusals in batches of 4, not 10000 records; Antidote and the prunings cut rank 32, not 256; RepNoise
    is Booster's copy, on LoRA and unpaired; the learning rates and epochs of the alignments. TAR is left out: its step has 81 passes, and
    here are 10000 steps. Cost by the arithmetic of paper.py: fine-tuning 1.4e17 FLOPs a pass and cell, alignment 6.8e17 a pass.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

from panacea_jax.config import get_config as defaults
from panacea_jax.errors import InputError

SEEDS, DEVELOPMENT = (60, 61, 62, 63, 64), (50,)
RATIOS = (0.0, 0.1, 0.3)

# Four candidates of each. The miniature has 4 layers and 480 steps, which T-Vaccine's S and Lisa's K1 and K2 follow.
GRID = (
    "vaccine:rho=0.5|2|5|20",
    "random_vaccine:rho=0.001|0.01|0.1|2",
    "t_vaccine:rho=0.5|3|5|20,layers=2",
    "booster:lam=5|100,alpha=0.01|0.1",
    "booster_vaccine:lam=5|100,alpha=0.01|0.1,rho=5",
    "repnoise:alpha=0.1|1,beta=0.001|0.1,paired=False",
    "tar:inner_steps=8,inner_every=4,inner_learning_rate=0.0007|0.002,tamper_weight=1|4",
    "panacea:rho=0.1|0.25|0.5|1,lam=0.2,final_epsilon=mean",
    "lisa:rho=0.01|0.1|1|10,alignment_steps=24,finetune_steps=216",
    "ldifs:rho=0.0001|0.001|0.01|0.1",
    "ewc:lam=1000|100000|10000000|1000000000",
    "kl:lam=0.01|0.1|1|10",
    "vlguard:mode=sum,lam=0.01|0.1|1|10",
    "sbr:lam=5|50|500|5000,prompts=8",
    "constrained_sft:beta=0.03|0.1|0.3|1",
    "safegrad:rho=0.1|1|10|100",
    "bds:logit_rate=0.005|0.02|0.1|0.5",
    "antidote:dense_ratio=0.01|0.05|0.1|0.2",
    "random_prune:dense_ratio=0.01|0.05|0.1|0.2",
    "magnitude_prune:dense_ratio=0.01|0.05|0.1|0.2",
    "ascent:rho=0.1|0.25|0.5|1",
    "random_perturbation:rho=0.25|1|2|4",
    "safelora:select=threshold,threshold=0.25|0.5|0.75|1",
    "realign:steps=25|50|100|200",
    "triplet:refusal=1,alpha=0.05|0.5,lam=0.07|0.7",
    "safe_delta:budget=0.01|0.1|1|10",
    # What alignment changed, by the weights before it.
    "asft:lam=0.01|0.1|1|10",
    "lox:k=2|6,alpha=0.5|1.25",
    "resta:gamma=0.25|0.5|1|2",
    "safemerge:threshold=0.25|0.5|0.75|1",
)

# Hyper-parameters of the papers and repositories.
PUBLISHED = (
    "vaccine:rho=5", "random_vaccine:rho=2", "t_vaccine", "booster", "booster_vaccine:rho=5", "repnoise:alpha=0.1,paired=False", "panacea",
    "lisa:rho=0.01", "ldifs", "ewc", "kl", "vlguard:mode=sum", "sbr", "constrained_sft", "antidote:dense_ratio=0.05",
    "random_prune:dense_ratio=0.05", "magnitude_prune:dense_ratio=0.05", "random_perturbation", "safelora", "realign",
    "triplet:refusal=1", "safe_delta",
    "asft", "lox", "resta", "safemerge",
    "safegrad", "bds",
)  # fmt: skip


def get_config(variant: str = "miniature") -> ConfigDict:
    """The recipe of one variant: miniature, smoke or llama2_7b.

    Raises:
        InputError: another variant.
    """
    if variant == "llama2_7b":
        config = _published()
    elif variant in ("miniature", "smoke"):
        config = _miniature()
    else:
        raise InputError(
            f"--config: unknown variant {variant!r}; known are miniature, smoke, llama2_7b"
        )
    if variant == "smoke":
        config.compare.world, config.compare.grid, config.compare.development = "tiny", (), ()
        config.compare.methods = ("panacea:rho=0.25,lam=0.2", "random_perturbation:rho=0.5")
        config.compare.seeds, config.compare.ratios = (0,), (0.1, 0.3)
        config.data.num_examples = 40
        config.train.steps = config.align.train.steps = 3
        config.train.log_every = config.align.train.log_every = 1
    return config


def _miniature() -> ConfigDict:
    """The quickstart's numbers, see panacea_jax/stages/quickstart.py."""
    config = defaults()
    config.compare.world = "miniature"
    config.compare.grid, config.compare.development = GRID, DEVELOPMENT
    config.compare.seeds, config.compare.ratios = SEEDS, RATIOS
    config.lora.rank, config.lora.alpha = 8, 4.0
    config.data.num_examples, config.data.num_harmful, config.data.num_alignment = 1000, 0, 0
    config.align.defence.name = "sft"
    config.align.train.steps, config.align.train.batch_size = 300, 20
    config.align.optimizer.learning_rate = 2e-3
    config.train.steps = 480
    for stage in (config, config.heal):
        stage.optimizer.learning_rate = 7e-4
        stage.optimizer.schedule, stage.optimizer.warmup_ratio = "linear", 0.05
    for stage in (config, config.align, config.heal):
        stage.train.log_every = 20
    config.checkpoint.every, config.checkpoint.keep = 0, 1
    return config


def _published() -> ConfigDict:
    paper = runpy.run_path(str(Path(__file__).with_name("paper.py")))
    config: ConfigDict = paper["protocol"]("meta-llama/Llama-2-7b-hf", "gsm8k")
    config.align.defence.name = "sft"
    config.compare.methods, config.compare.ratios = PUBLISHED, RATIOS
    return config
