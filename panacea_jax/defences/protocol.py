"""What a defence is: a gradient rule, the data streams that it draws on, and what is done to the weights at the end.

:class:`Method` is the base of all, :class:`Defence` that of methods with training steps. Every member has a default that does nothing, so
a method's file holds what makes it that method; a public member that the base does not know is refused when the class is made.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple, TypeGuard, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from panacea_jax.defences.loss import Loss
from panacea_jax.errors import InputError

Params = Any  # a pytree: an Adapter, or all weights
State = Any  # a pytree of the defence's own
Metrics = dict[str, Float[Array, ""]]
# (params, batch) -> mean loss over response tokens: all that most methods need of a Loss
LossFn = Callable[[Params, Any], Float[Array, ""]]
Batches = Mapping[str, Any]  # by stream
RandomKey = Key[Array, ""]
Gradient = tuple[Params, State, Metrics]
Sets = Mapping[str, Iterable[Any]]  # by stream, each record once, in batches
Stage = Literal["align", "finetune", "heal"]
STAGES: tuple[Stage, ...] = get_args(Stage)


class Facts(NamedTuple):
    """What is known of a method without running it; ``panacea defences`` prints them.

    Attributes:
        title: the method's name as its paper writes it.
        paper: arXiv number or where it comes from.
        memory: what it holds beyond SFT.
        code: what of the public code it reproduces and what it mends; "" where there is nothing to say.
    """

    title: str
    paper: str
    memory: str
    code: str = ""


class StreamSpec(NamedTuple):
    """What a method asks of one data stream.

    Attributes:
        passes: forward + backward passes a step, in batches; SFT's over the main stream is 1. A forward pass alone counts 1/2, as with a
            frozen base (1/3 where all parameters are trained).
        whole_passes: likewise, of looks at the whole set before or after the steps.
        single_batches: likewise, of looks at single batches outside the steps, in batches.
        repeats: batches that a step receives, interleaved into one (see ``data.batches.deinterleave``).
        interval: steps that share a batch.
        paired: goes with the main stream record by record.
        first: the first so many records of the set alone, all of them in every batch and in its order; 0: the whole set, batch by batch.
        prompts: their prompts alone, so that the set needs no answers.
    """

    passes: float | int = 0
    whole_passes: float = 0.0
    single_batches: float = 0.0
    repeats: int = 1
    interval: int = 1
    paired: bool = False
    first: int = 0
    prompts: bool = False


class Method:
    """One method: a frozen dataclass of hyper-parameters. All state is in the pytrees that it returns.

    One that is not a :class:`Defence` acts in one shot, on weights that are finished: ``finish(params, first_pass(…, init(params)))``.

    Attributes:
        stage: where in align → finetune → heal it acts.
        facts: costs and origin.
        unpackable: what it does that packed rows would change, in words, see ``check_packing``. Other methods may not look at rows.
        reads_every_layer: it perturbs or reads activations of all layers, so what enters the adapted ones is not enough for it.
    """

    stage: ClassVar[Stage]
    facts: ClassVar[Facts]
    unpackable: ClassVar[str] = ""
    reads_every_layer: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Raises:
        TypeError: a public member that no base has: it would never be called. Helpers of a method's own begin with an underscore.
        """
        super().__init_subclass__(**kwargs)
        known = {name for base in cls.__mro__[1:] for name in vars(base)}
        known |= {name for base in cls.__mro__ for name in vars(base).get("__annotations__", {})}
        unknown = [name for name in vars(cls) if not name.startswith("_") and name not in known]
        if unknown and cls.__module__ != __name__:
            raise TypeError(f"{cls.__name__}.{unknown[0]}: no member of a method; begin helpers with _")  # fmt: skip

    # ---- what it draws on

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Every stage that it can act at."""
        return (self.stage,)

    @property
    def passes(self) -> float | int:
        """Forward + backward passes a step over the main stream, see :class:`StreamSpec`."""
        return 0

    @property
    def streams(self) -> dict[str, StreamSpec]:
        """Extra data streams beside ``"user"``, by the set's name."""
        return {}

    @property
    def mixed(self) -> tuple[str, ...]:
        """Names of sets whose records join the user's, where ``streams`` are those that stay apart (VLGuard)."""
        return ()

    @property
    def benign_share(self) -> float | int | None:
        """Where refusals and benign records take the place of the user's set (realignment): the share of benign ones."""
        return None

    @property
    def own_steps(self) -> int:
        """Its own number of steps; 0: that of the configuration."""
        return 0

    @property
    def folders(self) -> tuple[str, ...] | None:
        """Models that it reads beside the one that it changes, "" where one is not named; None for a method that reads none."""
        return None

    @property
    def compared(self) -> tuple[str, ...]:
        """Folders of the aligned model that it compares with, no data beside the pipeline's own; empty where none is named."""
        return ()

    @property
    def files(self) -> tuple[str, ...]:
        """Files of numbers that it reads, such as layer coefficients."""
        return ()

    def check(self, full_parameters: bool) -> None:
        """Find before anything is loaded what it cannot work with.

        Raises:
            InputError: such a thing, by its key.
        """

    def aligned_by(self, adapter: str) -> "Method":
        """Itself, told which adapter made the aligned model ("": the base is aligned), or with all parameters which folder is it."""
        return self

    # ---- what it does

    def init(self, params: Params) -> State:
        """The state before the first step; jitted."""
        return ()

    def first_pass(self, loss: Loss, params: Params, sets: Sets, state: State) -> State:
        """A look at whole data sets before step 0 (EWC's Fisher information).

        Its outcome is part of the state, so a resumed run does not repeat it. Run outside jit; what it jits itself takes ``loss`` as an
        argument, so that no weight becomes a constant.
        """
        return state

    def finish(self, params: Params, state: State) -> Params:
        """What is deployed, e.g. Panacea's ``w + ε``."""
        return params

    def epsilon(self, state: State) -> Params | None:
        """ε, of a method that has one."""
        return None

    def epsilon_mean(self, state: State) -> Params | None:
        """The running mean of ε, of a method that keeps one."""
        return None

    def record_weights(self, state: State) -> Float[Array, "N"] | None:
        """The weight of each of the user's records, of a method that learns them."""
        return None

    def report(self, params: Params, state: State) -> dict[str, Any] | None:
        """Figures for the manifest."""
        return None


class Defence(Method, ABC):
    """A method with training steps.

    The shared tail of every one is ``clip global norm → AdamW → update`` and is not the defence's business.
    """

    @property
    def passes(self) -> float | int:
        """Forward + backward passes a step over the main stream, see :class:`StreamSpec`."""
        return 1

    @abstractmethod
    def gradient(
        self, loss_fn: Loss, params: Params, batches: Batches, state: State, key: RandomKey
    ) -> Gradient:
        """The gradient that goes to the optimizer, the next state, and scalars to log ("loss" among them)."""

    def for_steps(self, steps: int) -> "Defence":
        """Itself, told the total number of steps before training begins (Lisa's warm-up)."""
        return self

    def for_records(self, records: int) -> "Defence":
        """Itself, told the number of the user's records. A method that has this gets ``Batch.numbers`` with the user's batches."""
        return self

    @property
    def by_record(self) -> bool:
        """Whether it tells the user's records apart."""
        return type(self).for_records is not Defence.for_records

    def last_pass(self, loss: Loss, params: Params, sets: Sets, state: State) -> State:
        """A look at whole data sets after the last step (Panacea's ε of the whole harmful set); run as ``first_pass``."""
        return state

    def trained(self, params: Params, state: State) -> Params | None:
        """Which layers of which tensors a step trains, by the state that ``gradient`` returned; None: all.

        The form of the mask is that of ``train.optimizer.Partial``. What is left out stands still, without weight decay or a change of
        its moments.
        """
        return None

    @property
    def at_once(self) -> bool:
        """Whether, as it is set, it takes no step after all, but acts in one shot like any other :class:`Method` (LoX of a given pair)."""
        return False

    @property
    def partial(self) -> bool:
        """Whether a step may leave layers out."""
        return type(self).trained is not Defence.trained


class LikeWeights(NamedTuple):
    """A part of a method's state that lies on the mesh as the weights of its names do: ``{"self_attn": {"q_proj": {"kernel": …}}, …}``."""

    tree: Any


class Anchor(NamedTuple):
    """w₀: the trainable tree at the start."""

    start: Params


class Anchored(Defence):
    """A defence that compares with where it started; in LoRA mode the same base with the starting adapter, no second one."""

    def init(self, params: Params) -> Anchor:
        """w₀ = w."""
        return Anchor(jax.tree.map(jnp.copy, params))


def has_steps(method: Method) -> TypeGuard[Defence]:
    """Whether a method trains; others act in one shot."""
    return isinstance(method, Defence) and not method.at_once


def passes_of(method: Method) -> dict[str, float | int]:
    """Passes a step by stream, in batches; a method in one shot has none."""
    if not has_steps(method):
        return {}
    return {"user": method.passes} | {name: s.passes for name, s in method.streams.items()}


def passes_as_received(method: Method) -> dict[str, float]:
    """Likewise, in batches as a step receives them, with ``repeats`` interleaved into one."""
    repeats = {name: spec.repeats for name, spec in method.streams.items()}
    return {name: n / repeats.get(name, 1) for name, n in passes_of(method).items()}


def whole_passes_of(method: Method) -> dict[str, float]:
    """Passes over whole sets, before or after the steps, by stream; empty where the method looks at none."""
    return {name: s.whole_passes for name, s in method.streams.items() if s.whole_passes}


def single_batches_of(method: Method) -> dict[str, float]:
    """Passes over single batches outside the steps, by stream."""
    return {name: s.single_batches for name, s in method.streams.items() if s.single_batches}


def extra_data(method: Method) -> tuple[str, ...]:
    """What a method is given that plain SFT at its stage is not: names of data sets, and ``"unaligned base"`` for the weights before
    alignment. The main records of the stage are no part of it, unless the method puts others in their place."""
    names = [*method.streams, *method.mixed]
    share = method.benign_share
    if share is not None:  # a set of which the share takes nothing is not read
        names += ["alignment"] * (share < 1) + ["benign"] * (share > 0)
    if method.folders is not None:
        names.append("unaligned base")
    return tuple(dict.fromkeys(names))


def hyper_parameters(kind: type[Any]) -> dict[str, Any]:
    """The hyper-parameters of a method and their defaults, in its own order. A field with an underscore is none: the run tells it."""
    fields = dataclasses.fields(kind)
    return {field.name: field.default for field in fields if not field.name.startswith("_")}


def check_packing(method: Method) -> None:
    """Raises:
    InputError: the method would compute something else on rows that hold several records.
    """
    if method.unpackable:
        raise InputError(f"config.data.packing = True: {method.facts.title} {method.unpackable}")


def check_not_negative(**values: float | int) -> None:
    """Raises:
    InputError: a hyper-parameter is negative, infinite or NaN; its key is named.
    """
    for name, value in values.items():
        if not 0 <= value < float("inf"):
            raise InputError(f"config.defence.{name} = {value}: a finite number, 0 or more")


def check_counts(**values: int) -> None:
    """Raises:
    InputError: a hyper-parameter that counts is below 1; its key is named.
    """
    for name, value in values.items():
        if value < 1:
            raise InputError(f"config.defence.{name} = {value}: 1 or more")
