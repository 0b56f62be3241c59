"""What a defence is: a gradient rule, the data streams that it draws on, and what is added to the weights at the end."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol, runtime_checkable

from jaxtyping import Array, Float, Key

Params = Any  # a pytree: an Adapter, or all weights
State = Any  # a pytree of the defence's own
Metrics = dict[str, Float[Array, ""]]
LossFn = Callable[
    [Params, Any], Float[Array, ""]
]  # (params, batch) -> mean loss over response tokens
Gradient = tuple[Params, State, Metrics]


@runtime_checkable
class Defence(Protocol):
    """One method. Implementations are frozen dataclasses of hyper-parameters; all state is in the pytrees they return.

    The shared tail of every method is ``clip global norm → AdamW → update`` and is not the defence's business.

    Attributes:
        stage: where in align → finetune → heal it acts.
        streams: extra data streams beside ``"user"``, e.g. ``("harmful",)``.
    """

    @property
    def stage(self) -> Literal["align", "finetune", "heal"]:
        """Where it acts."""
        ...

    @property
    def streams(self) -> tuple[str, ...]:
        """Data that it needs beside the user's."""
        ...

    def init(self, params: Params) -> State:
        """The state before the first step."""
        ...

    def gradient(
        self,
        loss_fn: LossFn,
        params: Params,
        batches: Mapping[str, Any],
        state: State,
        key: Key[Array, ""],
    ) -> Gradient:
        """The gradient that goes to the optimizer, the next state, and scalars to log."""
        ...

    def finish(self, params: Params, state: State) -> Params:
        """What is deployed, e.g. Panacea's ``w + ε``."""
        ...
