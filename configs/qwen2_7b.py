"""Panacea on Qwen2-7B: fine-tuning on a user set with 10 % harmful records, then w + ε.

Paper: arXiv 2501.18100 (NeurIPS 2025). Data, protocol, how to align first and what differs from the
paper: paper.py beside this file.

Command (variants gsm8k, sst2, agnews, alpaca; weights: not gated):

    panacea run --config=configs/qwen2_7b.py:gsm8k --workdir=runs/qwen2_7b-gsm8k \\
        --config.data.alignment=refusals@refusals.jsonl --config.align.defence.name=sft

The same without defence: add --config.defence.name=sft and name another --workdir.

Expected figures (as published, not measured by us): No figures for Qwen2-7B could be read; the
paper's abstract (v2) says that over ratios, tasks and models the average HS falls by up to 21.2 %
while FA is kept.

Cost (estimate, arithmetic in paper.py): N = 7.07e9. Fine-tuning 2000 · 3 · 4 N · 2560 = 4.3e17
FLOPs, alignment 10000 · 4 N · 2560 = 7.2e17; with remat and at an assumed 40 % of one H100's peak
(989e12 FLOP/s) 0.5 h and 0.8 h, decoding not counted.

Hardware (estimate): 15.2 GB of bfloat16 weights, cut over the devices; on every device 0.06 GB for
the float32 adapter (13.8 M) and as much for each of AdamW's two moments, ε, its mean and three
gradients; for ten rows of 256 tokens 0.5 GB of layer inputs and 1.6 GB for each float32 copy of the
logits, of which the loss holds two or three. `panacea doctor` makes the table for the machine at
hand.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

MODEL = "Qwen/Qwen2-7B"


def get_config(variant: str = "gsm8k") -> ConfigDict:
    """The recipe for one user task: gsm8k, sst2, agnews or alpaca.

    Raises:
        InputError: another variant.
    """
    # Recipes are loaded by path, so that nothing of this folder can be imported by name.
    paper = runpy.run_path(str(Path(__file__).with_name("paper.py")))
    config: ConfigDict = paper["protocol"](MODEL, variant)
    return config
