"""Inputs on which a parser of ours failed once, by the name of its target in ``tests/fuzz.py``."""

from typing import Any

SEEDS: dict[str, list[Any]] = {}
