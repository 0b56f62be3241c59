"""The command ``layers --probe=N``: which layers a few harmful batches point at, without training.

Beside the coefficients of Panacea's ε stand T-Vaccine's importance and, against another model of the same base, the change of hidden
states on harmful text, which is what RepNoise trains for (arXiv 2405.14577).
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict

from panacea_jax.analysis.layer_files import PROBE, write_probe
from panacea_jax.analysis.layer_probe import probed
from panacea_jax.analysis.layers import Coefficients, layer_coefficients
from panacea_jax.data.batches import Batch
from panacea_jax.defences import Loss, Method
from panacea_jax.defences.protocol import Params, Stage, StreamSpec
from panacea_jax.defences.t_vaccine import importance
from panacea_jax.errors import InputError
from panacea_jax.models import lora
from panacea_jax.models.adapter import Adapter
from panacea_jax.models.model import Model
from panacea_jax.models.precision import wide
from panacea_jax.models.vocabulary import open_vocabulary
from panacea_jax.parallel import make_mesh, processes
from panacea_jax.parallel.sharding import batch_rows
from panacea_jax.perturbation import to_sphere
from panacea_jax.progress import Progress, say
from panacea_jax.stages import lineage
from panacea_jax.stages.layers import trained_coefficients
from panacea_jax.stages.lineage import Start
from panacea_jax.stages.rendering import make_template
from panacea_jax.stages.streams import make_streams
from panacea_jax.train.feeding import put


class _Look(Method):
    """A method that reads the harmful set and changes nothing, so that its batches are those of training."""

    stage: ClassVar[Stage] = "finetune"

    @property
    def streams(self) -> dict[str, StreamSpec]:
        return {"harmful": StreamSpec(passes=1)}


def probe_layers(
    config: ConfigDict, workdir: Path, batches: int, against: str = "", out: Path | None = None
) -> Path:
    """Write ``layers_probe.{json,csv,png}`` and ``layers_probe_correlations.csv``, into the work directory unless ``out`` is given.

    Looked at are the first harmful batches of training, at the adapter ``config.lora.init_from``, else at what the work directory
    deploys, else at a fresh adapter or, with all parameters, the base. Of each batch ε = h / ‖h‖, of norm 1.

    Args:
        config: names base, harmful set, batch size and seed.
        workdir: whose model it is.
        batches: N.
        against: what :func:`panacea_jax.stages.lineage.to_compare` takes; "": the change of hidden states is not measured.
        out: where the files go.

    Raises:
        InputError: anything about model, adapter, harmful set or the other model.
    """
    # ---- what is asked for
    if batches < 1:
        raise InputError(f"--probe={batches}: a number of batches, 1 or more")
    start = lineage.to_probe(config, workdir)
    inputs = start.inputs()
    other = lineage.to_compare(config, against, "--against") if against else None

    # ---- data, model
    mesh = make_mesh(**config.mesh)
    _, tokenizer, vocab_size = open_vocabulary(start.base)
    template = make_template(config, tokenizer, workdir)
    stream = make_streams(config, "finetune", _Look(), template, vocab_size, batch_rows(mesh))[0]["harmful"]  # fmt: skip
    model, params = start.params(config, start.open_model(config, mesh))
    reference = _reference(config, other, start, model) if other else None

    # ---- figures
    steps = (put(model, {"": stream.batch(step)})[""] for step in range(batches))
    with Progress("harmful batches", batches) as bar:
        figures, (last, mean) = _over_batches(Loss.of(model), params, reference, steps, bar)
    fresh = isinstance(params, Adapter) and not any(map(np.any, _factors_b(params)))
    if fresh:
        say("a fresh adapter: B = 0, so the harmful gradient by A is 0 and ε moves B alone")
    found = probed(figures, [row["layer"] for row in last["layers"]], trained_coefficients(workdir))
    facts = {"base": start.base, "adapter": start.adapter, "full_parameters": start.full_parameters, "fresh": fresh, "against": against,
             "batches": batches, "batch_size": stream.batch_size, "seed": config.seed, "inputs": inputs}  # fmt: skip
    folder = out or workdir
    processes.once(lambda: write_probe([last, {"probe": facts, **mean, **found}], folder))
    return folder / PROBE


def _over_batches(
    loss: Loss,
    params: Params,
    reference: tuple[Loss, Any] | None,
    batches: Iterable[Batch],
    bar: Progress,
) -> tuple[dict[str, Float[np.ndarray, "N L"]], tuple[Coefficients, Coefficients]]:
    """Every figure of every batch, and the coefficients of the last ε and of the mean one."""
    adapter = params if isinstance(params, Adapter) else None
    names = ("share", "density", "effective") if adapter else ("share", "density")
    found: dict[str, list[Any]] = {}
    mean, last = None, {}
    for count, batch in enumerate(batches, 1):
        epsilon, p = _look(loss, params, batch)
        mean = epsilon if mean is None else _running_mean(mean, epsilon, count)
        last = layer_coefficients(epsilon, adapter, kind="probe_last")
        of_model = {"importance": p}
        if reference is not None:
            before, now = _outputs(*reference, batch), _outputs(loss, params, batch)
            of_model["change"] = _relative_change(now, before, batch.valid)
        trained = [row["layer"] for row in last["layers"]]
        figures = {name: np.array([row[name] for row in last["layers"]]) for name in names}
        figures |= {name: processes.to_host(x)[trained] for name, x in of_model.items()}
        for name, values in figures.items():
            found.setdefault(name, []).append(values)
        bar.advance()
    by_name = {name: np.stack(values).astype(np.float64) for name, values in found.items()}
    return by_name, (last, layer_coefficients(mean, adapter, kind="probe_mean"))


def _reference(config: ConfigDict, other: Start, start: Start, model: Model) -> tuple[Loss, Any]:
    """Loss and parameters of the model that hidden states are compared with.

    Raises:
        InputError: it has other shapes.
    """
    shared = other.base == start.base and model.weights is not None
    found = model if shared else other.open_model(config, model.mesh)
    shapes = [(m.config.num_layers, m.config.hidden_size, m.config.vocab_size) for m in (model, found)]
    if shapes[0] != shapes[1]:
        raise InputError(f"--against: (layers, width, vocabulary) {shapes[1]} there, {shapes[0]} here: not of one base")  # fmt: skip
    return Loss.of(found), lora.load(other.adapter, found, frozen=True) if other.adapter else None


@jax.jit
def _look(loss: Loss, params: Params, batch: Batch) -> tuple[Params, Float[Array, "L"]]:
    """ε of norm 1 along the harmful gradient, and T-Vaccine's importance."""
    h = jax.grad(loss)(params, batch)
    sphere = to_sphere(1.0)
    return sphere.update(h, sphere.init(h))[0], importance(loss, params, batch)


@jax.jit
def _running_mean(mean: Params, new: Params, count: Int[Array, ""] | int) -> Params:
    return jax.tree.map(lambda m, e: m + (e - m) / count, mean, new)


@jax.jit
def _outputs(loss: Loss, params: Params, batch: Batch) -> Float[Array, "L B T D"]:
    """What each layer hands on."""
    outputs: Array = loss.forward(params, batch, None, ("block_out",)).readings["block_out"]
    return outputs


@jax.jit
def _relative_change(
    now: Float[Array, "L B T D"], before: Float[Array, "L B T D"], valid: Bool[Array, "B T"]
) -> Float[Array, "L"]:
    """``‖now − before‖ / ‖before‖`` of each token's hidden state, averaged over tokens: a sum over tokens would be that of the first
    one, whose states are orders of magnitude larger in many models."""
    now, before = (x.astype(wide(x.dtype)) for x in (now, before))
    size = jnp.linalg.norm(before, axis=-1)
    counts = valid & (size > 0)
    change = jnp.linalg.norm(now - before, axis=-1) / jnp.where(counts, size, 1)
    return jnp.where(counts, change, 0).sum(axis=(1, 2)) / jnp.maximum(counts.sum(axis=(1, 2)), 1)


def _factors_b(adapter: Adapter) -> list[np.ndarray]:
    return [
        processes.to_host(pair["b"]) for block in adapter.layers.values() for pair in block.values()
    ]
