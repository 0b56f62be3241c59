"""Warnings for the known ways in which a run goes wrong, each given once."""

import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

WINDOW = 50

# Thresholds: where they come from is in docs/diagnostics.md.
INERT = 1e-2
LARGE_RHO = 0.2
HIGH_COSINE = 0.5
UNSTABLE_COSINE = 0.2
POISON = 0.3
RISING = 1.2
# Robust standard deviations from which on a loss is a spike; the least that one is taken to be, in nats; losses that are needed to tell;
# spikes that are told in a line of their own.
SPIKE, SCATTER, ENOUGH, TOLD = 8.0, 0.05, 20, 10


class Spike(NamedTuple):
    """A loss that stands out; ``told``: it is to be said, as the first of those that follow each other."""

    text: str
    told: bool


class Diagnostics:
    """Watches the metrics of a run and returns warnings."""

    def __init__(self, steps: int, spike: float = SPIKE) -> None:
        """
        Args:
            steps: length of the run; ρ is held against the distance moved in its second half only, since that grows from 0.
            spike: robust standard deviations above the median of the steps before from which on a loss is one; 0: none is.
        """
        self._steps, self._threshold = steps, spike
        self._spiking, self._spikes = False, 0
        self._history: dict[str, deque[float]] = {}
        self._given: set[str] = set()
        self._first_loss: float | None = None

    def spike(self, metrics: Mapping[str, float]) -> Spike | None:
        """Whether a step's loss stands out from those observed before it. Median and scatter (1.4826 times the median distance from it) are
        those of up to 50 steps, so that a spike moves neither."""
        before = self._history.get("loss", ())
        if not self._threshold or metrics.get("alignment_state") or len(before) < ENOUGH:
            return None
        median = statistics.median(before)
        scatter = max(SCATTER, 1.4826 * statistics.median(abs(x - median) for x in before))
        above = (metrics["loss"] - median) / scatter
        first, self._spiking = not self._spiking, above > self._threshold
        if not self._spiking:
            return None
        self._spikes += first
        last = "; further spikes stand in metrics.jsonl alone" if self._spikes == TOLD else ""
        text = (
            f"the task loss jumped to {metrics['loss']:.3f}, {above:.0f} robust standard deviations above {median:.3f}, the median of the "
            f"{len(before)} steps before{last}"
        )
        return Spike(text, first and self._spikes <= TOLD)

    def observe(self, step: int, metrics: dict[str, float]) -> list[str]:
        """Take in one step; return the warnings that it triggers for the first time."""
        # Lisa's loss in its alignment state is not that of the task.
        elsewhere = {"loss"} if metrics.get("alignment_state") else set()
        for name, value in metrics.items():
            if math.isfinite(value) and name not in elsewhere:
                self._history.setdefault(name, deque(maxlen=WINDOW)).append(value)
        found = []
        if metrics.get("clamped", 0) > 0:
            found.append(("clamped", "the harmful loss at w + ε passed 5: the clamp removes h', the update is g + λh "
                          "(less ρ, or defence.clamp=none)"))  # fmt: skip
        # A steered λ goes to 0 without poison; with rho = auto there is none to raise.
        meant = "; where λ goes by the poison, as with defence.rho=auto, it is meant to be without any" if "lam" in metrics else ""
        checks: tuple[tuple[str, Callable[[float], bool], str], ...] = (
            ("term_ratio", lambda m: m < INERT, f"λ‖h'−h‖/‖g‖ = {{:.1e}}: the training term is inert (raise λ or ρ{meant})"),
            ("rho_displacement", lambda m: m > LARGE_RHO,
             "ρ is {:.2f} of the distance moved ‖w − w₀‖: ε may undo the task (lower ρ)"),
            ("cos_gh", lambda m: m > HIGH_COSINE,
             "cos(g, h) = {:.2f}: the user's data pull the weights the way the harmful set does"),
            ("epsilon_cosine", lambda m: m < UNSTABLE_COSINE,
             "ε turns from step to step (cosine {:.2f}): noisy harmful data (larger train.harmful_batch_size, or "
             "defence.final_epsilon=mean)"),
            ("poison_estimate", lambda m: m > POISON,
             "the harmful share of the user's response tokens is estimated at {:.0%}: much to defend against; check HS and FA"),
        )  # fmt: skip
        for name, bad, text in checks:
            mean = self._mean(name)
            early = name == "rho_displacement" and 2 * step < self._steps
            if mean is not None and bad(mean) and not early:
                found.append((name, text.format(mean)))
        found += self._rising()
        fresh = [(name, text) for name, text in found if name not in self._given]
        self._given |= {name for name, _ in fresh}
        return [f"step {step}: {text}" for _, text in fresh]

    def state(self) -> dict[str, Any]:
        """What a resumed run goes on from, as JSON takes it."""
        history = {name: list(values) for name, values in self._history.items()}
        return {
            "history": history, "given": sorted(self._given), "first_loss": self._first_loss,
            "spiking": self._spiking, "spikes": self._spikes,
        }  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state()`` of the run that was stopped."""
        self._history = {n: deque(values, WINDOW) for n, values in state["history"].items()}
        self._given, self._first_loss = set(state["given"]), state["first_loss"]
        self._spiking, self._spikes = state.get("spiking", False), state.get("spikes", 0)

    def _mean(self, name: str) -> float | None:
        """Mean over a full window, else None: one noisy step is no finding."""
        values = self._history.get(name, ())
        return sum(values) / WINDOW if len(values) == WINDOW else None

    def _rising(self) -> list[tuple[str, str]]:
        loss = self._mean("loss")
        if loss is None:
            return []
        if self._first_loss is None:
            self._first_loss = loss
        if loss > RISING * self._first_loss:
            return [
                (
                    "rising",
                    f"the task loss rose from {self._first_loss:.3f} to {loss:.3f} (lower the learning rate or λ)",
                )
            ]
        return []
