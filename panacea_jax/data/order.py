"""Which records a step takes: a pure function of integers and a stream's name.

Nothing is kept between steps, so a run resumes at any step, on any number of processes, and one
stream never shifts another.
"""

import functools
import hashlib

import numpy as np
from jaxtyping import Int64


def indices(
    seed: int, stream: str, step: int, batch_size: int, n: int, shuffle: bool
) -> Int64[np.ndarray, " B"]:
    """Record numbers [B] of step `step` ≥ 0 of a stream of `n` records.

    Position t·B + j of the endless stream is record (t·B + j) mod n in file order, or, shuffled,
    entry (t·B + j) mod n of the permutation of epoch (t·B + j) // n. A batch may span epochs.

    Raises:
        ValueError: A step below 0, or no records or rows.
    """
    if step < 0 or batch_size < 1 or n < 1:
        raise ValueError(f"step {step}, batch size {batch_size} and {n} records give no batch")
    epochs, within = np.divmod(step * batch_size + np.arange(batch_size, dtype=np.int64), n)
    if not shuffle:
        return within
    chosen = np.empty_like(within)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        chosen[here] = _permutation(seed, stream, int(epoch), n)[within[here]]
    return chosen


@functools.lru_cache(maxsize=16)
def _permutation(seed: int, stream: str, epoch: int, n: int) -> Int64[np.ndarray, " n"]:
    """The order of n records in one epoch: the ranks of Philox's raw words.

    Philox's raw words are fixed for ever, which numpy does not promise of ``permutation``, so a
    resumed run keeps its order under another numpy. Equal 64-bit words keep file order.
    """
    key = hashlib.sha256(f"{seed}/{epoch}/{stream}".encode()).digest()[:16]
    words = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(n)
    return np.argsort(words, kind="stable").astype(np.int64)
