"""The output head as the files hold it, which is not always what ``config.json`` says of it."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from absl import logging

from panacea_jax.models.config import ModelConfig
from panacea_jax.models.names import to_hf
from panacea_jax.models.tensorfile import Tensor

EMBEDDING, HEAD = to_hf("embed_tokens/embedding")[0], to_hf("lm_head/kernel")[0]
# Rows that are compared at a time.
_ROWS = 1024


def as_found(config: ModelConfig, tensors: Mapping[str, Tensor], folder: Path) -> ModelConfig:
    """The configuration, untied where the files hold a head of its own although ``config.json`` says tied.

    Merging tools write such folders. transformers 5 uses that head as well; a head that is the
    embedding once more stays tied. A warning says so.

    Args:
        config: of ``config.json``.
        tensors: of the folder, see :func:`panacea_jax.models.weights.find_tensors`.
        folder: for the warning.
    """
    if not config.tie_embeddings or config.num_labels:
        return config
    embedding, own = tensors.get(EMBEDDING), tensors.get(HEAD)
    if embedding is None or own is None:
        return config
    if len(embedding.shape) != 2 or _equal(embedding, own):  # an embedding that is no matrix is refused by its shape
        return config
    logging.warning(
        "%s: config.json says tie_word_embeddings, but %s differs from %s in the files: used as a head of its own",
        *(folder, HEAD, EMBEDDING),
    )
    return dataclasses.replace(config, tie_embeddings=False)


def by_embedding(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> Mapping[str, Tensor]:
    """The tensors, with the matrix that a tied model shares under the embedding's name where the files have it under the head's only."""
    if EMBEDDING in tensors or HEAD not in tensors or "lm_head/kernel" in shapes:
        return tensors
    return {EMBEDDING if name == HEAD else name: tensor for name, tensor in tensors.items()}


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two matrices hold the same values."""
    if a.shape != b.shape:
        return False
    rows, width = a.shape
    for start in range(0, rows, _ROWS):
        bounds = ((start, min(start + _ROWS, rows)), (0, width))
        one, other = (np.concatenate(list(tensor.blocks(bounds))) for tensor in (a, b))
        if not np.array_equal(one, other):
            return False
    return True
