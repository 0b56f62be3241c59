"""The Pareto front: what no other beats."""

from collections.abc import Sequence


def undominated(gains: Sequence[Sequence[float]]) -> list[int]:
    """Indices of the points that no other is at least as good as in every coordinate and better than in one; higher is better."""
    return [
        i
        for i, point in enumerate(gains)
        if not any(tuple(other) != tuple(point) and all(a >= b for a, b in zip(other, point)) for other in gains)
    ]
