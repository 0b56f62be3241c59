"""The train step: ``(state, weights, batches, key) -> (state, metrics)``, jitted, sharded, its state donated."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, Key

from panacea_jax.data.batches import Batch
from panacea_jax.defences import Defence, Loss
from panacea_jax.defences.dropout import with_dropout
from panacea_jax.defences.protocol import LikeWeights, Method, Metrics
from panacea_jax.models.model import Model
from panacea_jax.parallel.sharding import weight_sharding
from panacea_jax.train.optimizer import Partial, where_trained

# Among the metrics of a step, for ``blame`` alone.
FIRST_NONFINITE = "first_nonfinite"


class TrainState(NamedTuple):
    """Everything that a step reads and writes; a checkpoint holds exactly this.

    Attributes:
        params: trainable tree, an Adapter or all weights (w, never w + ε).
        opt_state: optax state.
        defence_state: the defence's own state, for Panacea with ε.
        step: number of steps done.
    """

    params: Any
    opt_state: Any
    defence_state: Any
    step: Int[Array, ""]


Step = Callable[[TrainState, Any, Mapping[str, Batch], Key[Array, ""]], tuple[TrainState, Metrics]]


def fresh_state(
    params: Any, defence: Method, optimizer: optax.GradientTransformation
) -> TrainState:
    """The state before step 0, of ``params`` themselves."""
    step = jnp.zeros((), jnp.int32)
    return TrainState(params, optimizer.init(params), defence.init(params), step)


def init_state(
    params: Any, defence: Defence, optimizer: optax.GradientTransformation, donate: bool = False
) -> TrainState:
    """The state before step 0, every buffer on the devices of ``params``.

    ``params`` is copied, since the step donates its state and the caller's tree must stay usable; with ``donate`` it is taken over.
    """

    def build(params: Any) -> TrainState:
        return fresh_state(jax.tree.map(jnp.copy, params), defence, optimizer)

    shapes = jax.eval_shape(build, params)
    places, taken = state_shardings(shapes, params), 0 if donate else ()
    return jax.jit(build, out_shardings=places, donate_argnums=taken)(params)


def state_shardings(state: Any, params: Any) -> Any:
    """Each part of the state that has the shape of the trainable tree lives where the tree lives, and each :class:`LikeWeights` where
    weights do; the rest is replicated over the mesh of the tree, or lies on its device.
    """
    like = jax.tree.map(lambda x: x.sharding, params)
    structure = jax.tree.structure(params)
    sizes = [x.shape for x in jax.tree.leaves(params)]
    scalar = jax.tree.leaves(params)[0].sharding
    if isinstance(scalar, jax.sharding.NamedSharding):
        scalar = jax.sharding.NamedSharding(scalar.mesh, jax.sharding.PartitionSpec())

    def is_params(node: Any) -> bool:
        same = jax.tree.structure(node) == structure  # type: ignore[operator]
        return same and [x.shape for x in jax.tree.leaves(node)] == sizes

    def place(node: Any) -> Any:
        if is_params(node):
            return like
        if isinstance(node, LikeWeights) and isinstance(scalar, jax.sharding.NamedSharding):
            mesh = scalar.mesh
            assert isinstance(mesh, jax.sharding.Mesh)
            return jax.tree.map_with_path(lambda path, x: weight_sharding(mesh, _path(path), x.shape), node)
        return jax.tree.map(lambda _: scalar, node)

    return jax.tree.map(place, state, is_leaf=lambda node: isinstance(node, LikeWeights) or is_params(node))


def _path(keys: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def make_step(
    model: Model,
    defence: Defence,
    optimizer: optax.GradientTransformation,
    shardings: Any,
    accumulate: int = 1,
) -> Step:
    """Compile-once step of a defence: its gradient, then clip → AdamW → update.

    Args:
        model: only its static part is used; the base weights are an argument of the step (None when all parameters train).
        defence: the gradient rule.
        optimizer: the shared tail, see ``make_optimizer``.
        shardings: of the state, see ``state_shardings``.
        accumulate: micro-batches that a batch is taken in.

    Raises:
        ValueError: the defence leaves layers out of a step and the optimizer cannot.
    """

    static = dataclasses.replace(model, weights=None)
    if defence.partial and not isinstance(optimizer, Partial):
        raise ValueError(
            f"{type(defence).__name__} leaves layers out of a step: make_optimizer(…, partial=True)"
        )

    def step(
        state: TrainState, weights: Any, batches: Mapping[str, Batch], key: Key[Array, ""]
    ) -> tuple[TrainState, Metrics]:
        loss_fn = Loss(static, weights, accumulate=accumulate)
        key = jax.random.fold_in(key, state.step)
        batches = with_dropout(batches, state.params, key)
        with jax.named_scope("defence"):
            grads, inner, metrics = defence.gradient(
                loss_fn, state.params, batches, state.defence_state, key
            )
        extra = {}
        if defence.partial:
            extra["trained"] = mask = defence.trained(state.params, inner)
            grads = where_trained(mask, grads, jax.tree.map(jnp.zeros_like, grads))
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params, **extra)
            params = optax.apply_updates(state.params, updates)
        metrics |= {"norm_gradient": optax.tree.norm(grads), "norm_update": optax.tree.norm(updates),
                    "norm_params": optax.tree.norm(params), FIRST_NONFINITE: first_nonfinite(grads)}  # fmt: skip
        return TrainState(params, opt_state, inner, state.step + 1), metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def first_nonfinite(tree: Any) -> Int[Array, ""]:
    """Number of the first leaf that holds a NaN or an infinity, -1 for none."""
    # Not from the sums of squares of a norm: these would be summed over devices each, and the norm have other last bits.
    wrong = ~jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)])
    return jnp.where(wrong.any(), jnp.argmax(wrong), -1)


class CompiledSteps:
    """Steps by what they were made for. Runs that are handed one of these and differ in their numbers only have one compiled step: many
    short runs would compile most of the time."""

    def __init__(self) -> None:
        self._made: dict[Any, Step] = {}

    def find(
        self,
        model: Model,
        defence: Defence,
        optimizer: optax.GradientTransformation,
        shardings: Any,
        accumulate: int = 1,
    ) -> Step:
        """As ``make_step``, or the one that was made for equal arguments before."""
        leaves, tree = jax.tree.flatten(shardings)
        static = dataclasses.replace(model, weights=None, folder=None)
        key = (static, defence, optimizer, tuple(leaves), tree, accumulate)
        if key not in self._made:
            self._made[key] = make_step(static, defence, optimizer, shardings, accumulate)
        return self._made[key]
