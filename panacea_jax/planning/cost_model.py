"""A model of what a step costs on one device: memory, operations, and what travels over links and network.

It answers where no compiler is installed, and it sorts the candidates of a search. docs/planning.md sets its figures beside the
compiler's.
"""

import jax

from panacea_jax.data.batches import Batch
from panacea_jax.defences.cross_entropy import CHUNK, WHOLE
from panacea_jax.defences.protocol import passes_as_received
from panacea_jax.generate.schedule import ADMITTED
from panacea_jax.generate.schedule import CHUNK as TOKENS
from panacea_jax.parallel.chips import Chip
from panacea_jax.parallel.mesh import slices_of
from panacea_jax.parallel.sharding import batch_rows
from panacea_jax.planning.abstract_step import AbstractStep, tree_bytes


def _with_backward(step: AbstractStep) -> float:
    """Share of the layers that have a backward pass: those from the lowest adapted one on."""
    return 1 - getattr(step.state.params, "lowest", 0) / step.model.config.num_layers


def _back(step: AbstractStep) -> int:
    """Times that a pass goes through the weights of a layer behind the forward one: backward, and forward again where that is repeated."""
    return 2 if step.remat == "full" else 1


def _turns(step: AbstractStep) -> float:
    """Times that a pass goes through the weights of a layer, on average over the layers."""
    return 1 + _back(step) * _with_backward(step)


def _passes(step: AbstractStep) -> float:
    return sum(passes_as_received(step.defence).values())


def flops(step: AbstractStep) -> float:
    """Floating-point operations of one device a step, padding and recomputation included."""
    full = step.weights is None
    # The gradient by the weights is one more matrix product each.
    turns = 1 + (_back(step) + full) * _with_backward(step)
    total = 0.0
    for name, passes in passes_as_received(step.defence).items():
        rows, length = step.batches[name].tokens.shape
        total += passes * rows * length * step.model.config.flops_per_token(length) * turns
    return total / step.model.mesh.size


def weights_read(step: AbstractStep) -> float:
    """Bytes of gathered weights that one device reads a step, as they are kept: each pass once forward, once backward from the lowest
    adapted layer on, once more where it is repeated; embedding and head once forward and once backward.
    """
    kept = step.state.params if step.weights is None else step.weights
    layers, whole = (sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) for tree in (kept["layers"], kept))
    return _passes(step) * (_turns(step) * layers + 2 * (whole - layers)) / step.model.mesh.shape["tensor"]


def sent(step: AbstractStep) -> float:
    """Bytes that one device sends a step within its slice.

    Weights are gathered over ``fsdp``, activations summed over ``tensor``, gradients summed over all rows. A ring over n devices
    sends (n − 1)/n of what is gathered, and twice that of what is summed.
    """
    c, mesh, width = step.model.config, step.model.mesh, step.model.dtype.itemsize
    full = step.weights is None
    fsdp, tensor = mesh.shape["fsdp"], mesh.shape["tensor"]
    copies = batch_rows(mesh) // fsdp // slices_of(mesh.devices.flat)
    layers = (c.matmul_parameters() - c.hidden_size * c.vocab_size) * width / tensor
    head = c.hidden_size * c.vocab_size * width / tensor
    # A gathered layer is used and dropped; the backward pass gathers it again, once for both of its turns. The head is kept.
    gathered = (_passes(step) * (1 + _with_backward(step)) * layers + head) * (fsdp - 1) / fsdp
    summed, reduced = 0.0, 0.0
    for name, passes in passes_as_received(step.defence).items():
        rows, length = step.batches[name].tokens.shape
        stream = rows / batch_rows(mesh) * length * c.hidden_size * width
        # Two sums a layer forward (attention and MLP), two backward, and two in a repeated forward pass.
        summed += passes * 2 * _turns(step) * c.num_layers * stream * 2 * (tensor - 1) / tensor
        for x in jax.tree.leaves(step.state.params):
            share = tree_bytes(x) * width / 4  # gradients are summed in the compute dtype
            parts = copies * fsdp
            if "fsdp" in x.sharding.spec:
                # Summed and scattered over fsdp, which is a gather backwards; an adapter's float32 is gathered forward and backward too.
                gathers = 0 if full else 2 * 4 / width
                reduced += passes * (1 + gathers) * share * (fsdp - 1)
                parts = copies
            reduced += passes * share * 2 * (parts - 1) / parts
    return gathered + summed + reduced


def sent_between(step: AbstractStep) -> float:
    """Bytes that one device sends a step to other slices: of the gradients, which its slice has summed and shared out before."""
    mesh = step.model.mesh
    slices = slices_of(mesh.devices.flat)
    whole = sum(x.size for x in jax.tree.leaves(step.state.params)) * step.model.dtype.itemsize
    return _passes(step) * whole / (mesh.size / slices) * 2 * (slices - 1) / slices


def seconds(step: AbstractStep, chip: Chip, sent_within: float | None = None) -> dict[str, float]:
    """Least time of a step by what bounds it, by the data sheet.

    Args:
        step: on a mesh of such chips.
        chip: its data sheet.
        sent_within: bytes that one device sends within its slice, where a compiled program says that; else as modelled.
    """
    within, between = sent(step) if sent_within is None else sent_within, sent_between(step)
    times = {
        "compute": flops(step) / (chip.flops / chip.devices),
        "memory": weights_read(step) / (chip.bandwidth / chip.devices),
        "links": within / (chip.links / chip.devices),
    }
    return times | ({"network": between / (chip.network / chip.devices)} if between else {})


def answer_seconds(step: AbstractStep, chip: Chip, rows: int, prompt: int, new: int) -> float:
    """Least time of a batch of answers, by the base that a step is of.

    Prompts are read a few at a time; then every token reads all weights and what the cache holds. Weights that ``fsdp`` cuts are gathered
    for each group of prompts and each chunk of tokens; sums over ``tensor`` are not counted.

    Args:
        step: gives the model, how its weights are kept, and the mesh.
        chip: its data sheet.
        rows: answers together.
        prompt: tokens of a prompt.
        new: tokens of an answer.
    """
    c, mesh = step.model.config, step.model.mesh
    tensor, parts = mesh.shape["tensor"], batch_rows(mesh)
    own = -(-rows // parts)  # rows of one device
    groups = -(-own * parts // max(ADMITTED, parts))
    cached = 2 * c.num_layers * c.num_kv_heads * c.head_dim * step.model.dtype.itemsize / tensor
    compute, memory, links = (x / chip.devices for x in (chip.flops, chip.bandwidth, chip.links))
    weights, gather = _answering(step), sent_to_gather(step) / links
    read = own * prompt * c.flops_per_token(prompt) / tensor / compute
    # On average a token sees the prompt and half of the answer, as one in the middle of a text of twice that length does.
    token = max(
        own * c.flops_per_token(2 * prompt + new) / tensor / compute,
        (weights + own * (prompt + new / 2) * cached) / memory,
        gather / TOKENS,
    )
    return max(read, groups * weights / memory, groups * gather) + new * token


def sent_to_gather(step: AbstractStep) -> float:
    """Bytes that one device sends until each has all the weights that answer, but for what ``tensor`` splits."""
    fsdp = step.model.mesh.shape["fsdp"]
    return _answering(step) * (fsdp - 1) / fsdp


def _answering(step: AbstractStep) -> float:
    """Bytes of the weights that one device reads for a token: of all parameters' training they are exported in the compute dtype."""
    whole = step.model.config.matmul_parameters() * step.model.dtype.itemsize
    if step.weights is not None:
        whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(step.weights))
    return whole / step.model.mesh.shape["tensor"]


def temporary(step: AbstractStep) -> dict[str, int]:
    """Bytes of one device that come and go in a step, by kind.

    ``activations`` and ``logits``, of the pass where they are largest together: the residual stream of each layer, which the backward
    pass starts from, and what one layer (of all, without remat) keeps of attention and MLP; a chunk of logits and their gradient in
    float32. ``gathered weights``: a layer's (or, from few bits, brought back) and the head's. ``gradients``.

    XLA's compiler for GPUs takes up two passes at a time, whose streams are there together, and starts what the passes stack from one array
    of ``zeros``, which stays until the last of them; it copies a layer's weights out of their stack, for cuBLAS.
    """
    c, mesh, width = step.model.config, step.model.mesh, step.model.dtype.itemsize
    fsdp, tensor = mesh.shape["fsdp"], mesh.shape["tensor"]
    gpu, several = step.platform == "gpu", _passes(step) > 1
    activations, logits, streams = max((_of_a_pass(step, batch) for batch in step.batches.values()), key=lambda of: of[0] + of[1])
    per_layer = (c.matmul_parameters() - c.hidden_size * c.vocab_size) / c.num_layers
    few_bits = any(x.dtype.itemsize == 1 for x in jax.tree.leaves(step.weights))
    # Trained weights travel in float32, the dtype they are kept in; those in few bits come back through two float32 arrays.
    travel = 4 if step.weights is None else width
    gathered = (per_layer + c.hidden_size * c.vocab_size) * travel / tensor * (fsdp > 1)
    if gpu and fsdp == 1:
        gathered = per_layer * width / tensor
    elif few_bits and not gpu:
        gathered += per_layer * (4 + 4 + (fsdp == 1) * width) / tensor
    trained = tree_bytes(step.state.params)
    found = {
        "activations": int(activations),
        "logits": int(logits),
        "gathered weights": int(gathered),
        "gradients": (2 if several else 1) * trained,
    }
    if gpu and several:
        found["activations"] += int(streams)
        found["gradients"] *= 2  # g, h, h' and w + ε at once
        found["zeros"] = int(streams) + trained
    return found


def _of_a_pass(step: AbstractStep, batch: Batch) -> tuple[float, float, float]:
    """Bytes that one device holds in a pass over a batch: activations; logits; of the activations the residual streams."""
    c, mesh, width = step.model.config, step.model.mesh, step.model.dtype.itemsize
    tensor = mesh.shape["tensor"]
    rows, length = batch.tokens.shape
    tokens = rows / batch_rows(mesh) / step.accumulate * length  # one micro-batch at a time
    heads, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    stream = tokens * c.hidden_size * width
    # A fused kernel holds no scores.
    scores = tokens * length * c.num_heads / tensor * (4 + width) * (step.attention.name == "xla")
    inside = tokens * (2 * heads + 2 * kv + 3 * c.intermediate_size) / tensor * width
    inside += 4 * stream + scores
    if step.remat == "full":
        kept = inside
    else:
        kept = c.num_layers * _with_backward(step) * (inside - scores * (step.remat == "dots"))
    chunk = tokens if length <= WHOLE else min(tokens, CHUNK)
    streams = c.num_layers * _with_backward(step) * stream
    return streams + kept, chunk * c.vocab_size / tensor * (2 * 4 + width), streams
