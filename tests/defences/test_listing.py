"""The table of defences says what their files state, and the guide names them all."""

import re
from pathlib import Path

from panacea_jax.defences import DEFENCES, listing
from tests.runs import panacea

DOCS = Path(__file__).parents[2] / "docs" / "defences.md"


def test_the_command_prints_every_method_and_its_facts(capsys):
    assert panacea("defences") == 0
    out = capsys.readouterr().out
    for name, kind in DEFENCES.items():
        [line] = [line for line in out.splitlines() if re.match(rf"┃?│ {name} ", line)]
        assert kind.facts.title.split()[0] in line


def test_rows():
    found = {row[0]: row for row in listing.rows()}
    assert found.keys() == DEFENCES.keys()
    assert found["panacea"][2:5] == ("finetune", "harmful", "3 (user 1, harmful 2)")
    assert found["sft"][2:5] == ("align, finetune", "none", "1 (user 1)")
    assert found["random_perturbation"][2:5] == ("heal", "none", "none")
    stages = [row[2].split(",")[0] for row in listing.rows()]
    assert stages == sorted(stages, key=listing.STAGES.index)


def test_the_guide_names_every_defence_in_the_section_of_its_stage():
    titles = {"align": "Alignment stage", "finetune": "Fine-tuning stage", "heal": "Post-fine-tuning stage"}  # fmt: skip
    sections = dict(
        part.partition("\n")[::2] for part in DOCS.read_text("utf-8").split("\n## ")[1:]
    )
    for name, kind in DEFENCES.items():
        for stage in listing.stages(kind):
            assert f"| `{name}` |" in sections[titles[stage]], f"{name} is missing"


def test_the_measured_ratios_of_the_guide_lie_near_what_is_stated():
    """Every row is a method with steps, its ratio within 5 % of what its row states; T-Vaccine's recomputation comes on top."""
    measured = DOCS.read_text("utf-8").split("benchmarks/passes.py")[1]
    rows = re.findall(r"^\| `(\w+)` \| ([\d.]+) \| ([\d.]+) \|$", measured, re.M)
    stepping = {name for name, kind in DEFENCES.items() if sum(kind.facts.passes.values())}
    assert {"sft", "panacea", "vaccine"} <= {name for name, *_ in rows} <= stepping
    for name, stated, ratio in rows:
        extra = 4 / 3 if name == "t_vaccine" else 1
        assert abs(float(ratio) / (float(stated) * extra) - 1) < 0.05
