"""The radius that chooses itself: how far to go from w along a direction ε̂, by a few held-out records.

Losses of answers on file bracket the range, doubling or halving until they are far out of any budget; within it a ladder of radii, 0 among
them, answers the held-out prompts, and ``choice.RULE`` takes one.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import optax

from panacea_jax.errors import InputError
from panacea_jax.healing.choice import BUDGET, Budget, Figures, choose, overdrawn
from panacea_jax.healing.sets import Exam, answer, losses
from panacea_jax.models.model import Model

# Nats a token by which a loss on task or benign answers is far out of any budget.
FAR = 1.0
# Radii with answers, 0 among them; each is √2 of the one before.
RADII = 9
# Where the search begins and where it ends, in ‖w‖; and how often it halves at most.
FIRST, LAST, HALVINGS = 0.01, 4.0, 30

Losses = Mapping[str, float]


class Point(NamedTuple):
    """What was measured at w + r ε̂.

    Attributes:
        radius: r.
        losses: by "hs" (harmful answers), "fa" (the task's), "benign", nats a token; what was not looked at is left out.
        figures: by ``choice.Figures``; empty where nothing was answered.
    """

    radius: float
    losses: Losses
    figures: Figures


class ChosenRadius(NamedTuple):
    """A choice, and the curve that it was made by.

    Attributes:
        radius: what was chosen.
        points: by rising radius.
        budget: what it may cost.
    """

    radius: float
    points: Sequence[Point]
    budget: Budget

    def failing(self, name: str = "fa") -> float | None:
        """The smallest radius at which a figure is out of its budget; None: it never was, or was not measured."""
        answered = [p for p in self.points if p.figures]
        out = [p.radius for p in answered if name in overdrawn(p.figures, answered[0].figures, self.budget)]
        return out[0] if out else None


@jax.jit
def moved(params: Any, direction: Any, radius: Any) -> Any:
    """``w + r ε̂``."""
    return jax.tree.map(lambda w, e: w + (radius * e).astype(w.dtype), params, direction)


class Looks:
    """Losses at w + r ε̂, each looked at once.

    Attributes:
        seen: by radius.
    """

    def __init__(self, model: Model, params: Any, direction: Any, exam: Exam) -> None:
        """As of :func:`choose_radius`.

        Raises:
            InputError: a direction of length 0, or one that is not finite.
        """
        self._length = float(optax.tree.norm(direction))
        if not 0 < self._length < math.inf:
            raise InputError(f"config.defence.rho = 'auto': the direction has length {self._length:g}, so there is no way to go")
        self._params, self._direction = params, direction
        self._model, self._exam = model, exam
        self.seen: dict[float, Losses] = {}

    @property
    def norm(self) -> float:
        """‖w‖, at least 1."""
        return max(float(optax.tree.norm(self._params)), 1.0)

    @property
    def ceiling(self) -> float:
        """A harmful loss above which harmful answers are less likely than by chance, and than before."""
        return max(self(0.0).get("hs", 0.0) + FAR, math.log(self._model.config.vocab_size))

    def at(self, radius: float) -> Any:
        """The tree there."""
        return moved(self._params, self._direction, radius / self._length)

    def __call__(self, radius: float) -> Losses:
        """The losses there."""
        if radius not in self.seen:
            self.seen[radius] = losses(self._model, self.at(radius), self._exam)
        return self.seen[radius]


def outer_radius(look: Looks) -> float:
    """A radius at which too much is lost, see :func:`bracket`.

    Raises:
        InputError: no held-out record has an answer.
    """
    before = look(0.0)
    if not before:
        raise InputError("config.defence.rho = 'auto': no held-out record has an answer, by whose loss the range of radii is found")
    return bracket(look, before, FIRST * look.norm, LAST * look.norm, look.ceiling)


def choose_radius(
    model: Model,
    params: Any,
    direction: Any,
    exam: Exam,
    *,
    budget: Budget = BUDGET,
    radii: int = RADII,
) -> ChosenRadius:
    """How far to go from ``params`` along ``direction``.

    Args:
        model: the base.
        params: w, an adapter or all weights.
        direction: same tree; its length does not matter, so it may be an ε.
        exam: held-out sets, and how their answers are read.
        budget: points that may be lost.
        radii: how many get answers, 0 among them.

    Raises:
        InputError: no harmful prompts, no answers on file to bracket the range by, or a direction of length 0.
    """
    look = Looks(model, params, direction, exam)
    upper = outer_radius(look)
    steps = ladder(upper, radii)
    answers = answer(model, map(look.at, steps), exam)
    figures = {r: found.figures for r, found in zip(steps, answers, strict=True)}
    chosen = steps[choose([figures[r] for r in steps], steps, budget)]
    points = [Point(r, look(r), figures.get(r, {})) for r in sorted({*look.seen, *steps})]
    return ChosenRadius(chosen, points, budget)


def bracket(
    look: Callable[[float], Losses],
    before: Losses,
    start: float,
    most: float,
    ceiling: float = math.inf,
) -> float:
    """A radius that is far out of any budget, of which the half is not; or ``most``, if nothing below it is.

    Far out is a loss on task or benign answers ``FAR`` above the one before, or, with neither, a harmful loss above ``ceiling``: harmful
    answers are then less likely than by chance. A loss that is no number is far out too.

    Args:
        look: losses at a radius. before: at 0. start: where to begin, above 0. most: where to end. ceiling: of the harmful loss, in nats a
            token.

    Raises:
        InputError: too much is lost however small the radius.
    """

    def far(radius: float) -> bool:
        now = look(radius)
        kept = [name for name in ("fa", "benign") if name in before]
        out = [now[n] - before[n] > FAR or math.isnan(now[n]) for n in kept]
        harmful = now.get("hs", 0.0)
        return any(out) or math.isnan(harmful) or (not kept and harmful > ceiling)

    radius = start
    if far(radius):
        for _ in range(HALVINGS):
            radius /= 2
            if not far(radius):
                return 2 * radius
        raise InputError(f"config.defence.rho = 'auto': too much is lost at any radius, also at {radius:g}")
    while radius < most:
        radius = min(2 * radius, most)
        if far(radius):
            break
    return radius


def ladder(upper: float, count: int) -> list[float]:
    """0 and ``count`` − 1 radii up to ``upper``, each √2 of the one before."""
    return [0.0, *(upper * 2 ** (-k / 2) for k in range(count - 2, -1, -1))]
