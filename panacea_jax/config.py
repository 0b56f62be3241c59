"""The one configuration: every key with its default, and the checks that need no file and no device.

A recipe in ``configs/`` starts from :func:`get_config` and changes what differs. Overrides on the command line are
``--config.a.b=value``. Defaults are those of Panacea's published scripts where these say something (arXiv 2501.18100; its repository).
"""

import dataclasses
import difflib
import math
import re
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

from ml_collections import ConfigDict
from ml_collections.config_dict import FieldReference, placeholder

from panacea_jax.data.template import TEMPLATES
from panacea_jax.defences import DEFENCES, Method
from panacea_jax.defences.spec import Part, Stack, candidates, parse_stack
from panacea_jax.errors import InputError
from panacea_jax.models.adapter import target_names
from panacea_jax.models.decoder import REMAT
from panacea_jax.models.fused import BACKENDS
from panacea_jax.models.quantise import KINDS
from panacea_jax.train.optimizer import SCHEDULES

DTYPES = ("bfloat16", "float32")
LORA_POLICIES = ("single", "merged")
CACHE_DTYPES = ("auto", "int8")
JUDGES = ("refusal", "beaver_dam", "beaver_dam_full", "guard")
WORLDS = ("", "miniature", "tiny")
GUARD_TEMPLATES = ("llama_guard", "wildguard")


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


class _Lookup(NamedTuple):
    """An operation of a ``FieldReference``: ``fn(value, *args)``, with references among ``args`` resolved."""

    fn: Callable[..., Any]
    args: tuple[FieldReference, ...]


def _defence(name: str) -> ConfigDict:
    """Every hyper-parameter of every method. One that is not set is the named method's own default, or None where it has no such key."""
    chosen = FieldReference(name)
    section = ConfigDict({"name": chosen})
    for key, kind in hyper_parameters().items():

        def default(_: Any, name: str, key: str = key) -> Any:
            return method_defaults(name).get(key)

        # The value only gives the type: what is read is what the lookup returns, until the key is set.
        section[key] = FieldReference(kind(), op=_Lookup(default, (chosen,)))
    return section


def hyper_parameters() -> dict[str, type]:
    """Keys of ``config.defence`` beside ``name``, over all methods, with the type that ml_collections checks."""
    found: dict[str, type] = {}
    for defence in DEFENCES.values():
        for field in dataclasses.fields(defence):
            hints = {get_origin(h) or h for h in get_args(field.type) or (field.type,)}
            literal = get_origin(field.type) is Literal
            kind = (
                str
                if literal or str in hints
                else next(t for t in (float, int, bool, tuple) if t in hints)
            )
            if found.setdefault(field.name, kind) is not kind:
                raise TypeError(f"defence.{field.name}: two methods disagree about its type")
    return found


def method_defaults(name: str) -> dict[str, Any]:
    """The hyper-parameters of one method; empty for a name that is none."""
    fields = dataclasses.fields(DEFENCES[name]) if name in DEFENCES else ()
    return {field.name: field.default for field in fields}


def _train() -> ConfigDict:
    return ConfigDict({
        "batch_size": 10,
        "harmful_batch_size": 10,
        "alignment_batch_size": 4,
        "epochs": 20,
        "steps": 0,  # 0: from epochs
        "full_parameters": False,
        "log_every": 10,
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
            "targets": ("q", "k", "v"),
            "init_from": "",  # PEFT folder to go on from; "": a fresh adapter, or in a run the alignment stage's
            "policy": "single",  # that adapter is trained on; "merged": it becomes part of the base, and a fresh one is trained
        },
        "data": {
            "user": "",
            "attack": "",
            "harmful": "",
            "alignment": "",
            "benign": "",
            "num_examples": 1000,  # user records, poison included; 0: all
            "poison_ratio": 0.1,  # share of records taken from data.attack, when that is set
            "num_harmful": 1000,  # 0: all
            "num_alignment": 5000,  # 0: all
            "max_length": 256,
            "shuffle": True,
            "packing": False,  # True: several short records of a step share a row
            "off_by_one": False,  # True: slices of n - 1 records, as the reference code
            "template": "alpaca",  # or chat: the tokenizer's own
        },
        "defence": _defence("panacea"),
        "optimizer": _optimizer(),
        "train": _train(),
        # A run's other stages; a stage whose defence has no name is left out.
        "align": {"defence": _defence(""), "optimizer": _optimizer(), "train": _train()},
        "heal": {"defence": _defence(""), "optimizer": _optimizer(), "train": _train()},
        "mesh": {"replica": 0, "data": 1, "fsdp": -1, "tensor": 1},
        "checkpoint": {"every": 500, "keep": 2},
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
            "batch_size": 16,
            "template": "llama_guard",  # of guard; or wildguard
        },
        "eval": {"tasks": (), "num_examples": 1000, "perplexity": False},  # 0: all
        "export": {"without_epsilon": False},
        # Several methods side by side; without methods and grid a run is an ordinary one.
        "compare": {
            "methods": (),  # such as "sft", "vaccine:rho=2+panacea"; see docs/comparison.md
            "grid": (),  # the same with alternatives, "panacea:rho=0.1|0.25"; one is chosen of each
            "seeds": (0,),
            "ratios": (0.1,),  # poison ratios
            "world": "",  # miniature: every seed is a world of its own; "": the base and data of config.model and config.data
            "development": (),  # seeds on which the grid is chosen
            "validation": (),  # evaluation sets that the grid is chosen by, on a base of one's own
        },
    })  # fmt: skip
    config.align.optimizer.learning_rate = 5e-4
    return config.lock()


def load_recipe(where: str) -> ConfigDict:
    """The configuration that a recipe ``FILE[:variant]`` makes, locked.

    Raises:
        InputError: no such file, code that fails, a configuration with keys of its own or without some of ours.
    """
    path, _, variant = where.partition(":")
    if not Path(path).is_file():
        raise InputError(f"--config={where}: no such file")
    try:
        get = runpy.run_path(path).get("get_config")
        config = get and (get(variant) if variant else get())
    except InputError:
        raise
    except Exception as error:  # a recipe is the user's code, which can fail in any way
        raise InputError(f"--config={where}: {type(error).__name__}: {error}") from error
    if get is None:
        raise InputError(f"--config={where}: defines no get_config()")
    if not isinstance(config, ConfigDict):
        raise InputError(
            f"--config={where}: get_config() returned {type(config).__name__}, not a ConfigDict"
        )
    ours, theirs = set(keys(get_config())), set(keys(config))
    for wrong, rule in ((theirs - ours, "is no key of ours"), (ours - theirs, "is missing")):
        if wrong:
            raise InputError(
                f"--config={where}: config.{min(wrong)} {rule}; start from panacea_jax.config.get_config()"
            )
    return config.lock()


def keys(section: ConfigDict, prefix: str = "") -> Iterator[str]:
    """Every key of a configuration, dotted, in its order."""
    for key, value in section.items():
        if isinstance(value, ConfigDict):
            yield from keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def require_key(config: ConfigDict, key: str) -> None:
    """Check that a dotted key names a value or a section.

    Raises:
        InputError: it does not; the nearest key is named.
    """
    known = list(keys(config))
    if key in known or any(k.startswith(f"{key}.") for k in known):
        return
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    raise InputError(
        f"--config.{key}: no such key" + (f"; did you mean --config.{near[0]}?" if near else "")
    )


def _require(ok: bool, key: str, value: object, rule: str) -> None:
    if not ok:
        raise InputError(f"config.{key} = {value!r}: {rule}")


def validate(config: ConfigDict) -> None:
    """Check every value that can be checked without files or devices.

    Raises:
        InputError: the first impossible value, by its key.
    """
    for section in ("", "align.", "heal."):
        part = config if not section else config[section[:-1]]
        _validate_optimizer(part.optimizer, section)
        _validate_train(part.train, section)
        name = part.defence.name
        if name or not section:
            make_defence(part.defence, section)
    _one_of(config.model.dtype, "model.dtype", DTYPES)
    _one_of(config.model.remat, "model.remat", REMAT)
    _one_of(config.model.attention, "model.attention", BACKENDS)
    _validate_quantization(config)
    _one_of(config.data.template, "data.template", TEMPLATES)
    judge = config.judge
    _one_of(judge.name, "judge.name", JUDGES)
    _one_of(judge.template, "judge.template", GUARD_TEMPLATES)
    _at_least(judge.batch_size, "judge.batch_size", 1)
    named = judge.name == "refusal" or bool(judge.path)
    _require(
        named, "judge.path", judge.path, f"judge {judge.name} needs its model's folder or hub id"
    )
    _require(0 <= config.seed < 2**31, "seed", config.seed, "a whole number from 0 to 2147483647")
    target_names(config.lora.targets)
    _at_least(config.lora.rank, "lora.rank", 1)
    _one_of(config.lora.policy, "lora.policy", LORA_POLICIES)
    _require(0 < config.lora.alpha < math.inf, "lora.alpha", config.lora.alpha, "a positive number")
    data = config.data
    _require(
        0 <= data.poison_ratio <= 1,
        "data.poison_ratio",
        data.poison_ratio,
        "a share between 0 and 1",
    )
    for key in ("num_examples", "num_harmful", "num_alignment"):
        _at_least(data[key], f"data.{key}", 0)
    _at_least(data.max_length, "data.max_length", 2)
    for axis, size in config.mesh.items():
        _require(
            size == -1 or size >= (axis != "replica"),
            f"mesh.{axis}",
            size,
            "a positive number, or -1 for what is left",
        )
    _at_least(config.checkpoint.every, "checkpoint.every", 0)
    _at_least(config.checkpoint.keep, "checkpoint.keep", 1)
    _validate_generate(config.generate)
    _at_least(config.eval.num_examples, "eval.num_examples", 0)
    _validate_compare(config.compare)


def _validate_quantization(config: ConfigDict) -> None:
    kind = config.model.quantization
    _one_of(kind, "model.quantization", ("", *KINDS))
    for obstacle, asked in (
        ("train.full_parameters trains", config.train.full_parameters),
        ("align.train.full_parameters trains", config.align.train.full_parameters),
        ("lora.policy = merged adds to", config.lora.policy == "merged"),
        ("generate.merge adds to", config.generate.merge),
        ("heal.defence.name = safelora compares", config.heal.defence.name == "safelora"),
    ):
        said = f"only for a frozen base; {obstacle} its weights"
        _require(not (kind and asked), "model.quantization", kind, said)


def _one_of(value: str, key: str, choices: tuple[str, ...]) -> None:
    _require(value in choices, key, value, f"one of {', '.join(choices)}")


def _at_least(value: float | int, key: str, least: float | int) -> None:
    _require(least <= value < math.inf, key, value, f"a number not below {least:g}")


def _validate_generate(generate: ConfigDict) -> None:
    _at_least(generate.batch_size, "generate.batch_size", 1)
    _at_least(generate.max_new_tokens, "generate.max_new_tokens", 0)
    _at_least(generate.temperature, "generate.temperature", 0)
    top_p, seed = generate.top_p, generate.seed
    _require(0 < top_p <= 1, "generate.top_p", top_p, "a share above 0, at most 1")
    _require(
        seed is None or 0 <= seed < 2**31,
        "generate.seed",
        seed,
        "a whole number from 0 to 2147483647",
    )
    _one_of(generate.cache_dtype, "generate.cache_dtype", CACHE_DTYPES)
    names = [str(entry).partition("=")[0] for entry in generate.adapters]
    for entry, name in zip(generate.adapters, names):
        folder = str(entry).partition("=")[2]
        _require(
            bool(folder) and re.fullmatch(r"[\w.+-]*[\w+-]", name) is not None,
            "generate.adapters", entry, "write NAME=FOLDER, the name without slashes or spaces",
        )  # fmt: skip
        _require(names.count(name) == 1, "generate.adapters", entry, "the name is there twice")
    if names:
        _require(
            not generate.adapter,
            "generate.adapter",
            generate.adapter,
            "generate.adapters is set too",
        )
        _require(
            not generate.merge,
            "generate.merge",
            generate.merge,
            "several adapters of one base cannot be merged into it",
        )


def _validate_compare(compare: ConfigDict) -> None:
    _one_of(compare.world, "compare.world", WORLDS)
    for text in compare.methods:
        _fits(parse_stack(str(text), "config.compare.methods"), "config.compare.methods")
    sizes = {}
    for text in compare.grid:
        found = candidates(str(text), "config.compare.grid")
        sizes[text] = len(found)
        for method in found:
            _fits(method, "config.compare.grid")
    same = len(set(sizes.values())) <= 1
    _require(same, "compare.grid", sizes, "every method gets the same number of candidates")
    for key in ("seeds", "development"):
        for seed in compare[key]:
            good = isinstance(seed, int) and 0 <= seed < 2**31
            _require(good, f"compare.{key}", seed, "a whole number from 0 to 2147483647")
        _require(len(set(compare[key])) == len(compare[key]), f"compare.{key}", compare[key], "one is there twice")  # fmt: skip
    for ratio in compare.ratios:
        good = isinstance(ratio, float | int) and 0 <= ratio <= 1
        _require(good, "compare.ratios", ratio, "a share between 0 and 1")
    if not (compare.methods or compare.grid):
        return
    for key in ("seeds", "ratios"):
        _require(len(compare[key]) > 0, f"compare.{key}", compare[key], "name at least one")
    if compare.grid:
        _require(len(compare.development) > 0, "compare.development", compare.development, "name seeds to choose the grid on")  # fmt: skip
    if compare.grid and compare.world:
        both = set(compare.development) & set(compare.seeds)
        _require(not both, "compare.development", sorted(both), "a world that is reported cannot be chosen on")  # fmt: skip
    elif compare.grid:
        _require(len(compare.validation) > 0, "compare.validation", compare.validation, "name sets to choose the grid by")  # fmt: skip


def _fits(method: Stack, key: str) -> None:
    """Check the hyper-parameters of a method by making its defences."""
    for part in (method.align, method.finetune, method.heal):
        if part:
            try:
                make_defence(defence_section(part))
            except InputError as error:
                raise InputError(f"{key}: {str(part)!r}: {error}") from error


def defence_section(part: Part) -> ConfigDict:
    """``config.defence`` for a defence written in a line.

    Raises:
        InputError: a value of the wrong type.
    """
    section = _defence(part.name)
    for name, value in part.settings:
        try:
            section[name] = value
        except (TypeError, ValueError) as error:
            raise InputError(f"config.defence.{name} = {value!r}: {error}") from error
    return section.lock()


def _validate_optimizer(optimizer: ConfigDict, section: str) -> None:
    for key in ("learning_rate", "weight_decay", "clip_norm"):
        _at_least(optimizer[key], f"{section}optimizer.{key}", 0)
    for key in ("b1", "b2"):
        _require(
            0 <= optimizer[key] < 1,
            f"{section}optimizer.{key}",
            optimizer[key],
            "0 or more, below 1",
        )
    _require(
        0 < optimizer.eps < math.inf, f"{section}optimizer.eps", optimizer.eps, "a positive number"
    )
    _one_of(optimizer.schedule, f"{section}optimizer.schedule", SCHEDULES)
    ratio = optimizer.warmup_ratio
    _require(0 <= ratio <= 1, f"{section}optimizer.warmup_ratio", ratio, "a share between 0 and 1")


def _validate_train(train: ConfigDict, section: str) -> None:
    for key in ("batch_size", "harmful_batch_size", "alignment_batch_size", "log_every"):
        _at_least(train[key], f"{section}train.{key}", 1)
    _at_least(train.steps, f"{section}train.steps", 0)
    _require(
        train.steps > 0 or train.epochs > 0,
        f"{section}train.epochs",
        train.epochs,
        "1 or more, or set train.steps",
    )


def make_defence(section: ConfigDict, prefix: str = "") -> Method:
    """The defence of a ``defence`` section: of its keys, those that the method has.

    Raises:
        InputError: unknown name, or an impossible hyper-parameter.
    """
    if section.name not in DEFENCES:
        raise InputError(
            f"config.{prefix}defence.name = {section.name!r}: unknown; known are {', '.join(DEFENCES)}"
        )
    kind: Any = DEFENCES[section.name]
    fields = {field.name: field.type for field in dataclasses.fields(kind)}
    chosen = {key: section[key] for key in fields}
    for key, hint in fields.items():
        if get_origin(hint) is Literal:
            _one_of(chosen[key], f"{prefix}defence.{key}", get_args(hint))
    try:
        return kind(**chosen)
    except InputError as error:  # the method does not know where its section stands
        raise InputError(
            str(error).replace("config.defence.", f"config.{prefix}defence.")
        ) from error


def stage_config(config: ConfigDict, stage: str) -> ConfigDict:
    """The configuration as one stage of a ``run`` sees it: ``config.align.*`` or ``config.heal.*`` in the place of ``config.*``."""
    config = config.copy_and_resolve_references()
    if stage in ("align", "heal"):
        with config.unlocked():
            for key in ("defence", "optimizer", "train"):
                config[key] = config[stage][key]
    return config
