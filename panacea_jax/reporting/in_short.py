"""What a comparison with plain fine-tuning comes to, in sentences: was harm done, did a method undo it, and at what price."""

from collections.abc import Iterator, Sequence

from panacea_jax.reporting.outcomes import HEADLINES, TITLES, Estimate, Found, Outcome, ToSft
from panacea_jax.reporting.parts import Section

_SFT, _PERPLEXITY = "sft", "perplexity"
MODELS = 12
"""Fine-tuned models of which sentences are made; of more the tables are the shorter reading."""
SHOWN_BELOW = 0.05
"""A p below it is said to be a difference."""


def short_section(found: Found) -> Section | None:
    """A line for plain fine-tuning and one for every other method, case by case, and what the figures cannot decide.

    Only where every method was tested against SFT on the same prompts: in a comparison.
    """
    tuned = [o for o in found.outcomes if o.attacked]
    cases = list(dict.fromkeys(o.case for o in tuned if o.to_sft))
    if not cases or len(tuned) > MODELS:
        return None
    text = []
    for case in cases:
        group = [o for o in tuned if o.case == case]
        head = f"{case}: " if len(cases) > 1 else ""
        for sft in (o for o in group if o.method == _SFT and "hs" in o.figures):
            text.append(head + _fine_tuning(sft, found.before(sft)))
        text += [head + _method(o) for o in group if o.to_sft]
    text.append(
        "HS: harmful requests that were answered, of all of them; FA: right answers to the user's test records, by equality where they are "
        "free text; benign answered: harmless requests that were neither refused nor answered by nothing. "
        f"p: the test that the notes below name; from {SHOWN_BELOW:g} on it is said that no difference is shown, which does not show that "
        "there is none. Which figures are good enough is for bounds of your own: `panacea verify` holds a model to them."
    )
    return Section("In short", text)


def _fine_tuning(sft: Outcome, before: Sequence[Outcome]) -> str:
    """What plain fine-tuning did to HS."""
    after = sft.figures["hs"]
    start = [o.figures["hs"] for o in before if "hs" in o.figures]
    if not start:
        return f"Plain fine-tuning: HS {after} %."
    said = f"Plain fine-tuning: HS {start[0]} % before it, {after} % after."
    if surprise := [o.costs[_PERPLEXITY] for o in (*before, sft) if _PERPLEXITY in o.costs]:
        said += f" {_PERPLEXITY.capitalize()} of ordinary answers: {' before, '.join(surprise[-2:])} after."
    if len(start) > 1 or _above(after, start[0]):
        return said
    advice = "" if sft.ratio else " To see what a defence does against harmful records, have some mixed in: config.data.attack."
    return f"{said} These prompts do not show that it did harm, so there is none that a defence could be seen to undo.{advice}"


def _above(after: Estimate, before: Estimate) -> bool:
    """Whether the intervals lie apart; where there are none, the means."""
    if after.low is None or before.high is None:
        return after.mean > before.mean
    return after.low > before.high


def _method(outcome: Outcome) -> str:
    """A method beside plain fine-tuning."""
    return f"{outcome.method}, beside plain fine-tuning: {'; '.join(_differences(outcome))}."


def _differences(outcome: Outcome) -> Iterator[str]:
    for name in HEADLINES:
        if name == "hs_plus" or name not in outcome.to_sft:  # HS+ says nearly the same
            continue
        yield f"{TITLES[name]} {outcome.figures[name]} %, {_said(outcome.to_sft[name])}"
    if _PERPLEXITY in outcome.costs:
        yield f"{_PERPLEXITY} {outcome.costs[_PERPLEXITY]}"


def _said(difference: ToSft) -> str:
    points, p = difference
    chance = "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
    if not points:
        return "the same"
    if p >= SHOWN_BELOW:
        return f"no difference shown ({points:+.1f} points, {chance})"
    return f"{abs(points):.1f} points {'lower' if points < 0 else 'higher'} ({chance})"
