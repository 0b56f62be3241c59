"""What an adapter's file presumes of its base: copies of modules, and the part that peft took from the weights."""

from pathlib import Path

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Float

from panacea_jax.errors import InputError
from panacea_jax.models.model import Model, abstract_model
from panacea_jax.models.names import alone, to_hf, to_ours
from panacea_jax.models.quantise import whole
from panacea_jax.models.saving import entries
from panacea_jax.models.tensorfile import Entry


def check_copy(name: str, tensor: np.ndarray, model: Model, where: Path) -> None:
    """That a tensor which is no factor is the base's own, as peft stores it for ``modules_to_save`` and beside new tokens.

    Raises:
        InputError: it is not, or it is none of the base's tensors.
    """
    shapes = abstract_model(model.config)[1]
    path, layer, _ = to_ours(alone(name.removeprefix("base_model.model."))) or ("", None, "")
    if path == "lm_head/kernel" and path not in shapes:
        path = "embed_tokens/embedding"  # tied
    beyond = layer is not None and layer >= model.config.num_layers
    if path not in shapes or "_proj/" in path or beyond:
        raise InputError(f"{where}: {name} is not a LoRA factor of a projection of this model")
    if model.weights is None:
        return
    base = _of_base(model, path, layer, "comparing a module")
    if not np.array_equal(tensor.astype(base.dtype), base.values()):
        raise InputError(
            f"{where}: {name} is not the base's: modules that were trained or resized whole (modules_to_save) are not supported; "
            "merge the adapter with peft and give that model as the base"
        )


def lost_factors(
    init: str, model: Model, path: str, layer: int, rank: int, scale: float
) -> tuple[Float[np.ndarray, "in r"], Float[np.ndarray, "r out"]]:
    """Factors whose scaled product peft took from a weight when it made the adapter, and takes again whenever it loads it.

    PiSSA (arXiv 2404.02948): the r largest singular values; OLoRA (arXiv 2406.01775): the first r columns of W = QR. Their product does
    not depend on the signs that a decomposition chooses. In float32, as there.

    Args:
        init: "pissa" or "olora".
        model: the base; without weights the factors are NaN.
        path, layer: of the weight.
        rank, scale: of the module.

    Raises:
        InputError: the base is quantised.
    """
    if model.weights is None:
        _, d_in, d_out = abstract_model(model.config)[1][path]
        return np.full((d_in, rank), np.nan), np.full((rank, d_out), np.nan)
    entry = _of_base(model, path, layer, f"an adapter made with init_lora_weights={init}")
    weight = entry.values().astype(np.float32)
    if init == "pissa":
        left, values, right = np.linalg.svd(weight, full_matrices=False)
        root = np.sqrt(values[:rank] / scale)
        return (root[:, None] * right[:rank]).T, (left[:, :rank] * root).T
    q, r = np.linalg.qr(weight)
    return r[:rank].T, q[:, :rank].T


def _of_base(model: Model, path: str, layer: int | None, what: str) -> Entry:
    """A tensor of the base as Hugging Face keeps it; of several processes all must ask for its values.

    Raises:
        InputError: ``what`` needs it and it is quantised.
    """
    array = whole(flatten_dict(model.weights, sep="/")[path], what)
    name, _ = to_hf(path, layer)
    return next(e for e in entries(unflatten_dict({path: array}, sep="/")) if e.name == name)
