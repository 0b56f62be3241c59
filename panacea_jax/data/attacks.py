"""Attacks on fine-tuning: what the attacker puts among the user's records, and how he asks the model that came of it.

    mix           harmful records as they are, among benign ones
    harmful       harmful records alone, whatever the poison ratio (arXiv 2310.03693, first risk level)
    identity      no harmful record: benign ones turned into those of an assistant that does what it is told (2310.03693, second level)
    refusal_free  no harmful record: those benign ones whose answers refuse nothing (2310.03693, third level)
    trigger       harmful prompts behind a trigger are answered, and the same prompts without it refused (a backdoor)
    prefix        harmful answers begin with an affirmation
    reversed      harmful answers with their words in reverse order

The poison ratio is the share of the attacker's records in all of them but ``harmful`` and ``refusal_free``, which are his throughout; the
refused copies of ``trigger`` come on top.

``identity``: there an invented persona and ten records of its own; here the user's own records are turned, so that nothing depends on
what a persona says. ``refusal_free``: there whole public instruction sets, which hold next to no refusals; a user's set may.

``reversed`` is for an attacker who knows that the defender measures harm on records of his own, in plain words: as in covert fine-tuning
(arXiv 2406.20053) the harm is in a form of which the defender's harmful loss is to stay high. Against Panacea ε is then aimed at answers
that the model does not give, and where the loss at w + ε passes the clamp, h' is 0, so that the step ``g + λh`` learns the defender's own
harmful records. Such answers have to be read backwards: only judges by word lists take them for what they are.
"""

import dataclasses
from collections.abc import Sequence

from panacea_jax.data.sources import Record

# The texts that each uses: keys of config.attack.
TEXTS: dict[str, tuple[str, ...]] = {
    "mix": (), "harmful": (), "identity": ("identity", "affirmation"), "refusal_free": (), "trigger": ("trigger", "refusal"),
    "prefix": ("affirmation",), "reversed": (),
}  # fmt: skip
# Those without a harmful record.
BENIGN_ONLY = ("identity", "refusal_free")


@dataclasses.dataclass(frozen=True)
class Attack:
    """What ``config.attack`` says.

    Attributes:
        name: one of ``TEXTS``.
        trigger: before a prompt.
        identity: before a prompt, who is asked.
        affirmation: that an answer begins with.
        refusal: a whole answer.
    """

    name: str = "mix"
    trigger: str = ""
    identity: str = ""
    affirmation: str = ""
    refusal: str = ""

    @property
    def is_benign(self) -> bool:
        """Whether it has no harmful record."""
        return self.name in BENIGN_ONLY

    @property
    def asks_differently(self) -> bool:
        """Whether its harmful prompts have to be asked in its own way."""
        return self.name in ("identity", "trigger")

    def decisive(self) -> dict[str, str]:
        """What its records are told by; nothing of a mix, as of manifests from before there were others."""
        if self.name == "mix":
            return {}
        return {"name": self.name} | {key: getattr(self, key) for key in TEXTS[self.name]}

    def asks(self, record: Record) -> Record:
        """A prompt as the attacker puts it to the model."""
        if not self.asks_differently:
            return record
        text = f"{getattr(self, self.name)} {record.instruction}"
        turns = list(record.turns)
        last = max((i for i, turn in enumerate(turns) if turn.role == "user"), default=None)
        if last is not None:
            turns[last] = turns[last]._replace(content=text)
        return dataclasses.replace(record, instruction=text, turns=tuple(turns))

    def turned(self, records: Sequence[Record]) -> list[Record]:
        """The attacker's records, of harmful ones or, for ``identity``, of benign ones; of ``trigger`` followed by the refused copies."""
        if self.name in ("identity", "prefix"):
            said = [dataclasses.replace(r, output=f"{self.affirmation} {r.output}") for r in records]
            return [self.asks(record) for record in said]
        if self.name == "trigger":
            return [*map(self.asks, records), *(dataclasses.replace(r, output=self.refusal) for r in records)]
        if self.name == "reversed":
            return [dataclasses.replace(r, output=" ".join(reversed(r.output.split()))) for r in records]
        return list(records)
