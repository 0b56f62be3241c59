"""A chat model and data of your own: LoRA on all projections, the model's own chat template, nothing hidden among your records.

    panacea compare --config=own --workdir=runs/mine --config.model.path=FOLDER \\
        --config.data.user=chat@conversations.jsonl --config.data.harmful=chat@harmful.jsonl \\
        --config.eval.tasks="('chat@test.jsonl', 'chat:harmful@prompts.jsonl', 'chat:benign@requests.jsonl')"

With `run` in place of `compare` only the defence is trained. `data.harmful` are requests that the model must not fulfil, each with an
answer that does; `chat:harmful` asks others of that kind and counts what is answered, `chat:benign` harmless ones that are to be.

The defence is Panacea with ρ "auto" (docs/defences.md), since neither ρ nor λ carries over from one model to another. With refusals at hand
training on them is the first thing to try (docs/comparison_miniature.md, docs/real_language.md):

    … --config.defence.name=vlguard --config.data.alignment=refusals@refusals.jsonl

Rank 16, learning rate 2e-4 and three epochs are what adapters of chat models are commonly trained with; none of it was searched for.
"""

from ml_collections import ConfigDict

from panacea_jax.config import get_config as defaults


def get_config() -> ConfigDict:
    """The recipe; what is yours has to be named on the command line."""
    config = defaults()
    config.model.remat = "full"
    config.lora.rank, config.lora.alpha = 16, 32.0
    config.lora.targets = ("q", "k", "v", "o", "gate", "up", "down")
    config.data.template, config.data.max_length = "chat", 1024
    config.train.epochs, config.train.batch_size, config.train.harmful_batch_size = 3, 8, 8
    config.optimizer.learning_rate, config.optimizer.weight_decay = 2e-4, 0.01
    config.optimizer.schedule, config.optimizer.warmup_ratio = "cosine", 0.03
    config.generate.max_new_tokens = 128  # a refusal shows in its first sentence; the published lengths are up to 512
    config.eval.perplexity = True  # what tells whether free answers were learnt; FA is equality
    config.defence.name, config.defence.rho, config.defence.final_epsilon = "panacea", "auto", "mean"
    return config
