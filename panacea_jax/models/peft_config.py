"""``adapter_config.json`` of a LoRA adapter made by peft: what each of its keys means here.

Every key is in one of three groups: handled, harmless, or refused unless it is off. A key that is in none, of a peft that came later,
is let through while it is off too. What is asked of a module (is it adapted, with which rank and scale) follows peft's own rules, by
the module's full name in transformers, ``model.layers.3.self_attn.q_proj``.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from panacea_jax.errors import InputError
from panacea_jax.untrusted import match_pattern, parsing, read_object

CONFIG_FILE = "adapter_config.json"
# No adapter has more; names of modules, and characters of an expression.
MOST_RANK, MOST_ALPHA, MOST_NAMES = 2**16, 1e9, 2**12

# What the product or the file's tensors depend on, and what is made of it.
HANDLED = {
    "peft_type": "LORA; other methods are refused by name",
    "r": "rank",
    "lora_alpha": "α; the product is scaled by α/r",
    "use_rslora": "scaled by α/√r instead",
    "rank_pattern": "ranks of single modules; lower ones are filled with zeros",
    "alpha_pattern": "α of single modules, put into their B",
    "target_modules": 'adapted modules: names, a regular expression or "all-linear"',
    "exclude_modules": "modules that are not, names or a regular expression",
    "layers_to_transform": "adapted layers",
    "layers_pattern": "name in front of a layer's number",
    "modules_to_save": "a copy of a module in the file has to equal the base's",
    "init_lora_weights": "what the base lost goes into the adapter, or it is refused",
}

# What changes nothing in the model that a finished adapter makes, with the reason.
HARMLESS = {
    "task_type": "names peft's wrapper; the tensors say what is adapted",
    "auto_mapping": "helps peft to find the base's class",
    "peft_version": "who wrote the file",
    "base_model_name_or_path": "the base is what config.model.path names",
    "revision": "the base is what config.model.path names",
    "inference_mode": "whether peft freezes the factors",
    "lora_dropout": "acts in peft's training only",
    "megatron_core": "module that megatron_config is read with",
    "loftq_config": "read with init_lora_weights=loftq only, which is refused",
    "eva_config": "how A was found before training",
    "corda_config": "read with init_lora_weights=corda only, which is refused",
    "lora_ga_config": "read with init_lora_weights=lora_ga only, which is refused",
    "qalora_group_size": "read with use_qalora only, which is refused",
    "runtime_config": "where peft does its arithmetic; not stored by it",
    "ensure_weight_tying": "ties copies of head and embedding, which have to equal the base's anyway",
}

# What makes another computation, which we do not have; harmless while it is off (null, false or empty, and bias="none").
REFUSED = {
    "use_dora": "weights split into magnitude and direction",
    "bias": "trained biases of the base",
    "lora_bias": "biases of B",
    "fan_in_fan_out": "weights stored as [in, out]",
    "trainable_token_indices": "trained rows of the embedding",
    "target_parameters": "factors of bare parameters, such as experts",
    "layer_replication": "layers used several times",
    "megatron_config": "layers of Megatron",
    "alora_invocation_tokens": "acts behind some tokens only",
    "use_qalora": "inputs pooled in groups",
    "use_bdlora": "block-diagonal factors",
    "arrow_config": "routing between adapters",
    "kasa_config": "a diagonal between A and B, and a base without its smallest singular values",
    "velora_config": "compressed activations in the backward pass",
    "monteclora_config": "sampled factors",
}

# init_lora_weights: the base is left alone by these, and loses the product of the first factors by those, see ``peft_base.lost_factors``.
PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
BASE_INITS = ("pissa", "olora")
# The change of the base by any other is random or needs data: peft itself cannot make it again from the file.
_ADVICE = "let peft make it plain: path_initial_model_for_weight_conversion, or merge_and_unload of the trained model"


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """A configuration that passed the table.

    Attributes:
        path: of the file.
        values: what it says.
    """

    path: Path
    values: Mapping[str, Any]

    @property
    def changes_base(self) -> str:
        """The one of ``BASE_INITS`` by which the base lost a part of itself; "" if it is as it was."""
        init = self.values.get("init_lora_weights", True)
        return init.lower() if isinstance(init, str) and init.lower() in BASE_INITS else ""

    def adapts(self, module: str) -> bool:
        """Whether a projection has factors, as ``peft.tuners.tuners_utils.check_target_module_exists`` decides it."""
        targets, excluded = self.values["target_modules"], self.values.get("exclude_modules")
        if excluded and self._named(module, excluded):
            return False
        saved = self.values.get("modules_to_save") or ()
        if any(self._match(rf"(^|.*\.){name}($|\..*)", module) for name in saved):
            return False
        if isinstance(targets, str):
            return targets.lower() == "all-linear" or self._named(module, targets)
        return self._named(module, targets) and self._adapts_layer(module)

    def _adapts_layer(self, module: str) -> bool:
        layers = self.values.get("layers_to_transform")
        if layers is None or layers == []:
            return True
        patterns = self.values.get("layers_pattern") or r"[^.]*"
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            found = self._match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module)
            if found:  # the last group: the pattern may have groups of its own
                return int(found[found.re.groups]) in ([layers] if isinstance(layers, int) else layers)
        return False

    def rank(self, module: str) -> int:
        """r of a module."""
        return int(self._by_pattern("rank_pattern", module, self.values["r"]))

    def alpha(self, module: str) -> float:
        """α of a module."""
        return float(self._by_pattern("alpha_pattern", module, self.values["lora_alpha"]))

    @property
    def rslora(self) -> bool:
        """Whether the scale is α/√r."""
        return bool(self.values.get("use_rslora"))

    def scale(self, module: str) -> float:
        """What the product of a module's factors is multiplied by."""
        rank = self.rank(module)
        return self.alpha(module) / (math.sqrt(rank) if self.rslora else rank)

    def _match(self, pattern: str, module: str, *, whole: bool = False) -> Any:
        return match_pattern(pattern, module, self.path, whole=whole)

    def _named(self, module: str, names: str | list[str]) -> bool:
        """A regular expression that fits the whole name, or one of several names that it is or ends with."""
        if isinstance(names, str):
            return self._match(names, module, whole=True) is not None
        return any(module == name or module.endswith(f".{name}") for name in names)

    def _by_pattern(self, key: str, module: str, default: Any) -> Any:
        """The value of the first pattern that fits the end of the name."""
        for pattern, value in (self.values.get(key) or {}).items():
            if self._match(rf"(.*\.)?({pattern})$", module):
                return value
        return default


def read_peft_config(folder: Path) -> PeftConfig:
    """Read ``adapter_config.json`` and hold every key of it against the table.

    Raises:
        InputError: no such file, not LoRA, or a key with a value that is refused; names it.
    """
    path, problem = folder / CONFIG_FILE, "not a LoRA configuration"
    if not path.is_file():
        raise InputError(f"{path}: no such file; not a PEFT adapter folder")
    values = read_object(path, problem)
    with parsing(path, problem):
        if values["peft_type"] != "LORA":
            raise InputError(f"{path}: peft_type = {values['peft_type']!r:.80}: only LORA is supported")
        rank, alpha = int(values["r"]), float(values["lora_alpha"])
    if not 1 <= rank <= MOST_RANK:
        raise InputError(f"{path}: r = {str(rank)[:20]}: a rank is from 1 to {MOST_RANK}")
    if not math.isfinite(alpha):
        raise InputError(f"{path}: lora_alpha = {alpha}: not finite")
    for key, value in values.items():
        if key not in HANDLED and key not in HARMLESS and not _off(key, value):
            why = REFUSED.get(key, "a key that is not known here")
            raise InputError(f"{path}: {key} = {value!r:.80} is not supported: {why}")
    config = PeftConfig(path, values)
    _check_init(config)
    _check_modules(config)
    return config


def _off(key: str, value: Any) -> bool:
    if (key, value) == ("bias", "none"):
        return True
    return value is None or value is False or (isinstance(value, str | list | dict) and not value)


def _check_init(config: PeftConfig) -> None:
    init = config.values.get("init_lora_weights", True)
    plain = init.lower() if isinstance(init, str) else init
    if plain not in PLAIN_INITS and not config.changes_base:
        raise InputError(
            f"{config.path}: init_lora_weights = {init!r:.80} changes the base in a way that the file does not hold; {_ADVICE}"
        )


def _check_modules(config: PeftConfig) -> None:
    """That the keys which choose modules are of the kinds and combinations that peft takes."""
    values = config.values
    for key, (kind, wanted) in _KINDS.items():
        value = values.get(key)
        if not kind(value) and (value is not None or key == "target_modules"):
            raise InputError(f"{config.path}: {key} = {value!r:.80}: expected {wanted}")
    for key in ("layers_to_transform", "layers_pattern"):
        if isinstance(values["target_modules"], str) and values.get(key) is not None:
            raise InputError(
                f"{config.path}: {key} goes with a list of target_modules only, as in peft"
            )
    if values.get("layers_pattern") and values.get("layers_to_transform") is None:
        raise InputError(f"{config.path}: layers_pattern needs layers_to_transform, as in peft")


def _names(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= MOST_NAMES and all(map(_regex, value))


def _regex(value: Any) -> bool:
    try:
        return isinstance(value, str) and len(value) <= MOST_NAMES and bool(re.compile(value))
    except (re.error, OverflowError, RecursionError):
        return False


def _by_name(value: Any, least: float | int, most: float | int) -> bool:
    good = isinstance(value, dict) and _names(list(value))
    return good and all(type(x) in (int, float) and least <= x <= most for x in value.values())


_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "target_modules": (lambda x: _names(x) or _regex(x), "names or a regular expression"),
    "exclude_modules": (lambda x: _names(x) or _regex(x), "names or a regular expression"),
    "modules_to_save": (_names, "names"),
    "layers_pattern": (lambda x: _names(x) or _regex(x), "names"),
    "layers_to_transform": (
        lambda x: all(type(n) is int for n in (x if isinstance(x, list) else [x])),
        "a whole number or a list of such",
    ),
    "rank_pattern": (lambda x: _by_name(x, 1, MOST_RANK), "ranks of 1 or more by name"),
    "alpha_pattern": (lambda x: _by_name(x, -MOST_ALPHA, MOST_ALPHA), "numbers by name"),
}
