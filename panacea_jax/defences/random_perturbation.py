"""Random perturbation: Gaussian noise on the finished weights, the control that any ε has to beat (arXiv 2501.18100, motivation).

Stage: post-fine-tuning, one shot. Passes: none. Extra memory: the noise. Extra data: none.

With ``rho`` the noise is ``ρ z/‖z‖``, z ~ N(0, 1) jointly over all tensors: the norm-matched control of Panacea. With ``sigma`` it is
``σ z``. Added once; the public code adds it anew at every evaluation and never takes it away, which is not reproduced.
"""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax

from panacea_jax.defences.protocol import Facts, Method, Params, Stage, check_not_negative


class RandomPerturbationState(NamedTuple):
    """The noise, same tree as ``params``."""

    epsilon: Params


@dataclasses.dataclass(frozen=True)
class RandomPerturbation(Method):
    """Noise on the finished weights.

    Attributes:
        rho: L2 norm of the noise over all trainable tensors together; used when ``sigma`` is None.
        sigma: standard deviation of the noise on each entry.
        seed: seed of the noise.
    """

    rho: float | int = 1.0
    sigma: float | int | None = None
    seed: int = 0

    stage: ClassVar[Stage] = "heal"
    facts: ClassVar[Facts] = Facts(
        title="random perturbation",
        paper="arXiv 2501.18100",
        memory="the noise",
        code="added once; the public code adds it anew at every evaluation",
    )

    def __post_init__(self) -> None:
        given = {"rho": self.rho, "sigma": self.sigma}
        check_not_negative(**{name: x for name, x in given.items() if x is not None})

    def init(self, params: Params) -> RandomPerturbationState:
        """Draw the noise."""
        leaves, tree = jax.tree.flatten(params)
        keys = jax.random.split(jax.random.key(self.seed), len(leaves))
        noise = [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves)]
        size = self.rho / optax.tree.norm(noise) if self.sigma is None else jnp.asarray(self.sigma)
        return RandomPerturbationState(
            jax.tree.unflatten(tree, [(z * size).astype(z.dtype) for z in noise])
        )

    def finish(self, params: Params, state: RandomPerturbationState) -> Params:
        """``w + noise``."""
        return jax.tree.map(jnp.add, params, state.epsilon)

    def epsilon(self, state: RandomPerturbationState) -> Params:
        """The noise stands in the place of ε."""
        return state.epsilon
