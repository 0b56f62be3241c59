"""Where the least time of a compiled step goes: by the scopes of our program, and operation by operation.

An operation takes at least as long as the slowest of what it computes, moves through memory and sends, by the data sheet. Added up these
are more than a plan's ``seconds``, which let all of a step overlap, and less than a measurement.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from panacea_jax.parallel.chips import Chip
from panacea_jax.planning.hlo import Operation

# Scopes of our program in the order in which they are looked for, and what they are called.
PLACES = {
    "optimizer": "optimizer", "self_attn": "attention", "mlp": "MLP", "cross_entropy": "head and loss", "lm_head": "head and loss",
    "embed": "embedding", "layers": "between layers", "defence": "defence",
}  # fmt: skip
TURNS = ("forward", "forward again", "backward")
LARGEST = 3


class Cost(NamedTuple):
    """Of some operations of a step, on one device.

    Attributes:
        seconds: at least.
        bound: what takes longest of it: compute, memory or links.
        flops: operations of matrix products.
        moved: bytes.
        sent: bytes.
    """

    seconds: float
    bound: str
    flops: float
    moved: float
    sent: float


@dataclasses.dataclass(frozen=True)
class Explained:
    """A compiled step.

    Attributes:
        places: by place in our program and turn (``TURNS``).
        largest: the operations that take longest, those of one kind and scope together: what, how often a step, cost.
        copies: what only moves data.
        wide: operations of matrix products whose operands are float32, and of all.
        exchanges: how many the text has, and how many of them nothing can overlap.
    """

    places: dict[str, dict[str, Cost]]
    largest: list[tuple[str, int, Cost]]
    copies: Cost
    wide: tuple[float, float]
    exchanges: tuple[int, int]


def explain(found: Sequence[Operation], chip: Chip) -> Explained:
    """What a step's operations cost on a chip.

    Args:
        found: see :func:`panacea_jax.planning.hlo.operations`.
        chip: its data sheet.
    """
    groups: dict[tuple[str, str], list[Operation]] = defaultdict(list)
    for operation in found:
        groups[_place(operation.name), _turn(operation.name)].append(operation)
    places: dict[str, dict[str, Cost]] = defaultdict(dict)
    for (place, turn), members in groups.items():
        places[place][turn] = _cost(members, chip)
    products = [o for o in found if o.flops]
    alike: dict[str, list[Operation]] = defaultdict(list)
    for operation in found:
        alike[f"{operation.kind}: {_short(operation.name)}"].append(operation)
    costs = ((what, sum(o.times for o in members), _cost(members, chip)) for what, members in alike.items())
    ranked = sorted(costs, key=lambda item: -item[2].seconds)
    sent = [o for o in found if o.sent]
    return Explained(
        dict(sorted(places.items(), key=lambda item: -sum(c.seconds for c in item[1].values()))),
        ranked[:LARGEST],
        _cost([o for o in found if o.kind == "copy"], chip),
        (_flops(o for o in products if o.dtype == "f32"), _flops(products)),
        (len(sent), sum(o.waits for o in sent)),
    )


def _cost(members: Sequence[Operation], chip: Chip) -> Cost:
    """Each operation at its own slowest, one after the other."""
    total, by = 0.0, dict.fromkeys(("compute", "memory", "links"), 0.0)
    for o in members:
        seconds = {
            "compute": o.times * o.flops / (chip.flops / chip.devices),
            "memory": o.times * o.moved / (chip.bandwidth / chip.devices) * (not o.sent),
            "links": o.sent / (chip.links / chip.devices),
        }
        bound = max(seconds, key=lambda kind: seconds[kind])
        by[bound] += seconds[bound]
        total += seconds[bound]
    bound = max(by, key=lambda kind: by[kind])
    return Cost(total, bound, _flops(members), sum(o.times * o.moved for o in members), sum(o.sent for o in members))


def _flops(members: Iterable[Operation]) -> float:
    return sum((o.times * o.flops for o in members), 0.0)


def _place(name: str) -> str:
    return next((place for scope, place in PLACES.items() if scope in name), "elsewhere")


def _turn(name: str) -> str:
    return "forward again" if "rematted_computation" in name else "backward" if "transpose(" in name else "forward"


def _short(name: str) -> str:
    """Last scope, place and turn."""
    return f"{name.rpartition('/')[2] or 'unnamed'}, {_place(name)}, {_turn(name)}"
