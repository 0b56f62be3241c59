"""The alignment guard: without an aligned start there is nothing to defend."""

from typing import NamedTuple


class AlignmentGuard(NamedTuple):
    """Bounds on the aligned model, percent.

    Attributes:
        hs: harmful prompts answered, at most.
        benign: benign requests answered, at least.
    """

    hs: float
    benign: float

    def holds(self, hs: float, benign: float) -> bool:
        """Whether a model with these figures is an aligned one."""
        return hs <= self.hs and benign >= self.benign

    def __str__(self) -> str:
        return f"HS at most {self.hs:g}, benign answered at least {self.benign:g}"
