"""AlpacaEval's own file: a JSON list that ``alpaca_eval --model_outputs FILE`` reads.

Format: github.com/tatsu-lab/alpaca_eval, README, "model_outputs". The tool pairs our outputs with
its reference's by `instruction`, and names the model by `generator`.
"""

import json
from pathlib import Path

from panacea_jax.evaluate.tasks import answer_text
from panacea_jax.records.jsonl import read_lines
from panacea_jax.workdir import write_text


def write_model_outputs(generations: Path, generator: str) -> Path:
    """Write ``<set>.model_outputs.json`` beside a finished ``<set>.jsonl``; returns its path.

    Answers are cut as they are for scoring (``tasks.answer_text``).

    Args:
        generations: lines as ``lines.generation_line`` makes them.
        generator: the model's name on the leaderboard. The tool skips a name that it knows.

    Raises:
        InputError: the generations cannot be read.
    """
    outputs = [
        {
            "dataset": line["extra"].get("dataset", ""),
            "instruction": line["instruction"],
            "output": answer_text(line["response"], line["template"]),
            "generator": generator,
        }
        for line in read_lines(generations)
    ]
    path = generations.with_name(f"{generations.stem}.model_outputs.json")
    write_text(path, json.dumps(outputs, indent=1, ensure_ascii=False) + "\n")
    return path
