"""What docs/architecture.md promises a newcomer: a defence, a judge and a task are added in just the places that it lists."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.runs import make_place

ROOT = Path(__file__).parents[1]
PLACES = ROOT / "docs" / "architecture.md"

DEFENCE = '''
"""Weight decay towards zero, as a loss."""
import dataclasses
from typing import ClassVar
import jax
from panacea_jax.defences.protocol import Batches, Defence, Facts, Gradient, LossFn, Params, RandomKey, Stage, State

@dataclasses.dataclass(frozen=True)
class Shrink(Defence):
    strength: float | int = 0.1
    stage: ClassVar[Stage] = "finetune"
    facts: ClassVar[Facts] = Facts("Shrink", "none", "none", "a toy")

    def gradient(self, loss_fn: LossFn, params: Params, batches: Batches, state: State, key: RandomKey) -> Gradient:
        loss, g = jax.value_and_grad(loss_fn)(params, batches["user"])
        return jax.tree.map(lambda g, w: g + self.strength * w, g, params), state, {"loss": loss}
'''
JUDGE = '''
"""Flags long answers."""
from panacea_jax.evaluate.judges.protocol import Judgement

class Length:
    name, version = "length", "1"

    def judge(self, prompts, answers):
        return [Judgement(flagged=len(a.split()) > 2, refused=not a) for a in answers]

    def self_test(self):
        return 1
'''


def edit(file: Path, *changes: tuple[str, str]) -> None:
    text = file.read_text("utf-8")
    for old, new in changes:
        assert text.count(old) == 1, (file, old)
        text = text.replace(old, new)
    file.write_text(text, "utf-8")


def stamps(root):
    return {p.relative_to(root): p.read_bytes() for p in root.rglob("*.py")}


def test_a_defence_a_judge_and_a_task(tmp_path):
    shutil.copytree(ROOT / "panacea_jax", tmp_path / "panacea_jax", ignore=shutil.ignore_patterns("__pycache__"))
    package, place = tmp_path / "panacea_jax", make_place(tmp_path / "place")
    before = stamps(package)
    # a defence: its file, and its line
    (package / "defences" / "shrink.py").write_text(DEFENCE.lstrip())
    line, added = '    "sft": Sft,\n', '    "shrink": Shrink,\n'
    imported = "from panacea_jax.defences.sft import Sft\n"
    more = "from panacea_jax.defences.shrink import Shrink\n"
    edit(package / "defences" / "__init__.py", (line, line + added), (imported, imported + more))
    # a judge: its file, and its line
    (package / "evaluate" / "judges" / "length.py").write_text(JUDGE.lstrip())
    line, added = '    "guard": Guard,\n', '    "length": lambda config: Length(),\n'
    imported = "from panacea_jax.evaluate.judges.guard import Guard\n"
    more = "from panacea_jax.evaluate.judges.length import Length\n"
    edit(package / "evaluate" / "judges" / "__init__.py", (line, line + added), (imported, imported + more))
    # a task: its columns, and its rule
    line = '    "pairs": _pairs,\n}'
    edit(package / "data" / "columns.py", (line, line.replace("}", '    "echo": _pairs,\n}')))
    line, added = '    "alpaca": Task(', '    "echo": Task("accuracy", 4, lambda answer, reference: answer != reference),\n'
    edit(package / "evaluate" / "tasks.py", (line, added + line))
    after = stamps(package)
    assert len(after) - len(before) == 2
    assert sum(before[name] != after[name] for name in before) == 4  # two places each, with the new files

    run = tmp_path / "run"
    flags = place.flags(
        "--config.defence.name=shrink", "--config.defence.strength=0.5", "--config.judge.name=length",
        f"--config.eval.tasks=('echo@{place.root / 'test.jsonl'}', '{place.spec('goals')}')", "--config.train.steps=2",
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "panacea_jax.cli", "run", *flags, f"--workdir={run}"], cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    scores = json.loads((run / "scores.json").read_text())
    assert scores["judge"]["name"] == "length" and scores["fa"]["echo"] == 100.0 and scores["hs"] is not None
    assert json.loads((run / "finetune" / "manifest.json").read_text())["config"]["defence"]["strength"] == 0.5


def test_the_page_lists_those_places_and_no_more_than_it_should():
    rows = dict(re.findall(r"^\| a (\w+) \| (.*) \|$", PLACES.read_text("utf-8"), re.M))
    most = {"defence": 2, "family": 1, "judge": 2, "task": 2, "command": 2}
    for what, count in most.items():
        assert len(re.findall(r"\b\d\. ", rows[what])) == count, what
    for path in re.findall(r"`([\w/]+\.py)`", "".join(rows.values())):
        assert (ROOT / "panacea_jax" / path).is_file(), path


def test_the_readme_leads_to_the_equation_in_one_step():
    text = (ROOT / "README.md").read_text("utf-8")
    [link] = set(re.findall(r"\]\((panacea_jax/[\w/]+\.py)\)", text))
    assert "g − λ (h' − h)" in (ROOT / link).read_text("utf-8")
    assert "max_{‖ε‖≤ρ}" in text
