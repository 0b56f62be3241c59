"""One radius a layer: how a total ρ is shared out, ``sqrt(Σ ρ_l²) = ρ`` whatever the rule.

    uniform         ρ_l = ρ/√L
    proportional    ρ_l ∝ c_l
    inverse         ρ_l ∝ 1/c_l
    top:k           the same in the k layers of largest c_l, 0 in the others
    (1.0, 0.5, …)   ρ_l ∝ these values, one a layer
    FILE            ρ_l ∝ what the file holds

c_l: layer safety coefficients, of a file or of a gradient that its method looks at. A file is a JSON list of numbers, one a layer, or a
``layers.json`` as ``panacea layers`` writes it, of which the norms are taken (of the mean ε, where it has one). The control of any rule
but "uniform" is the same radii in another order, drawn from a seed.
"""

import dataclasses
import re
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from panacea_jax.errors import InputError
from panacea_jax.stores import stand_in
from panacea_jax.untrusted import read_json_value

KEY, FILE_KEY, SEED_KEY = (f"config.defence.{k}" for k in ("rho_per_layer", "layer_file", "layer_seed"))  # fmt: skip
RULES = "uniform, proportional, inverse, top:k, a file, or one value a layer"


@dataclasses.dataclass(frozen=True)
class LayerRule:
    """A rule by which ρ is shared out among layers.

    Attributes:
        rule: as in the module's docstring; "": ρ is one radius over all layers together.
        file: where proportional, inverse and top:k take the coefficients from; "": from a gradient.
        seed: of the order in which the radii are dealt out; None: each layer has its own.

    Raises:
        InputError: not a rule, or keys that it does not use; the key is named.
    """

    rule: str | tuple[float, ...]
    file: str = ""
    seed: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.rule, str):
            _weights(self.rule, f"{KEY} = {self.rule}")
        if self.file and not self._by_coefficients:
            raise InputError(f"{FILE_KEY} = {self.file}: for {KEY} = proportional, inverse or top:k")
        if self.seed is not None and (self.seed < 0 or not self.rule):
            raise InputError(f"{SEED_KEY} = {self.seed}: 0 or more, and for {KEY} alone")
        if str(self.rule).startswith("top:") and self._top is None:
            raise InputError(f"{KEY} = {self.rule}: top:k with a whole number k from 1 on")

    def __bool__(self) -> bool:
        return bool(self.rule)

    @property
    def _top(self) -> int | None:
        """k of ``top:k``."""
        found = re.fullmatch(r"top:([1-9]\d*)", self.rule) if isinstance(self.rule, str) else None
        return int(found[1]) if found else None

    @property
    def _by_coefficients(self) -> bool:
        return self.rule in ("proportional", "inverse") or self._top is not None

    @property
    def files(self) -> tuple[str, ...]:
        """Files that it reads."""
        if not isinstance(self.rule, str) or self.rule in ("", "uniform"):
            return ()
        return tuple(filter(None, (self.file if self._by_coefficients else self.rule,)))

    @property
    def probes(self) -> bool:
        """Whether it needs the layer norms of a gradient."""
        return self._by_coefficients and not self.file

    def check(self) -> None:
        """Raises:
        InputError: its file is not there, or does not hold a number a layer.
        """
        for file in self.files:
            _numbers(file, FILE_KEY if self.file else KEY)

    def unit(self, layers: int, norms: Float[np.ndarray, "L"] | None = None) -> Float[np.ndarray, "L"]:
        """The radii for ρ = 1: their squares add up to 1.

        Args:
            layers: L, number of layers.
            norms: c_l of a gradient, for a rule that ``probes``.

        Raises:
            InputError: values, a file or a k that do not fit so many layers; a coefficient of 0 has no inverse.
        """
        weights = self._relative(layers, norms)
        if len(weights) != layers:
            given = self.files[0] if self.files else self.rule
            raise InputError(f"{KEY}: {len(weights)} values in {given} for {layers} layers")
        if self.seed is not None:
            weights = _in_another_order(weights, self.seed)
        return weights / np.linalg.norm(weights)

    def _relative(self, layers: int, norms: Float[np.ndarray, "L"] | None) -> Float[np.ndarray, "_"]:
        if self.rule == "uniform":
            return np.ones(layers)
        if not isinstance(self.rule, str):
            return _weights(self.rule, KEY)
        if not self._by_coefficients:
            return _numbers(self.rule, KEY)
        c = norms if self.probes else _numbers(self.file, FILE_KEY)
        if c is None:
            raise ValueError(f"{self.rule} needs the layer norms of a gradient")
        c = _weights(c, f"{KEY} = {self.rule}: layer norms of the gradient")
        if self._top is not None:
            if self._top > len(c):
                raise InputError(f"{KEY} = {self.rule}: there are {len(c)} layers")
            first = np.argsort(-c, kind="stable")[: self._top]
            return np.isin(np.arange(len(c)), first).astype(float)
        if self.rule == "inverse" and not c.all():
            raise InputError(f"{KEY} = inverse: layer {int(np.argmin(c))} has coefficient 0")
        return c if self.rule == "proportional" else 1 / c


def stacked_layers(tree: Any, key: str = KEY) -> int:
    """L of a tree whose every leaf is stacked over layers; ``key`` is what asks for radii by layer.

    Raises:
        InputError: a leaf belongs to no layer, as with all weights.
    """
    sizes = {x.shape[0] for x in jax.tree.leaves(tree)}
    if len(sizes) != 1:
        raise InputError(f"{key}: one radius a layer is for adapters; of all weights some belong to no layer")
    return int(sizes.pop())


def _numbers(file: str, key: str) -> Float[np.ndarray, "_"]:
    """One number a layer of a file.

    Raises:
        InputError: it cannot be read, or holds something else.
    """
    what = f"{key} = {file}"
    rules = f"; there is {RULES}" if key == KEY and not stand_in(file).is_file() else ""
    try:
        found = read_json_value(stand_in(file), "not JSON")
    except InputError as error:
        raise InputError(f"{key} = {error}{rules}") from error
    kinds = [found] if isinstance(found, dict) else found
    try:
        if isinstance(kinds[0], dict):
            chosen = next((x for x in kinds if x["epsilon"] == "mean"), kinds[0])
            kinds = [row["norm"] for row in chosen["layers"]]
    except (LookupError, TypeError) as error:
        raise InputError(f"{what}: neither a list of numbers nor a layers.json") from error
    return _weights(kinds, what)


def _in_another_order(weights: Float[np.ndarray, "L"], seed: int) -> Float[np.ndarray, "L"]:
    """Dealt out anew until some layer has another; of a few layers every so many draws is the order that was. Equal ones stay."""
    drawn, dealt = np.random.default_rng(seed), weights
    while np.array_equal(dealt, weights) and np.ptp(weights) > 0:
        dealt = drawn.permutation(weights)
    return dealt


def _weights(values: Any, what: str) -> Float[np.ndarray, "_"]:
    """As numbers that radii can go by.

    Raises:
        InputError: they are none.
    """
    try:
        found = np.asarray([float(x) for x in values])
    except (TypeError, ValueError, OverflowError):
        found = np.zeros(0)
    if not (found.size and np.isfinite(found).all() and (found >= 0).all() and found.any()):
        raise InputError(f"{what}: finite numbers, 0 or more and not all of them 0")
    return found
