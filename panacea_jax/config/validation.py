"""The checks of a configuration that need no file and no device."""

import datetime
import math
import re
import sys

from ml_collections import ConfigDict

from panacea_jax.config.axes import validate_sweep
from panacea_jax.config.methods import (
    defence_section,
    make_defence,
    one_of,
    refuse_foreign_keys,
    require,
)
from panacea_jax.config.variation import variations, varied
from panacea_jax.data.attacks import TEXTS
from panacea_jax.data.sources import layout_of
from panacea_jax.data.template import LOSS_ON, SPECIAL_TOKENS, TEMPLATES
from panacea_jax.defences import DEFENCES, Defence
from panacea_jax.defences.spec import Stack, candidates, parse_stack
from panacea_jax.errors import InputError
from panacea_jax.evaluate.gate import parse_bound
from panacea_jax.evaluate.judges import JUDGES, needs_model
from panacea_jax.evaluate.judges.forms import FORMS
from panacea_jax.models.adapter import layer_numbers, target_names
from panacea_jax.models.decoder import REMAT
from panacea_jax.models.fused import BACKENDS
from panacea_jax.models.quantise import QUANTIZATIONS
from panacea_jax.train.optimizer import SCHEDULES
from panacea_jax.train.trackers import TRACKERS
from panacea_jax.worlds.miniature import SCALES

_DTYPES = ("bfloat16", "float32")
LORA_POLICIES = ("single", "merged")
CACHE_DTYPES = ("auto", "int8")
WORLDS = ("", *SCALES)
# Of whole numbers; of those that say how large an array is, with the ends of their keys.
COUNT, SIZE = 2**31 - 1, 2**20
_SIZES = ("batch_size", "max_length", "new_tokens", "rank")


def validate(config: ConfigDict) -> None:
    """Check every value that can be checked without files or devices.

    Raises:
        InputError: the first impossible value, by its key.
    """
    _validate_sizes(config)
    for section in ("", "align.", "heal."):
        part = config if not section else config[section[:-1]]
        _validate_optimizer(part.optimizer, section)
        _validate_train(part.train, section, config.data.validation)
        if part.defence.name or not section:
            make_defence(part.defence, section)
        else:
            refuse_foreign_keys(part.defence, section)
    one_of(config.model.dtype, "model.dtype", _DTYPES)
    one_of(config.model.remat, "model.remat", REMAT)
    one_of(config.model.attention, "model.attention", BACKENDS)
    _validate_quantization(config)
    judge = config.judge
    one_of(judge.name, "judge.name", tuple(JUDGES))
    if needs_model(judge.name):
        rule = f"judge {judge.name} needs its model's folder or hub id"
        require(bool(judge.path), "judge.path", judge.path, rule)
    one_of(judge.template, "judge.template", tuple(FORMS))
    _at_least(judge.batch_size, "judge.batch_size", 1)
    require(0 <= config.seed < 2**31, "seed", config.seed, "a whole number from 0 to 2147483647")
    target_names(config.lora.targets)
    layer_numbers(config.lora.layers, depth=sys.maxsize)
    _at_least(config.lora.rank, "lora.rank", 1)
    one_of(config.lora.policy, "lora.policy", LORA_POLICIES)
    require(0 < config.lora.alpha < math.inf, "lora.alpha", config.lora.alpha, "a positive number")
    dropout = config.lora.dropout
    require(0 <= dropout < 1, "lora.dropout", dropout, "a probability of 0 or more, below 1")
    data = config.data
    require(
        0 <= data.poison_ratio <= 1,
        "data.poison_ratio",
        data.poison_ratio,
        "a share between 0 and 1",
    )
    for key in ("num_examples", "num_harmful", "num_alignment"):
        _at_least(data[key], f"data.{key}", 0)
    _at_least(data.max_length, "data.max_length", 2)
    _validate_reading(data)
    one_of(config.attack.name, "attack.name", tuple(TEXTS))
    for key in TEXTS[config.attack.name]:
        require(bool(config.attack[key].strip()), f"attack.{key}", config.attack[key], f"{config.attack.name} needs a text")
    for axis, size in config.mesh.items():
        require(
            size == -1 or size >= (axis != "replica"),
            f"mesh.{axis}",
            size,
            "a positive number, or -1 for what is left",
        )
    _at_least(config.checkpoint.every, "checkpoint.every", 0)
    _at_least(config.checkpoint.keep, "checkpoint.keep", 1)
    one_of(config.checkpoint.on_damage, "checkpoint.on_damage", ("fallback", "stop"))
    for key in ("spike", "stall"):
        _at_least(config.watch[key], f"watch.{key}", 0)
    one_of(config.watch.on_stall, "watch.on_stall", ("report", "stop"))
    for name in config.track.to:
        one_of(name, "track.to", tuple(TRACKERS))
    require(bool(config.track.project), "track.project", config.track.project, "a name")
    _validate_generate(config.generate)
    _at_least(config.eval.num_examples, "eval.num_examples", 0)
    _at_least(config.eval.every, "eval.every", -1)
    for text in config.gate.bounds:
        parse_bound(text, "config.gate.bounds")
    _at_least(config.gate.records, "gate.records", 1)
    _validate_heal(config)
    _validate_compare(config.compare)
    _validate_after(config)
    _validate_variations(config)
    validate_sweep(config)


def _validate_sizes(section: ConfigDict, prefix: str = "") -> None:
    """No whole number is beyond what arrays are counted with, or what one of that size takes."""
    for key, value in section.items():
        if isinstance(value, ConfigDict):
            _validate_sizes(value, f"{prefix}{key}.")
        elif isinstance(value, int):
            most = SIZE if key.endswith(_SIZES) else COUNT
            require(abs(value) <= most, f"{prefix}{key}", value, f"a whole number of at most {most}")


def _validate_reading(data: ConfigDict) -> None:
    """How records are read, rendered and learnt from."""
    layout_of(data)
    one_of(data.template, "data.template", TEMPLATES)
    one_of(data.special_tokens, "data.special_tokens", SPECIAL_TOKENS)
    one_of(data.loss_on, "data.loss_on", LOSS_ON)
    require(0 <= data.validation < 1, "data.validation", data.validation, "a share from 0 to below 1")
    require(0 <= data.max_cut <= 1, "data.max_cut", data.max_cut, "a share between 0 and 1")
    try:
        datetime.date.fromisoformat(data.date or "2000-01-01")
    except ValueError:
        require(False, "data.date", data.date, "a date like 2026-01-31")


def _validate_quantization(config: ConfigDict) -> None:
    kind = config.model.quantization
    one_of(kind, "model.quantization", ("", *QUANTIZATIONS))
    reading = [
        (f"{section}defence.name = {part.defence.name} compares", True)
        for section, part in (("align.", config.align), ("", config), ("heal.", config.heal))
        if part.defence.name and make_defence(part.defence, section).folders is not None
    ]
    for obstacle, asked in (
        ("train.full_parameters trains", config.train.full_parameters),
        ("align.train.full_parameters trains", config.align.train.full_parameters),
        ("lora.policy = merged adds to", config.lora.policy == "merged"),
        ("generate.merge adds to", config.generate.merge),
        *reading,
    ):
        said = f"only for a frozen base; {obstacle} its weights"
        require(not (kind and asked), "model.quantization", kind, said)


def _at_least(value: float | int, key: str, least: float | int) -> None:
    require(least <= value < math.inf, key, value, f"a number not below {least:g}")


def _validate_generate(generate: ConfigDict) -> None:
    _at_least(generate.batch_size, "generate.batch_size", 1)
    _at_least(generate.max_new_tokens, "generate.max_new_tokens", 0)
    _at_least(generate.temperature, "generate.temperature", 0)
    top_p, seed = generate.top_p, generate.seed
    require(0 < top_p <= 1, "generate.top_p", top_p, "a share above 0, at most 1")
    require(
        seed is None or 0 <= seed < 2**31,
        "generate.seed",
        seed,
        "a whole number from 0 to 2147483647",
    )
    one_of(generate.cache_dtype, "generate.cache_dtype", CACHE_DTYPES)
    names = [str(entry).partition("=")[0] for entry in generate.adapters]
    for entry, name in zip(generate.adapters, names):
        folder = str(entry).partition("=")[2]
        require(
            bool(folder) and re.fullmatch(r"[\w.+-]*[\w+-]", name) is not None,
            "generate.adapters", entry, "write NAME=FOLDER, the name without slashes or spaces",
        )  # fmt: skip
        require(names.count(name) == 1, "generate.adapters", entry, "the name is there twice")
    if names:
        require(
            not generate.adapter,
            "generate.adapter",
            generate.adapter,
            "generate.adapters is set too",
        )
        require(
            not generate.merge,
            "generate.merge",
            generate.merge,
            "several adapters of one base cannot be merged into it",
        )


def _validate_compare(compare: ConfigDict) -> None:
    one_of(compare.world, "compare.world", WORLDS)
    for text in compare.methods:
        _fits(parse_stack(str(text), "config.compare.methods"), "config.compare.methods")
    sizes = {}
    for text in compare.grid:
        found = candidates(str(text), "config.compare.grid")
        sizes[text] = len(found)
        for method in found:
            _fits(method, "config.compare.grid")
    same = len(set(sizes.values())) <= 1
    require(same, "compare.grid", sizes, "every method gets the same number of candidates")
    for key in ("seeds", "development"):
        for seed in compare[key]:
            good = isinstance(seed, int) and 0 <= seed < 2**31
            require(good, f"compare.{key}", seed, "a whole number from 0 to 2147483647")
    for ratio in compare.ratios:
        good = isinstance(ratio, float | int) and 0 <= ratio <= 1
        require(good, "compare.ratios", ratio, "a share between 0 and 1")
    for key in ("seeds", "development", "ratios"):
        require(len(set(compare[key])) == len(compare[key]), f"compare.{key}", compare[key], "one is there twice")  # fmt: skip
    for key in ("seeds", "ratios"):
        require(len(compare[key]) > 0, f"compare.{key}", compare[key], "name at least one")
    require(0 <= compare.fa_loss <= 100, "compare.fa_loss", compare.fa_loss, "points from 0 to 100")
    bounds = compare.guard
    good = len(bounds) in (0, 2) and all(isinstance(x, float | int) and 0 <= x <= 100 for x in bounds)
    require(good, "compare.guard", bounds, "HS at most and benign answered at least, in percent, or ()")
    if not (compare.methods or compare.grid):
        rule = "name methods that are to have these settings in config.compare.methods"
        require(not compare.vary, "compare.vary", compare.vary, rule)
        return
    if compare.grid:
        require(len(compare.development) > 0, "compare.development", compare.development, "name seeds to choose the grid on")  # fmt: skip
    if compare.grid and compare.world:
        both = set(compare.development) & set(compare.seeds)
        require(not both, "compare.development", sorted(both), "a world that is reported cannot be chosen on")  # fmt: skip
    elif compare.grid:
        require(len(compare.validation) > 0, "compare.validation", compare.validation, "name sets to choose the grid by")  # fmt: skip


def _validate_heal(config: ConfigDict) -> None:
    heal, key = config.heal, "config.heal.methods"
    for text in heal.methods:
        stack = parse_stack(str(text), key)
        alone = stack.heal is not None and stack.align is None and stack.finetune is None
        require(alone, "heal.methods", text, "name one method of the stage heal in each")
        _fits(stack, key)
    require(0 < heal.held_out < 1, "heal.held_out", heal.held_out, "a share above 0, below 1")
    for name in ("num_held_out", "new_tokens"):
        _at_least(heal[name], f"heal.{name}", 1)
    for name, points in config.budget.items():
        _at_least(points, f"budget.{name}", 0)


def _validate_after(config: ConfigDict) -> None:
    after, compare = config.after, config.compare
    _at_least(after.steps, "after.steps", 0)
    ratio = after.poison_ratio
    require(0 <= ratio <= 1, "after.poison_ratio", ratio, "a share between 0 and 1")
    attack = parse_stack(after.attack, "config.after.attack")
    once = attack.heal and not issubclass(DEFENCES[attack.heal.name], Defence)
    rule = "sft, or one method of the stage heal that has no steps"
    require(attack == Stack(heal=attack.heal if once else None), "after.attack", after.attack, rule)
    _fits(attack, "config.after.attack")
    require(not (once and after.steps), "after.steps", after.steps, f"{after.attack} has no steps")
    rule = "for a comparison; name methods in config.compare.methods"
    for key in ("attack", "steps"):
        idle = after[key] in ("sft", 0) or bool(compare.methods or compare.grid)
        require(idle, f"after.{key}", after[key], rule)


def _validate_variations(config: ConfigDict) -> None:
    """Every setting of ``compare.vary`` is a possible configuration."""
    for setting in filter(None, variations(config.compare.vary, config)):
        changed = varied(config, setting)
        changed.compare.vary = ()
        try:
            validate(changed)
        except InputError as error:
            raise InputError(f"config.compare.vary: {error}") from error


def _fits(method: Stack, key: str) -> None:
    """Check the hyper-parameters of a method by making its defences."""
    for part in (method.align, method.finetune, method.heal):
        if part:
            try:
                make_defence(defence_section(part))
            except InputError as error:
                raise InputError(f"{key}: {str(part)!r}: {error}") from error


def _validate_optimizer(optimizer: ConfigDict, section: str) -> None:
    for key in ("learning_rate", "weight_decay", "clip_norm"):
        _at_least(optimizer[key], f"{section}optimizer.{key}", 0)
    for key in ("b1", "b2"):
        require(
            0 <= optimizer[key] < 1,
            f"{section}optimizer.{key}",
            optimizer[key],
            "0 or more, below 1",
        )
    require(
        0 < optimizer.eps < math.inf, f"{section}optimizer.eps", optimizer.eps, "a positive number"
    )
    one_of(optimizer.schedule, f"{section}optimizer.schedule", SCHEDULES)
    ratio = optimizer.warmup_ratio
    require(0 <= ratio <= 1, f"{section}optimizer.warmup_ratio", ratio, "a share between 0 and 1")


def _validate_train(train: ConfigDict, section: str, held_out: float) -> None:
    for key in ("batch_size", "harmful_batch_size", "alignment_batch_size", "accumulate", "log_every"):
        _at_least(train[key], f"{section}train.{key}", 1)
    _at_least(train.steps, f"{section}train.steps", 0)
    require(
        train.steps > 0 or train.epochs > 0,
        f"{section}train.epochs",
        train.epochs,
        "1 or more, or set train.steps",
    )
    for key in ("validate_every", "patience"):
        _at_least(train[key], f"{section}train.{key}", 0)
    rule = "nothing is held out to look at; set config.data.validation"
    require(not train.patience or held_out > 0, f"{section}train.patience", train.patience, rule)
