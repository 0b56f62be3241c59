"""What a defence is: a gradient rule, the data streams that it draws on, and what is done to the weights at the end."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array, Float, Key

from panacea_jax.defences.loss import Loss
from panacea_jax.errors import InputError

Params = Any  # a pytree: an Adapter, or all weights
State = Any  # a pytree of the defence's own
Metrics = dict[str, Float[Array, ""]]
# (params, batch) -> mean loss over response tokens: all that most methods need of a Loss
LossFn = Callable[[Params, Any], Float[Array, ""]]
Gradient = tuple[Params, State, Metrics]
Stage = Literal["align", "finetune", "heal"]


class Facts(NamedTuple):
    """What is known of a method without running it; ``panacea defences`` prints them.

    Attributes:
        title: the method's name as its paper writes it.
        paper: arXiv number or where it comes from.
        passes: by stream, forward + backward passes a step; ``{"user": 1}`` is SFT. A forward pass alone counts 1/2, as
            with a frozen base (1/3 where all parameters are trained).
        memory: what it holds beyond SFT.
        code: what of the public code it reproduces and what it mends; "" where there is nothing to say.
    """

    title: str
    paper: str
    passes: Mapping[str, float | int]
    memory: str
    code: str = ""


@runtime_checkable
class Method(Protocol):
    """One method. Implementations are frozen dataclasses of hyper-parameters; all state is in the pytrees they return.

    One without a ``gradient`` acts in one shot, on weights that are finished: ``finish(params, first_pass(…, init(params)))``.

    A method may also have

    * ``first_pass(loss, params, sets, state) -> state``: a look at whole data sets before step 0 (EWC's Fisher information). ``sets``
      maps each of ``streams`` to its records once, in batches. Its outcome is part of the state, so a resumed run does not repeat it.
    * ``last_pass(loss, params, sets, state) -> state``: the same after the last step (Panacea's ε of the whole harmful set).
    * ``whole_passes``, a mapping: by stream, what these two looks cost, in forward + backward passes over the whole set; a forward pass
      alone counts 1/2. A stream that is not named is not looked at (Safe LoRA's look is at matrices, not at records).
    * ``report(params, state) -> dict``: figures for the manifest, of a method in one shot.

    Both looks are run outside jit; what they jit themselves takes ``loss`` as an argument, so that no weight becomes a constant. Further,

    * ``for_steps(steps) -> Defence``: itself, told the total number of steps before training begins (Lisa's warm-up).
    * ``mixed``: names of sets whose records join the user's, where ``streams`` names those that stay apart (VLGuard).
    * ``trained(params, state) -> mask``: which layers of which tensors a step trains, called with the state that ``gradient`` returned; the
      form of the mask is that of ``train.optimizer.Partial``. The others stand still, without weight decay or a change of their moments.
    * ``steps`` and ``benign_ratio``: its own number of steps, on refusals and, with that share, benign records in place of the user's set
      (realignment).
    * ``folders``: models that it reads beside the one that it heals, and ``check(full_parameters)``, which finds before anything is loaded
      what it cannot work with (Safe LoRA).
    * ``unpackable``: what it does that packed rows would change, in words, see ``check_packing``. Other methods may not look at rows.

    and, of its streams,

    * ``repeats``, a mapping: how many batches of a stream a step receives, woven into one (see ``data.batches.unweave``); 1 where unnamed.
    * ``paired_streams``, names: those that go with the main stream record by record.
    * ``passes``, as ``facts.passes`` but for these hyper-parameters, where they change it.
    * ``intervals``: by stream, how many steps share a batch; a stream that is not named moves on at every step.

    Attributes:
        stage: where in align → finetune → heal it acts.
        streams: extra data streams beside ``"user"``, e.g. ``("harmful",)``.
        facts: costs and origin.
    """

    stage: ClassVar[Stage]
    facts: ClassVar[Facts]

    @property
    def streams(self) -> tuple[str, ...]:
        """Extra data streams; for most methods a constant of the class."""
        ...

    def init(self, params: Params) -> State:
        """The state before the first step."""
        ...

    def finish(self, params: Params, state: State) -> Params:
        """What is deployed, e.g. Panacea's ``w + ε``."""
        ...


@runtime_checkable
class Defence(Method, Protocol):
    """A method with training steps.

    The shared tail of every method is ``clip global norm → AdamW → update`` and is not the defence's business.
    """

    def gradient(
        self,
        loss_fn: Loss,
        params: Params,
        batches: Mapping[str, Any],
        state: State,
        key: Key[Array, ""],
    ) -> Gradient:
        """The gradient that goes to the optimizer, the next state, and scalars to log ("loss" among them)."""
        ...


Sets = Mapping[str, Iterable[Any]]


def passes_of(defence: Any) -> dict[str, float | int]:
    """Passes a step by stream, in batches, of a method with its hyper-parameters; only streams that it has."""
    passes = getattr(defence, "passes", defence.facts.passes)
    return {name: n for name, n in passes.items() if name in ("user", *defence.streams)}


def for_steps(defence: Any, steps: int) -> Any:
    """The method, told the total number of steps if it asks for that."""
    return defence.for_steps(steps) if hasattr(defence, "for_steps") else defence


def mixed_of(defence: Any) -> tuple[str, ...]:
    """The sets whose records the method appends to the user's."""
    found: tuple[str, ...] = getattr(defence, "mixed", ())
    return found


def whole_passes_of(defence: Any) -> dict[str, float]:
    """Passes over whole sets, before or after the steps, by stream; empty where the method looks at none."""
    return {name: float(n) for name, n in getattr(defence, "whole_passes", {}).items()}


def extra_data(defence: Any) -> tuple[str, ...]:
    """What a method is given that plain SFT at its stage is not: names of data sets, and ``"unaligned base"`` for the weights before
    alignment. The main records of the stage are no part of it, unless the method puts others in their place."""
    names = [*defence.streams, *mixed_of(defence)]
    benign = getattr(defence, "benign_ratio", None)
    if benign is not None:  # a set of which the ratio takes nothing is not read
        names += ["alignment"] * (benign < 1) + ["benign"] * (benign > 0)
    if hasattr(defence, "folders"):
        names.append("unaligned base")
    return tuple(dict.fromkeys(names))


def check_packing(method: Method) -> None:
    """Raises:
    InputError: the method would compute something else on rows that hold several records.
    """
    why = getattr(method, "unpackable", "")
    if why:
        raise InputError(f"config.data.packing = True: {method.facts.title} {why}")


def check_not_negative(**values: float | int) -> None:
    """Raises:
    InputError: a hyper-parameter is negative, infinite or NaN; its key is named.
    """
    for name, value in values.items():
        if not 0 <= value < float("inf"):
            raise InputError(f"config.defence.{name} = {value}: a finite number, 0 or more")
