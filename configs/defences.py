"""Each method at the budget of its paper's or some repository's scripts, on Llama-2-7B and GSM8K: one variant a row of BUDGETS.

    panacea run --config=configs/defences.py:booster-5k --workdir=runs/booster-5k --config.data.alignment=refusals@refusals.jsonl

Where scripts disagree there is a variant for each, named after what differs or after the repository. Numbers are those of the public
scripts (Vaccine, T-Vaccine, Booster, Antidote, Lisa and Panacea repositories of git-disl and w-yibo, and the official RepNoise and TAR
ones). Base, data and evaluation are those of paper.py beside this file; the alignment stage is plain SFT unless the method acts there.

Safe LoRA, SafeMERGE, RESTA and AsFT compare with the hub base MODEL, which the alignment stage starts from: with another
`config.model.path` give `--config.heal.defence.base` (AsFT: `--config.defence.base`) too. Realignment takes its benign rows from the
public Alpaca set; its refusals are the alignment set.

What a variant does not reproduce:

* LoRA dropout 0.1 where a script has it (`--config.lora.dropout`), and the repositories' own records (see paper.py), which the official
  RepNoise, in pairs, cannot do without.
* Another adapter form in fine-tuning than in alignment, since a run has one. Vaccine and T-Vaccine align at α 4 and fine-tune at α 1: here
  α 4. Lisa aligns at rank 16 on seven projections and fine-tunes at rank 8 on q and v: here the latter.
* Another number of alignment records for alignment than for Lisa's guide set, 10000, or EWC's Fisher pass: `config.data.num_alignment`
  counts for both. Other lengths for one stage than for the other: `config.data.max_length` counts for both, so T-Vaccine's RepNoise has 200
  tokens in place of 100. Lisa's and Antidote's lengths, which differ from script to script.
* The three learning rates that TAR's adversary draws from (2e-5 here, the middle one), its schedule-free optimizer and its warm-up.
* RepNoise's masks, which are mended; `--config.align.defence.masks=code` takes the code's where padding has id 0.
* Antidote's RepNoise scores the last layer alone, without the + 1: here it has the official L_adv. T-Vaccine's TAR, which trains as SFT
  does. Antidote's rebuttal of Lisa on GSM8K, which is `lisa-antidote` with ρ 0.1, learning rate 1e-3 and no poison. VLGuard's mixing in
  Lisa's and Antidote's repositories, where the guide records take the place of benign ones. KL over positions in place of words.
* SBR's 4-bit base, 8-bit AdamW and chat model. Constrained SFT's ten steps of warm-up (a share of all steps here) and its chat models.
* Triplet's base, Llama 3 8B Instruct, which is aligned (here `refusal=1` teaches refusals beside it), its sets, WildGuardMix,
  WildJailbreak and UltraChat, and dropout 0.05. Safe Delta's base, Llama 2 Chat, its full fine-tuning, and 128 safe records, which
  `config.data.num_alignment=128` would take for the alignment stage too.
* AsFT's schedule, a step of 0.85 after each epoch, and LoRA dropout 0.05 (`--config.lora.dropout`). LoX, RESTA and SafeMERGE on another
  pair of models than the base and what the alignment stage makes of it: their papers have a chat model or DPO.
* Random perturbation by σ: no script sets it. `--config.heal.defence.sigma=…` does.

Whether the alignment adapter is trained on or merged is the same for all, so that runs differ in the defence alone; the scripts' own
choice, which differs, is `config.lora.policy`.

The variants of VLGuard, SafeGrad and BDS have no alignment stage, since their safe set is smaller than the alignment set and
`config.data.num_alignment` counts for both: name an aligned adapter, `--config.lora.init_from=runs/sft/align/adapter` (`vlguard-mix`: one
aligned at Vaccine's setting, such as `runs/ewc/align/adapter`; `safegrad`: one of rank 8).

For methods side by side under one budget see compare.py.
"""

import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from panacea_jax.config import defence_section
from panacea_jax.defences.spec import parse_stack
from panacea_jax.errors import InputError

MODEL = "meta-llama/Llama-2-7b-hf"
SEVEN = ("q", "k", "v", "o", "gate", "up", "down")
BENIGN = "alpaca@tatsu-lab/alpaca:train"
UNALIGNED: dict[str, Any] = {"heal.defence.base": MODEL}

# data.num_alignment counts for the alignment stage too, so a smaller safe set needs an alignment that was made before.
ALIGNED_BEFORE: dict[str, Any] = {"align.defence.name": ""}
# Alignment batches as large as the user's.
AS_LARGE: dict[str, Any] = {"train.alignment_batch_size": 10}
# Alignments: 20 epochs at a constant 5e-4 are the default.
COSINE = {"align.optimizer.learning_rate": 1e-3, "align.optimizer.schedule": "cosine"}
VACCINE_REPO = {
    **COSINE, "data.num_alignment": 2000, "align.train.epochs": 50, "align.train.batch_size": 5, "data.max_length": 200,
    "lora.rank": 8, "lora.targets": SEVEN, "optimizer.learning_rate": 1e-5, "optimizer.schedule": "cosine", "train.batch_size": 5,
}  # fmt: skip
T_VACCINE_REPO = VACCINE_REPO | {"align.train.epochs": 20, "align.train.batch_size": 10, "train.batch_size": 10, "data.num_harmful": 200,
                                 "align.train.harmful_batch_size": 1}  # fmt: skip
BOOSTER_REPO = {"data.num_harmful": 5000, "optimizer.learning_rate": 1e-5}
REPNOISE_COPY = {"align.train.batch_size": 5, "align.train.harmful_batch_size": 5}
ANTIDOTE_REPO = {
    **COSINE, "align.train.batch_size": 5, "lora.rank": 256, "data.num_examples": 5000, "data.poison_ratio": 0.2, "data.num_harmful": 2000,
    "optimizer.learning_rate": 1e-4, "train.batch_size": 5,
}  # fmt: skip
LISA_REPO = {
    "lora.rank": 8, "lora.targets": ("q", "v"), "data.num_examples": 5000, "data.num_alignment": 10000, "optimizer.learning_rate": 1e-5,
    "optimizer.weight_decay": 0.0, "train.batch_size": 5, "train.alignment_batch_size": 5,
}  # fmt: skip
TRIPLET_REPO = {
    "align.train.steps": 900, "align.train.batch_size": 16, "align.train.harmful_batch_size": 16, "align.optimizer.learning_rate": 1e-4,
    "align.optimizer.weight_decay": 0.0, "lora.rank": 16, "lora.alpha": 16.0, "lora.targets": SEVEN, "data.benign": BENIGN,
}  # fmt: skip
# StepLR by 0.85 an epoch is not here.
ASFT_REPO = {
    "defence.base": MODEL, "lora.rank": 8, "lora.alpha": 32.0, "lora.targets": ("q", "v"), "optimizer.learning_rate": 5e-5,
    "optimizer.weight_decay": 0.0, "train.epochs": 10, "train.batch_size": 8,
}  # fmt: skip

BUDGETS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "sft": ("sft", {}),
    # Alignment stage.
    "vaccine-2k": ("vaccine:rho=2", VACCINE_REPO),  # Vaccine repository
    "vaccine-5k": ("vaccine:rho=5", {"optimizer.learning_rate": 1e-5}),  # Booster repository
    "vaccine-5k-panacea": ("vaccine:rho=20", {}),  # Panacea repository
    "random_vaccine": ("random_vaccine:rho=2", VACCINE_REPO),
    "t_vaccine": ("t_vaccine:rho=3,layers=8,interval=20,importance_interval=200", T_VACCINE_REPO),
    "booster-1k": ("booster:lam=100,alpha=0.01", {}),  # Panacea repository
    "booster-5k": ("booster:lam=5,alpha=0.1", BOOSTER_REPO),  # Booster repository
    "booster_vaccine-5k": ("booster_vaccine:lam=5,alpha=0.1,rho=5", BOOSTER_REPO),
    "repnoise": (
        "repnoise:alpha=1,beta=0.001",  # official: all weights, one epoch of 1000 pairs
        {"data.num_alignment": 1000, "align.train.full_parameters": True, "train.full_parameters": True, "align.train.epochs": 1,
         "align.train.batch_size": 4, "align.train.harmful_batch_size": 4, "align.optimizer.learning_rate": 1e-4,
         "align.optimizer.schedule": "cosine"},
    ),
    "repnoise-panacea": ("repnoise:alpha=0.02,beta=0.1,paired=False", REPNOISE_COPY),
    "repnoise-booster": ("repnoise:alpha=0.1,beta=0.001,paired=False", REPNOISE_COPY | BOOSTER_REPO),
    "repnoise-antidote": ("repnoise:alpha=0.1,beta=0.001,paired=False", ANTIDOTE_REPO | REPNOISE_COPY),
    "repnoise-t_vaccine": (
        "repnoise:alpha=0.1,beta=0.001,paired=False",
        T_VACCINE_REPO | {"align.train.batch_size": 8, "align.train.harmful_batch_size": 8},
    ),
    "tar": (
        "tar:inner_steps=64,inner_every=4,inner_learning_rate=2e-5,tamper_weight=4",
        {"align.train.full_parameters": True, "train.full_parameters": True, "align.train.steps": 750, "align.train.batch_size": 8,
         "align.train.harmful_batch_size": 4, "align.optimizer.learning_rate": 2e-5},
    ),
    # Fine-tuning stage.
    "panacea": ("panacea:rho=1,lam=0.001", {}),
    "lisa": ("lisa:rho=1,alignment_steps=100,finetune_steps=900", LISA_REPO),
    "lisa-booster": (
        "lisa:rho=0.01,alignment_steps=100,finetune_steps=900",
        BOOSTER_REPO | {"data.num_alignment": 10000, "train.alignment_batch_size": 10},
    ),
    "lisa-antidote": (
        "lisa:rho=1,alignment_steps=100,finetune_steps=900",
        ANTIDOTE_REPO | {"data.num_alignment": 10000, "train.alignment_batch_size": 5},
    ),
    "ldifs-booster": ("ldifs:rho=0.0001", BOOSTER_REPO | {"train.batch_size": 5}),
    "ldifs-antidote": ("ldifs:rho=0.0001", ANTIDOTE_REPO),
    "ewc": ("ewc:lam=1000000000", VACCINE_REPO),  # Vaccine repository
    "kl": ("kl:lam=0.1", VACCINE_REPO),
    "vlguard-mix": ("vlguard:mode=mix", VACCINE_REPO | {"data.num_alignment": 100} | ALIGNED_BEFORE),
    "vlguard-sum": ("vlguard:mode=sum,lam=0.1", {"data.num_alignment": 2000} | ALIGNED_BEFORE),  # Panacea repository
    "sbr": (  # its repository: Llama-3.1-8B-Instruct, whose alignment it has for nothing
        "sbr:lam=50,prompts=8",
        {"lora.rank": 16, "lora.alpha": 16.0, "lora.rslora": True, "lora.targets": SEVEN, "optimizer.learning_rate": 1e-5,
         "optimizer.schedule": "linear", "optimizer.warmup_ratio": 0.0, "optimizer.weight_decay": 0.0, "train.batch_size": 32,
         "data.max_length": 512},
    ),
    "constrained_sft": (  # its repository: all weights, its utility sets' three epochs
        "constrained_sft:beta=0.1,first_factor=5,early_factor=20,early_tokens=5",
        {"align.train.full_parameters": True, "train.full_parameters": True, "optimizer.schedule": "linear", "optimizer.b1": 0.5,
         "optimizer.weight_decay": 0.0, "train.batch_size": 64, "train.epochs": 3, "data.max_length": 512},
    ),
    # By public re-implementations: 100 alignment records, rank 8 at α 16 on q, k, v.
    "safegrad": ("safegrad:rho=1", {"data.num_alignment": 100, "lora.rank": 8, "lora.alpha": 16.0, **AS_LARGE} | ALIGNED_BEFORE),
    # Its repository, which also aligns nothing beforehand.
    "bds": (
        "bds:logit_rate=0.005",
        {"data.num_alignment": 1000, "optimizer.learning_rate": 1e-5, "optimizer.b2": 0.95, **AS_LARGE} | ALIGNED_BEFORE,
    ),
    # After fine-tuning.
    "antidote": ("antidote:dense_ratio=0.1", ANTIDOTE_REPO),
    "antidote-gsm8k": ("antidote:dense_ratio=0.05", ANTIDOTE_REPO),
    "random_prune": ("random_prune:dense_ratio=0.05", ANTIDOTE_REPO),
    "magnitude_prune": ("magnitude_prune:dense_ratio=0.05", ANTIDOTE_REPO),
    "random_perturbation": ("random_perturbation:rho=1", {}),  # Panacea's norm
    "ascent": ("ascent:rho=1", {}),  # likewise
    "safelora-number": ("safelora:select=number,num_layers=10", UNALIGNED),
    "safelora-threshold": ("safelora:select=threshold,threshold=0.5", UNALIGNED),
    "realign": ("realign:steps=100", {"data.benign": BENIGN}),
    # Representations and weights, of 2025.
    "triplet": ("triplet:refusal=1", TRIPLET_REPO),  # its script's numbers; on a base that is not aligned
    "safe_delta": ("safe_delta:budget=0.1", {}),
    # What alignment changed, by the weights before it: repositories of AsFT and LoX, SafeMERGE's defaults; RESTA as the plain sum.
    "asft": ("asft:lam=1", ASFT_REPO),
    "lox": ("lox:k=6,alpha=1.25", {}),
    "resta": ("resta:gamma=1", UNALIGNED),
    "safemerge": ("safemerge:threshold=0.35,weight=0.2", UNALIGNED),
}  # fmt: skip


def get_config(variant: str = "panacea") -> ConfigDict:
    """The recipe of one variant, a key of BUDGETS.

    Raises:
        InputError: another variant.
    """
    if variant not in BUDGETS:
        raise InputError(f"--config: unknown variant {variant!r}; known are {', '.join(BUDGETS)}")
    text, changes = BUDGETS[variant]
    stack = parse_stack(text, "--config")
    # Recipes are loaded by path, so that nothing of this folder can be imported by name.
    paper = runpy.run_path(str(Path(__file__).with_name("paper.py")))
    config: ConfigDict = paper["protocol"](MODEL, "gsm8k")
    with config.unlocked():
        config.align.defence.name, config.defence.name = "sft", "sft"
        if stack.align:
            config.align.defence = defence_section(stack.align)
        if stack.finetune:
            config.defence = defence_section(stack.finetune)
        if stack.heal:
            config.heal.defence = defence_section(stack.heal)
    config.update_from_flattened_dict(dict(changes))
    return config
