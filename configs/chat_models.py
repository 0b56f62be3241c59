"""Panacea on chat models that are aligned already: the tokenizer's own chat template, and no alignment stage.

    panacea run --config=configs/chat_models.py:qwen3_8b --workdir=runs/qwen3_8b \\
        --config.data.user=TASK@FILE --config.data.harmful=beavertails@FILE
    panacea plan --config=configs/chat_models.py:qwen3_8b --config.model.path=configs/architectures/qwen3_8b \\
        --topology=v5e:2x2

variant, hub id, parameters; GiB a device by the second command (libtpu 0.0.52), by the memory model for one H100; weights gated?
    llama3_1_8b   meta-llama/Llama-3.1-8B-Instruct   8.03e9    5.91   16.86   gated
    llama3_2_3b   meta-llama/Llama-3.2-3B-Instruct   3.21e9    3.06    7.37   gated
    llama2_7b     meta-llama/Llama-2-7b-chat-hf      6.74e9    4.93   14.34   gated
    qwen2_5_7b    Qwen/Qwen2.5-7B-Instruct           7.62e9    5.48   15.91
    qwen3_8b      Qwen/Qwen3-8B                      8.19e9    6.31   17.35
    gemma2_9b     google/gemma-2-9b-it               9.24e9    7.45   19.84   gated
    gemma3_4b     google/gemma-3-4b-it               3.88e9    3.91    9.03   gated; its vision tower is left alone

Gated: accept the licence on the model's page first. Memory is that of Panacea on LoRA as configured here, bfloat16, remat full, ten user
and ten harmful records of 256 tokens: planned, not run (docs/planning.md). Data, protocol and cost are those of paper.py beside this file,
with GSM8K as the user's task; so are ρ and λ, which were chosen for another base: read "Before a result is believed" there.

The folders architectures/VARIANT hold what each public config.json says of the architecture and nothing else, so that a model can be
planned for before it is downloaded. Those of Llama 3.2, Qwen3 and Gemma 3 were put together from public copies and transformers'
defaults; the parameters that follow from each are the published number (of Gemma 3 without its vision tower).
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

from panacea_jax.errors import InputError

MODELS = {
    "llama3_1_8b": "meta-llama/Llama-3.1-8B-Instruct",
    "llama3_2_3b": "meta-llama/Llama-3.2-3B-Instruct",
    "llama2_7b": "meta-llama/Llama-2-7b-chat-hf",
    "qwen2_5_7b": "Qwen/Qwen2.5-7B-Instruct",
    "qwen3_8b": "Qwen/Qwen3-8B",
    "gemma2_9b": "google/gemma-2-9b-it",
    "gemma3_4b": "google/gemma-3-4b-it",
}


def get_config(variant: str = "llama3_1_8b") -> ConfigDict:
    """The recipe for one model, a key of MODELS.

    Raises:
        InputError: another variant.
    """
    if variant not in MODELS:
        raise InputError(f"--config: unknown variant {variant!r}; known are {', '.join(MODELS)}")
    # Recipes are loaded by path, so that nothing of this folder can be imported by name.
    paper = runpy.run_path(str(Path(__file__).with_name("paper.py")))
    config: ConfigDict = paper["protocol"](MODELS[variant], "gsm8k")
    config.data.template = "chat"
    return config
