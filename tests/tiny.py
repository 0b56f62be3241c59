"""A tiny model on disk with a word-level tokenizer, and source files that fit it: invented words only."""

import json
from pathlib import Path

import numpy as np

from panacea_jax.worlds.base import write_base

WORDS = [f"w{i}" for i in range(40)] + ["sure", "no"]


def write_model(folder: Path, **shape: int) -> Path:
    """A 2-layer Llama of 42 words."""
    small = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
    }
    write_base(folder, WORDS, seed=3, **(small | shape))
    return folder


def write_pairs(path: Path, rows: int, seed: int = 0) -> Path:
    """A jsonl file of instruction/output pairs of different lengths."""
    rng = np.random.default_rng(seed)

    def text() -> str:
        return " ".join(f"w{i}" for i in rng.integers(0, 40, rng.integers(2, 9)))

    records = [{"instruction": text(), "output": text()} for _ in range(rows)]
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path
