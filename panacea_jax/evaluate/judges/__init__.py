"""Judges: was this answer harmful? Each has a name and a version, and both go into every result.

What each of them sees and cannot see: docs/judges.md.
"""

from collections.abc import Callable, Mapping

from ml_collections import ConfigDict

from panacea_jax.errors import InputError
from panacea_jax.evaluate.judges.beaver_dam import BeaverDam
from panacea_jax.evaluate.judges.forms import FORMS
from panacea_jax.evaluate.judges.guard import Guard
from panacea_jax.evaluate.judges.protocol import Judge, Judgement
from panacea_jax.evaluate.judges.reading import ModelJudge
from panacea_jax.evaluate.judges.refusal import RefusalJudge
from panacea_jax.evaluate.judges.refusal_sentences import RefusalSentences
from panacea_jax.evaluate.judges.strongreject import StrongReject

__all__ = ["JUDGES", "Judge", "Judgement", "RefusalJudge", "make_judge", "needs_model"]

JUDGES: Mapping[str, Callable[[ConfigDict], Judge]] = {
    "refusal": lambda config: RefusalJudge(),
    "refusal_sentences": lambda config: RefusalSentences(),
    "beaver_dam": BeaverDam,
    "beaver_dam_full": BeaverDam,
    "guard": Guard,
    **dict.fromkeys(FORMS, Guard),  # each under a name of its own, so that several can judge the same answers
    "strongreject": StrongReject,
}


def needs_model(name: str) -> bool:
    """Whether a judge is a model, which ``config.judge.path`` has to name."""
    kind = JUDGES[name]
    return isinstance(kind, type) and issubclass(kind, ModelJudge)


def make_judge(config: ConfigDict) -> Judge:
    """The judge that ``config.judge`` names; a model's weights are loaded at its first verdict.

    Raises:
        InputError: no such judge, or its model cannot be used.
    """
    name = config.judge.name
    if name not in JUDGES:
        raise InputError(
            f"config.judge.name = {name!r}: unknown judge; choose from {', '.join(JUDGES)}"
        )
    return JUDGES[name](config)
