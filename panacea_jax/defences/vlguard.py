"""VLGuard: safe records among the user's (arXiv 2402.02207; as a baseline in the code of Vaccine, Lisa, Booster and others).

    mode "mix":   min_w  L(w; user ∪ alignment)                 plain SFT on the union
    mode "sum":   min_w  L_task(w) + λ L_align(w)

Stage: fine-tuning. Passes per step: 1 ("mix"), 2 ("sum": one on each batch). Extra memory: a second gradient ("sum"). Extra data:
``alignment``.

Two baselines go by this name. "mix" appends the first ``config.data.num_alignment`` records of ``config.data.alignment`` to the poisoned
user set, whose own records stay as they are, as in the code of Vaccine and T-Vaccine (with 100 records; the copies of Lisa and Antidote
take as many from the user's benign ones). An epoch is longer for it. "sum" is that of Booster and Panacea. Not reproduced: some copies of
the public code cannot run, for want of an argument or of a usable index.
"""

import dataclasses
from typing import ClassVar, Literal

import jax

from panacea_jax.defences.protocol import (
    Batches,
    Defence,
    Facts,
    Gradient,
    LossFn,
    Params,
    RandomKey,
    Stage,
    State,
    StreamSpec,
    check_not_negative,
)
from panacea_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Vlguard(Defence):
    """SFT on safe records too, in the same batches or beside them.

    Attributes:
        mode: "mix" the alignment records into the user set, or "sum" the losses of a batch of each.
        lam: λ, weight of the alignment loss; of "sum" only. 0.1 is the scripts'; the code's own default is 0.001.
    """

    mode: Literal["mix", "sum"] = "mix"
    lam: float | int = 0.1

    stage: ClassVar[Stage] = "finetune"
    facts: ClassVar[Facts] = Facts(
        title="VLGuard",
        paper="arXiv 2402.02207",
        memory="a second gradient (sum)",
        code="both forms of the public code; the user's records are not reduced",
    )

    def __post_init__(self) -> None:
        if self.mode not in ("mix", "sum"):
            raise InputError(f"config.defence.mode = {self.mode!r}: 'mix' or 'sum'")
        check_not_negative(lam=self.lam)

    @property
    def streams(self) -> dict[str, StreamSpec]:
        """The alignment records, where they come in batches of their own."""
        return {"alignment": StreamSpec(passes=1)} if self.mode == "sum" else {}

    @property
    def mixed(self) -> tuple[str, ...]:
        """The sets whose records join the user's."""
        return ("alignment",) if self.mode == "mix" else ()

    def gradient(
        self, loss_fn: LossFn, params: Params, batches: Batches, state: State, key: RandomKey
    ) -> Gradient:
        """``∇ L_task(w)``, and ``+ λ ∇ L_align(w)`` in mode "sum"."""
        loss, g = jax.value_and_grad(loss_fn)(params, batches["user"])
        if self.mode == "mix":
            return g, state, {"loss": loss}
        safe_loss, s = jax.value_and_grad(loss_fn)(params, batches["alignment"])
        grads = jax.tree.map(lambda g, s: g + self.lam * s, g, s)
        return grads, state, {"loss": loss, "alignment_loss": safe_loss}
