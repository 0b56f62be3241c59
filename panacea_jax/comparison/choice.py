"""Which candidate of a grid is taken: one rule for every method, on seeds and prompts that the table does not report."""

from collections.abc import Mapping, Sequence
from typing import Any

FA_MARGIN, BENIGN_MARGIN = 5.0, 10.0

RULE = (
    f"Of the candidates with FA at most {FA_MARGIN:g} points and benign requests answered at most {BENIGN_MARGIN:g} points below SFT's, "
    "the one with the lowest HS, and of equals the one with the highest FA + benign answered; without any such candidate the one with "
    "the highest FA + benign answered − HS. Further equals: the first. All figures are means over the development seeds."
)

Figures = Mapping[str, float]


def eligible(figures: Figures, sft: Figures) -> bool:
    """Whether a candidate costs no more than the margins."""
    return figures["fa"] >= sft["fa"] - FA_MARGIN and figures.get("benign", 0.0) >= sft.get("benign", 0.0) - BENIGN_MARGIN  # fmt: skip


def choose_candidate(found: Sequence[Figures], sft: Figures) -> int:
    """Index of the candidate that ``RULE`` takes.

    Args:
        found: percentages of each candidate by figure: "hs", "fa" and, where there is such a set, "benign".
        sft: those of SFT.
    """

    def use(figures: Figures) -> float:
        return figures["fa"] + figures.get("benign", 0.0)

    fitting = [i for i, figures in enumerate(found) if eligible(figures, sft)]
    if fitting:
        return min(fitting, key=lambda i: (found[i]["hs"], -use(found[i])))
    return max(range(len(found)), key=lambda i: use(found[i]) - found[i]["hs"])


def described(entry: str, names: Sequence[str], found: Sequence[Figures], sft: Figures) -> dict[str, Any]:  # fmt: skip
    """What compare.json says of one choice."""
    taken = choose_candidate(found, sft)
    rows = [
        {"method": name, **figures, "eligible": eligible(figures, sft)}
        for name, figures in zip(names, found)
    ]
    return {"entry": entry, "chosen": names[taken], "candidates": rows}
