"""Figures that others published, beside ours where they are of the same base, task and poison ratio.

They lie in ``published.json`` with their date and where they were read. The tables of arXiv 2501.18100 itself are not among them: they
could not be read as text.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from panacea_jax.data.sources import parse_source
from panacea_jax.errors import InputError
from panacea_jax.evaluate.scores import Json
from panacea_jax.reporting.outcomes import Found, Outcome
from panacea_jax.reporting.parts import Section, Table
from panacea_jax.untrusted import read_object

_Conditions = tuple[str, str, float]


def published_section(found: Found) -> Section | None:
    """The published tables that ours can stand beside; a line where there is none."""
    if not found.outcomes:
        return None
    held = read_object(Path(__file__).with_name("published.json"))
    configs = [manifest["config"] for run in found.runs for manifest in run.manifests().values()]
    ours = {conditions: config for config in configs if (conditions := _conditions(config))}
    tables = []
    for table in held["tables"]:
        same = (table["base"], table["task"], table["poison_ratio"])
        if same in ours:
            rows = [[r["method"], _number(r["hs"]), _number(r["fa"]), *_beside(r["method"], same[2], found)] for r in table["rows"]]
            title = f"{table['title']}: {same[0]}, {same[1]}, p={same[2]:g} ({table['kind']}; {table['source']})"
            tables.append((Table(["method", "HS, theirs", "FA, theirs", "HS, ours", "FA, ours"], rows, title), table, ours[same]))
    count = len(held["tables"])
    if not tables:
        text = [f"None of the {count} published tables at hand (as of {held['as_of']}) is of this base, task and poison ratio."]
        return Section("Published figures", text)
    text = [f"As of {held['as_of']}. Judge, records and decoding may differ, and one run has no interval: a likeness proves little."]
    text += [f"{t['title']}: {_unlike(t, config)}" for _, t, config in tables]
    return Section("Published figures", text, (), [table for table, _, _ in tables])


def _conditions(config: Json) -> _Conditions | None:
    """Base, task and poison ratio of a stage of fine-tuning, as the published tables name them; None of another stage."""
    data = config.get("data", {})
    if not data.get("user"):
        return None
    try:
        task = parse_source(str(data["user"])).task
    except InputError:  # a mixture
        return None
    base = re.sub(r"^meta-|-hf$", "", Path(str(config["model"]["path"])).name.lower().replace("_", "-"))
    return base, task, float(data["poison_ratio"]) if data.get("attack") else 0.0


def _beside(method: str, ratio: float, found: Found) -> list[str]:
    """Our HS and FA of a method at a poison ratio; where theirs has no hyper-parameters, of ours by that name with any."""
    ours = [o for o in found.outcomes if o.ratio in (None, ratio) and o.attacked]
    same = [o for o in ours if method in (o.method, o.method.partition(":")[0])]
    return [_of(same, "hs"), _of(same, "fa")]


def _of(outcomes: list[Outcome], figure: str) -> str:
    return "; ".join(str(o.figures[figure]) for o in outcomes if figure in o.figures) or "–"


def _unlike(table: Mapping[str, Any], config: Json) -> str:
    """Learning rate and number of records, theirs and ours."""
    rate, records = config.get("optimizer", {}).get("learning_rate"), config.get("data", {}).get("num_examples")
    theirs = [str(table[key]) if table[key] is not None else "not said" for key in ("learning_rate", "records")]
    return f"learning rate {theirs[0]}, here {rate}; records {theirs[1]}, here {records or 'all'}."


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"
