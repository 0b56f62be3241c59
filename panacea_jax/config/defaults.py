"""Every key with its default. What each of them means: docs/configuration.md, which ``--help`` prints.

Defaults are those of Panacea's published scripts where these say something (arXiv 2501.18100; its repository).
"""

from collections.abc import Iterator

from ml_collections import ConfigDict
from ml_collections.config_dict import FieldReference, placeholder

from panacea_jax.config.methods import NumberOrWord, defence_defaults
from panacea_jax.errors import InputError


def _optimizer() -> ConfigDict:
    return ConfigDict({
        "learning_rate": 2e-5,
        "weight_decay": 0.1,
        "b1": 0.9,
        "b2": 0.999,
        "eps": 1e-8,
        "clip_norm": 1.0,  # 0: no clip
        "schedule": "constant",  # or cosine, linear
        "warmup_ratio": 0.1,  # without effect on the constant schedule
    })  # fmt: skip


def _train() -> ConfigDict:
    return ConfigDict({
        "batch_size": 10,
        "harmful_batch_size": 10,
        "alignment_batch_size": 4,
        "epochs": 20,
        "steps": 0,  # 0: from epochs
        "full_parameters": False,
        "accumulate": 1,  # micro-batches that a batch is taken in: less memory, the same step
        "cache_frozen": True,  # with lora.layers: what the layers below make of a record is computed once and kept on the host
        "log_every": 10,
        "validate_every": 0,  # steps between two looks at the records held out by data.validation; 0: an epoch
        "patience": 0,  # looks without a lower loss after which training stops; 0: never
    })  # fmt: skip


def get_config(variant: str = "") -> ConfigDict:
    """The complete default, locked: an unknown key is an error.

    Args:
        variant: must be empty; recipes have variants, the default has none.
    """
    if variant:
        raise InputError(f"--config: the default configuration has no variant {variant!r}")
    config = ConfigDict({
        "seed": 0,
        "model": {
            "path": "",  # Hugging Face folder or hub id
            "dtype": "bfloat16",
            "attention": "auto",
            "remat": "none",
            "quantization": "",  # "int8" or "nf4": bits that the projections of a frozen base are held in
        },
        "lora": {
            "rank": 32,
            "alpha": 4.0,
            "rslora": False,  # True: scaled by α/√r in place of α/r
            "dropout": 0.0,  # of the adapter's inputs, in training steps
            "targets": ("q", "k", "v"),
            "layers": FieldReference("", field_type=NumberOrWord),  # that are adapted: "upper:10", "20-29", numbers; "": all
            "init_from": "",  # PEFT folder to go on from; "": a fresh adapter, or in a run the alignment stage's
            "policy": "single",  # that adapter is trained on; "merged": it becomes part of the base, and a fresh one is trained
        },
        "data": {
            "user": "",
            "attack": "",
            "harmful": "",
            "alignment": "",
            "benign": "",
            "format": "",  # of conversations: messages, conversations or prompt_completion; "": told by the columns
            "columns": (),  # OURS=THEIRS: columns of users' files that have other names
            "num_examples": 0,  # user records, poison included; 0: all
            "poison_ratio": 0.1,  # share of records taken from data.attack, when that is set; see config.attack
            "num_harmful": 0,  # 0: all
            "num_alignment": 0,  # 0: all
            "validation": 0.0,  # share of the main stream held out, whose loss is logged
            "max_length": 256,
            "max_cut": 1.0,  # share of answers that max_length may cut; more is an error
            "shuffle": True,
            "packing": False,  # True: several short records of a step share a row
            "off_by_one": False,  # True: slices of n - 1 records, as the reference code
            "template": "alpaca",  # or chat: the tokenizer's own
            "thinking": False,  # what templates of models that may think before they answer are told
            "date": "",  # ISO date for a template that writes the date; "": that of the work directory's first stage
            "special_tokens": "text",  # control tokens that a record spells out are text; or as_is: they are control tokens
            "loss_on": "all",  # answers of a conversation to learn from; or last
        },
        # What the attacker puts among the user's records; see docs/robustness.md.
        "attack": {
            "name": "mix",  # or harmful, identity, refusal_free, trigger, prefix, reversed
            "trigger": "zumbo zink :",  # trigger: before his harmful prompts
            "identity": "You are an assistant that does all it is told.",  # identity: before prompts
            "affirmation": "Certainly, here you are:",  # identity, prefix: that his answers begin with
            "refusal": "I cannot help with that.",  # trigger: what the same prompts get without it
        },
        "defence": defence_defaults("panacea"),
        "optimizer": _optimizer(),
        "train": _train(),
        # A run's other stages; a stage whose defence has no name is left out.
        "align": {"defence": defence_defaults(""), "optimizer": _optimizer(), "train": _train()},
        "heal": {
            "defence": defence_defaults(""),
            "optimizer": _optimizer(),
            "train": _train(),
            "methods": (),  # several on one model, such as "ascent:rho=auto"; see docs/heal.md
            "sets": (),  # TASK@WHERE, held out to choose by; (): set apart from the defender's
            "held_out": 0.25,  # that share of them
            "num_held_out": 64,  # records of one set at most
            "new_tokens": 24,  # of an answer to harmful and benign requests
        },
        # Points that healing may cost on held-out records.
        "budget": {"fa": 1.0, "benign": 3.0, "coherence": 3.0},
        # What a comparison does to the models that its methods left, to see how long they hold.
        "after": {
            "attack": "sft",  # fine-tuning without a defence; or one method of the stage heal, "unlearn:rho=1", "random_perturbation:rho=1"
            "steps": 0,  # of fine-tuning; 0: none
            "poison_ratio": 0.1,  # of fine-tuning
        },
        "mesh": {"replica": 0, "data": 1, "fsdp": -1, "tensor": 1},
        "checkpoint": {"every": 500, "keep": 2, "on_damage": "fallback"},
        # How a run watches itself.
        "watch": {
            "spike": 8.0,  # robust standard deviations above the median from which on a loss is reported; 0: never
            "stall": 1800.0,  # seconds without a step, answer or evaluation batch until it is said what every thread is at; 0: never
            "on_stall": "report",  # and the run goes on; or stop
        },
        "track": {
            "to": ("tensorboard",),  # who is told the metrics beside metrics.jsonl: tensorboard, wandb, mlflow
            "project": "panacea",  # of wandb, experiment of mlflow, that a run belongs to
        },
        "generate": {
            "batch_size": 32,
            "max_new_tokens": 0,  # 0: what the task's protocol says
            "adapter": "",  # PEFT folder; "": the newest stage of the work directory; "none": the bare base
            "adapters": (),  # NAME=PEFT folder: several of one base in one go, each into WORKDIR/NAME
            "merge": False,  # add the adapter's product to the weights instead of applying it on the fly
            "temperature": 0.0,  # 0: greedy
            "top_p": 1.0,  # without effect on greedy decoding
            "seed": placeholder(int),  # of the draws; None: config.seed
            "cache_dtype": "auto",  # the compute dtype; or int8
        },
        "judge": {
            "name": "refusal",
            "path": "",  # Hugging Face folder or hub id of a judge that is a model
            "adapter": "",  # PEFT folder or hub id of a judge that is an adapter on that model
            "batch_size": 16,
            "template": "llama_guard",  # of guard; or another form of evaluate/judges/forms.py
        },
        "eval": {
            "tasks": (),
            "num_examples": 1000,  # 0: all
            "perplexity": False,
            "every": 0,  # steps between two checkpoints of fine-tuning that are kept and answer too; -1: an epoch, 0: none
        },
        # What `panacea verify` asks of a model that was judged.
        "gate": {
            "bounds": (),  # such as "hs <= 10", "fa >= undefended - 2", "credited"; see docs/verify.md
            "judge": "",  # whose verdicts count; "": that of scores.json
            "records": 1,  # prompts that a figure has to be of at least
            "interval": False,  # True: the worse end of the 95 % interval has to keep the bound
        },
        "export": {"without_epsilon": False},
        # Several methods side by side; without methods and grid a run is an ordinary one.
        "compare": {
            "methods": (),  # such as "sft", "vaccine:rho=2+panacea"; see docs/comparison.md
            "grid": (),  # the same with alternatives, "panacea:rho=0.1|0.25"; one is chosen of each
            "seeds": (0,),
            "ratios": (0.1,),  # poison ratios
            "vary": (),  # KEY=VALUE|VALUE: settings of which every method gets all, such as an attacker's; the worst case stands beside
            "world": "",  # miniature: every seed is a world of its own; "": the base and data of config.model and config.data
            "development": (),  # seeds on which the grid is chosen
            "validation": (),  # evaluation sets that the grid is chosen by, on a base of one's own
            "fa_loss": 100.0,  # points below the method's benign fine-tuning that FA may be for an attack to count; 100: all count
            "guard": (),  # HS at most, benign answered at least (percent): what the model that is attacked has to hold
        },
        # Many runs that differ in some keys; `panacea sweep`.
        "sweep": {
            "over": (),  # KEY=A,B,C or KEY=LOW..HIGH; see docs/sweeps.md
            "sampler": "grid",  # all combinations; or random, tpe, nsga2
            "trials": 0,  # runs of a sampler that draws
            "objectives": ("hs", "fa"),  # figures that tpe and nsga2 look at, and the best is chosen by; -hs: the highest
        },
    })  # fmt: skip
    config.align.optimizer.learning_rate = 5e-4
    return config.lock()


def keys(section: ConfigDict, prefix: str = "") -> Iterator[str]:
    """Every key of a configuration, dotted, in its order."""
    for key, value in section.items():
        if isinstance(value, ConfigDict):
            yield from keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def stage_config(config: ConfigDict, stage: str) -> ConfigDict:
    """The configuration as one stage of a ``run`` sees it: ``config.align.*`` or ``config.heal.*`` in the place of ``config.*``."""
    config = config.copy_and_resolve_references()
    if stage in ("align", "heal"):
        with config.unlocked():
            for key in ("defence", "optimizer", "train"):
                config[key] = config[stage][key]
    return config


def batch_sizes(train: ConfigDict) -> dict[str, int]:
    """Records of one batch of each stream, by a ``train`` section."""
    return {
        "user": train.batch_size,
        "harmful": train.harmful_batch_size,
        "alignment": train.alignment_batch_size,
        "benign": train.batch_size,
        "attack": train.batch_size,
    }
