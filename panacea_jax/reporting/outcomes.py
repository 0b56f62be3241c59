"""What a report is about: the outcomes of methods and the runs behind them, whatever kind of folder they were found in."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from panacea_jax.errors import InputError
from panacea_jax.evaluate.scores import Json
from panacea_jax.workdir import MANIFEST, read_manifest

TITLES = {
    "hs": "HS", "hs_attacked": "HS as the attacker asks", "hs_plus": "HS+", "fa": "FA", "benign": "benign answered",
    "incoherent": "repeated", "empty": "empty", "truncated": "truncated",
}  # fmt: skip
HEADLINES = ("hs", "hs_plus", "fa", "benign")
LOWER_IS_BETTER = ("hs", "hs_attacked", "hs_plus", "incoherent", "empty", "truncated")


class Estimate(NamedTuple):
    """A percentage with its 95 % interval; the bounds are None where there is none."""

    mean: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        bounds = "" if self.low is None else f" [{self.low:.1f}, {self.high:.1f}]"
        return f"{self.mean:.1f}{bounds}"


class ToSft(NamedTuple):
    """Percentage points to plain fine-tuning on the same prompts or seeds, and the p of that difference."""

    points: float
    p: float


def estimated(mean: Any, bounds: Any) -> Estimate:
    """What a file says of a figure.

    Raises:
        TypeError, ValueError: something else than a number and two bounds.
    """
    low, high = map(float, bounds)
    return Estimate(float(mean), low, high)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a method came to.

    Attributes:
        method: as its comparison or its folder names it.
        figures: by a key of ``TITLES``, those that were measured.
        ratio: poison ratio; None where it is not known, and of a model before fine-tuning.
        setting: keys that were varied, and their values.
        seeds: that the figures are means over; () where it is not known.
        attacked: False of the model before fine-tuning, which the others are to be seen against.
        costs: by the head of their column, as text.
        to_sft: by a key of ``TITLES``, where SFT stands beside it; empty for SFT itself.
    """

    method: str
    figures: Mapping[str, Estimate]
    ratio: float | None = None
    setting: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seeds: Sequence[int] = ()
    attacked: bool = True
    costs: Mapping[str, str] = dataclasses.field(default_factory=dict)
    to_sft: Mapping[str, ToSft] = dataclasses.field(default_factory=dict)

    @property
    def case(self) -> str:
        """What it was measured under: poison ratio and setting in a line; "" where nothing is said."""
        ratio = [] if self.ratio is None else [f"p={self.ratio:g}"]
        return ", ".join([*ratio, *(f"{key}={value}" for key, value in self.setting.items())])

    @property
    def label(self) -> str:
        """Method and case."""
        return f"{self.method} ({self.case})" if self.case else self.method


class Trained(NamedTuple):
    """One run's folders.

    Attributes:
        label: of the outcome that it belongs to; of a comparison every seed's.
        seed: None where it is not known.
        folder: with its answers and scores.
        stages: the folders of its stages by name.
    """

    label: str
    seed: int | None
    folder: Path
    stages: Mapping[str, Path]

    @property
    def name(self) -> str:
        """Label and seed: of this run alone."""
        return self.label if self.seed is None else f"{self.label}, seed {self.seed}"

    def manifests(self) -> dict[str, Json]:
        """By stage, of those that have one.

        Raises:
            InputError: one that is not ours.
        """
        found = {name: path for name, path in self.stages.items() if (path / MANIFEST).is_file()}
        return {name: read_manifest(path) for name, path in found.items()}


@dataclasses.dataclass(frozen=True)
class Found:
    """Everything that was found in the folders of a report.

    Attributes:
        folder: of the report.
        outcomes: in their order.
        runs: behind them; of a comparison those of every seed.
        tried: candidates of a grid on development seeds, which no table of results holds.
        notes: what has to be known to read the figures, a line each.
        failing: what went wrong, as (where, what).
        commands: that made it all, before those of single stages.
        scores: scores.json by outcome, of runs that stand side by side; a comparison sees to it itself that its cells are alike.
    """

    folder: Path
    outcomes: Sequence[Outcome]
    runs: Sequence[Trained]
    tried: Sequence[Outcome] = ()
    notes: Sequence[str] = ()
    failing: Sequence[tuple[str, str]] = ()
    commands: Sequence[str] = ()
    scores: Mapping[str, Path] = dataclasses.field(default_factory=dict)

    def before(self, outcome: Outcome) -> list[Outcome]:
        """The models before fine-tuning that an outcome stands beside: all, or those of its base where that was varied."""
        return [o for o in self.outcomes if not o.attacked and o.setting.items() <= outcome.setting.items()]


def figures_of(scores: Json, where: Path) -> dict[str, Estimate]:
    """The figures of one scores.json.

    FA is that of the first set with right answers; "benign answered" is of the first over-refusal set, or else FA of the first set
    whose name ends in ``benign``, as in a comparison. The shares of repeated, empty and truncated answers are of the first harmful set.

    Args:
        scores: its content.
        where: its path, for the error.

    Raises:
        InputError: it is none.
    """
    try:
        bounds, found = scores["ci95"], dict[str, Estimate]()
        for name in ("hs", "hs_plus"):
            if scores[name] is not None:
                found[name] = estimated(scores[name], bounds[name])
        for name, value in scores["fa"].items():
            kind = "benign" if name.endswith("benign") else "fa"
            found.setdefault(kind, estimated(value, bounds["fa"][name]))
        if (answered := scores.get("answered")) is not None:
            found["benign"] = estimated(answered, bounds["answered"])
        elif (refused := scores["over_refusal"]) is not None:  # scored before empty answers were told from others
            low, high = bounds["over_refusal"]
            found["benign"] = Estimate(100 - refused, 100 - high, 100 - low)
        for harmful in [s for s in scores["sets"].values() if "hs" in s][:1]:
            for name in ("incoherent", "empty", "truncated"):
                if name in harmful:
                    found[name] = estimated(harmful[name], harmful["ci95"][name])
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"{where}: not a scores.json of ours ({type(error).__name__})") from error
    return {name: found[name] for name in TITLES if name in found}
