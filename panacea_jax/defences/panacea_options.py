"""Panacea's hyper-parameters: what they may be, what they come to, and what they cost. The method itself is in ``panacea.py``.

The first six are the paper's and its public code's, but for K. The others are ours, all off by default.
"""

import dataclasses
from typing import Literal

from panacea_jax.defences.protocol import Defence, StreamSpec, check_counts, check_not_negative
from panacea_jax.defences.steering import OF_AUTO, Steering
from panacea_jax.errors import InputError
from panacea_jax.perturbation import LayerRule


@dataclasses.dataclass(frozen=True)
class PanaceaOptions(Defence):
    """Hyper-parameters of :class:`~panacea_jax.defences.panacea.Panacea`.

    Attributes:
        rho: ρ, L2 radius of ε over all trainable tensors together; a tuple gives one radius a layer; "auto": λ and ρ are steered by
            what is measured, see ``steering.py``, and ``lam`` is without effect.
        lam: λ, weight of the training term.
        ascent_steps: K, projected ascent steps that find ε; 1 is the paper's closed form.
        every: k, refresh ε and ``h' − h`` at every k-th step.
        clamp: "reference" stops the gradient of the perturbed loss above 5, which leaves ``g + λ h``; "none" never does.
        final_epsilon: "last" deploys the ε of the last step (one batch, as the reference); "mean" recomputes it after training from
            the gradient over the whole harmful set.
        rho_per_layer: radii of the layers, which share out ρ: "uniform", "proportional", "inverse", "top:k", a file, or one value a
            layer; "": one radius over all. See ``perturbation/radii.py``.
        layer_file: coefficients for "proportional", "inverse" and "top:k"; "": the layer norms of the gradient over the whole harmful
            set at the start.
        layer_seed: of the order in which the radii are dealt out, as a control; None: each layer has its own.
        tau: τ; λ‖h' − h‖ is at most τ‖g‖. None or 0: no cap.
        rho_relative: ρ is this share of ‖w − w₀‖, in place of ``rho``.
        ceiling: ρ shrinks while L_harm(w + ε) is above this multiple of L_harm(w₀). None or 0: it does not.
        by_poison: λ is multiplied by the estimated share of harm in the user's records.
        start: share of the steps, below 1, that are plain SFT before the defence begins.
        between: the term at steps without harmful passes: "reuse" the last one, or "skip" it, with a λ of k times the size.
        trusted: sets of the defender's, "benign" or "alignment", whose loss is lowered at w + ε.
        trust: weight of that loss.
        off: gradients that ε is orthogonal to, with radii by layer in each layer: "user" (the step's own), "benign", "alignment".
    """

    rho: float | int | str | tuple[float | str, ...] = 1.0
    lam: float | int = 1e-3
    ascent_steps: int = 1
    every: int = 1
    clamp: Literal["reference", "none"] = "reference"
    final_epsilon: Literal["last", "mean"] = "last"
    rho_per_layer: str | tuple[float, ...] = ""
    layer_file: str = ""
    layer_seed: int | None = None
    tau: float | int | None = None
    rho_relative: float | int | None = None
    ceiling: float | int | None = None
    by_poison: bool = False
    start: float | int = 0.0
    between: Literal["reuse", "skip"] = "reuse"
    trusted: tuple[str, ...] = ()
    trust: float | int = 1.0
    off: tuple[str, ...] = ()
    _steps: int = 0  # of the whole training, told by ``for_steps``

    def __post_init__(self) -> None:
        self._check_radius()
        named = ("lam", "tau", "rho_relative", "ceiling", "trust")
        given = {name: getattr(self, name) for name in named}
        check_not_negative(**{name: x for name, x in given.items() if x is not None})
        check_counts(ascent_steps=self.ascent_steps, every=self.every)
        if not 0 <= self.start < 1:
            raise InputError(f"config.defence.start = {self.start}: a share of the steps, 0 or more, below 1")
        self._check_words("clamp", "reference", "none")
        self._check_words("final_epsilon", "last", "mean")
        self._check_words("between", "reuse", "skip")
        self._check_sets("trusted", "benign", "alignment")
        self._check_sets("off", "user", "benign", "alignment")
        if "user" in self.off and self.final_epsilon == "mean":
            raise InputError("config.defence.off: 'user' does not go with final_epsilon = mean, which has no user records to look at")

    def _check_radius(self) -> None:
        radii = self.rho if isinstance(self.rho, tuple) else (self.rho,)
        if self.rho != "auto" and not all(not isinstance(r, str) and 0 <= r < float("inf") for r in radii):
            raise InputError(f"config.defence.rho = {self.rho}: a radius is a finite number, 0 or more, or auto")
        if self._layers and isinstance(self.rho, tuple):
            raise InputError(f"config.defence.rho_per_layer = {self.rho_per_layer}: rho = {self.rho} is one radius a layer already")
        if self.rho_relative and isinstance(self.rho, tuple):
            raise InputError(f"config.defence.rho_relative = {self.rho_relative} would take the place of rho = {self.rho}: set one of them")

    def _check_words(self, key: str, *known: str) -> None:
        if (chosen := getattr(self, key)) not in known:
            raise InputError(f"config.defence.{key} = {chosen!r}: {' or '.join(map(repr, known))}")

    def _check_sets(self, key: str, *known: str) -> None:
        chosen = getattr(self, key)
        if len(set(chosen)) < len(chosen) or not set(chosen) <= set(known):
            raise InputError(f"config.defence.{key} = {chosen!r}: {' or '.join(map(repr, known))}, each once")

    # ---- what they come to

    @property
    def _layers(self) -> LayerRule:
        """How ρ is shared out among layers; false: it is not."""
        return LayerRule(self.rho_per_layer, self.layer_file, self.layer_seed)

    @property
    def _steering(self) -> Steering:
        """What sets λ and ρ; false: they stand still. Of "auto", a piece whose key is set has that."""
        boost = 1 if self._holds else self.every
        if self.rho != "auto":
            return Steering(self.lam * boost, self.tau, self.rho_relative, self.ceiling, self.by_poison)
        given = {name: getattr(self, name) for name in ("tau", "rho_relative", "ceiling")}
        given = {name: x for name, x in given.items() if x is not None}
        return dataclasses.replace(OF_AUTO, lam=OF_AUTO.lam * boost, **given)

    @property
    def _holds(self) -> bool:
        """Whether ``h' − h`` is kept for the steps between."""
        return self.every > 1 and self.between == "reuse"

    @property
    def _first(self) -> int:
        """Number of the first step that is not plain SFT, counted from 0.

        Raises:
            ValueError: the number of steps is not known, see ``for_steps``.
        """
        if self.start and not self._steps:
            raise ValueError("Panacea.start: call for_steps with the number of steps first")
        return int(self.start * self._steps)

    def for_steps(self, steps: int) -> "PanaceaOptions":
        """Told when the defence begins.

        Raises:
            InputError: the harmful passes are made before the first update alone, where ρ relative to ‖w − w₀‖ is 0.
        """
        if self._steering.rho_relative and not self.start and self.every >= steps > 1:
            alone = f"of {steps} steps the first alone would look for ε, where ‖w − w₀‖ is 0, and ρ with it"
            raise InputError(f"config.defence.every = {self.every}: {alone}")
        return dataclasses.replace(self, _steps=steps) if self.start else self

    def check(self, full_parameters: bool) -> None:
        """Raises:
        InputError: radii by layer for all weights, or from a file that cannot be used.
        """
        key = "rho_per_layer" if self._layers else "rho"
        if full_parameters and (self._layers or isinstance(self.rho, tuple)):
            raise InputError(
                f"config.defence.{key} = {getattr(self, key)}: one radius a layer is for adapters; of all weights some belong to no layer"
            )
        self._layers.check()

    # ---- what they draw on

    @property
    def files(self) -> tuple[str, ...]:
        """That of the layers' radii."""
        return self._layers.files

    @property
    def streams(self) -> dict[str, StreamSpec]:
        """Passes averaged over all steps; over the whole harmful set those of the mean ε, of a look at its layers, and of L_harm(w₀)."""
        defended = 1 - self.start
        refreshed = defended / self.every
        last = float(self.ascent_steps) if self.final_epsilon == "mean" else 0.0
        whole = last + self._layers.probes + (0.5 if self._steering.ceiling else 0.0)
        found = {"harmful": StreamSpec((1 + self.ascent_steps) * defended / self.every, whole)}
        for name in dict.fromkeys((*self.trusted, *self.off)):
            if name != "user":
                trusted, off = name in self.trusted, name in self.off
                found[name] = StreamSpec(trusted * defended + off * refreshed, float(off and last > 0))
        return found
