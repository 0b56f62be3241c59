"""What runs that follow each other in one process have in common: a comparison's cells, a sweep's runs, the methods of a healing."""

import dataclasses

from panacea_jax.train.entering import Kept
from panacea_jax.train.step import CompiledSteps


@dataclasses.dataclass(frozen=True)
class Shared:
    """Handed from run to run.

    Attributes:
        compiled: steps of runs that differ in their numbers only.
        kept: what the frozen layers below an adapter make of each record.
    """

    compiled: CompiledSteps = dataclasses.field(default_factory=CompiledSteps)
    kept: Kept = dataclasses.field(default_factory=Kept)
