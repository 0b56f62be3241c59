"""The table of defences says what their files state, and the guide names them all."""

import re
from pathlib import Path

from panacea_jax.defences import DEFENCES, Defence
from panacea_jax.defences.protocol import extra_data
from panacea_jax.stages import defences as listing
from tests.runs import panacea

DOCS = Path(__file__).parents[2] / "docs" / "defences.md"


def test_the_command_prints_every_method_and_its_facts(capsys):
    assert panacea("defences") == 0
    out = capsys.readouterr().out
    for name, kind in DEFENCES.items():
        [line] = [line for line in out.splitlines() if re.match(rf"┃?│ {name} ", line)]
        assert kind.facts.title.split()[0] in line


# Stage, extra data and passes of every method at its own settings, by methods.md §0.
ROWS = {
    "sft": ("align, finetune", "none", "1 (user 1)"),
    "vaccine": ("align", "none", "2 (user 2)"),
    "random_vaccine": ("align", "none", "1 (user 1)"),
    "t_vaccine": ("align", "harmful", "2.005 (user 2, harmful 0.005)"),
    "booster": ("align", "harmful", "3 (user 1, harmful 2)"),
    "booster_vaccine": ("align", "harmful", "4 (user 2, harmful 2)"),
    "repnoise": ("align", "harmful", "2 (user 1, harmful 1)"),
    "tar": ("align", "harmful", "81.5 (user 1.5, harmful 80)"),
    "panacea": ("finetune", "harmful", "3 (user 1, harmful 2)"),
    "lisa": ("finetune", "alignment", "1 (user 0.9, alignment 0.1)"),
    "ldifs": ("finetune", "none", "1.5 (user 1.5)"),
    "ewc": ("finetune", "alignment", "1 (user 1); once 1 over all alignment"),
    "kl": ("finetune", "none", "1.5 (user 1.5)"),
    "vlguard": ("finetune", "alignment", "1 (user 1)"),
    "sbr": ("finetune", "harmful", "2 (user 1, harmful 1); once 0.5 batches of harmful"),
    "constrained_sft": ("finetune", "none", "1.5 (user 1.5)"),
    "safegrad": ("finetune", "alignment", "2.5 (user 1, alignment 1.5)"),
    "bds": ("finetune", "alignment", "2 (user 1, alignment 1)"),
    "ascent": ("heal", "harmful", "once 1 over all harmful"),
    "random_perturbation": ("heal", "none", "none"),
    "antidote": ("heal", "harmful", "once 0.5 over all harmful"),
    "random_prune": ("heal", "none", "none"),
    "magnitude_prune": ("heal", "none", "none"),
    "safelora": ("heal", "unaligned base", "none"),
    "realign": ("heal", "alignment, benign", "1 (user 1)"),
    "unlearn": ("heal", "attack", "once 1 over all attack"),
    "triplet": ("align", "harmful, benign", "4.5 (user 1.5, harmful 1.5, benign 1.5)"),
    "safe_delta": ("heal", "alignment", "once 0.5 over all alignment"),
    "asft": ("finetune", "unaligned base", "1 (user 1)"),
    "lox": ("align", "none", "1 (user 1)"),
    "resta": ("heal", "unaligned base", "none"),
    "safemerge": ("heal", "unaligned base", "none"),
}


def test_rows():
    assert {row[0]: row[2:5] for row in listing.defence_rows()} == ROWS
    stages = [row[2].split(",")[0] for row in listing.defence_rows()]
    assert stages == sorted(stages, key=listing.STAGES.index)


def test_every_method_says_what_it_is_beside_the_public_code():
    assert not [row[0] for row in listing.defence_rows() if not row[-1]]


def test_the_guide_names_every_defence_in_the_section_of_its_stage():
    titles = {"align": "Alignment stage", "finetune": "Fine-tuning stage", "heal": "Post-fine-tuning stage"}  # fmt: skip
    sections = dict(
        part.partition("\n")[::2] for part in DOCS.read_text("utf-8").split("\n## ")[1:]
    )
    for name, kind in DEFENCES.items():
        data = ", ".join(extra_data(kind())) or "none"
        for stage in kind().stages:
            [line] = re.findall(rf"^\| `{name}` \|.*$", sections[titles[stage]], re.M)
            assert line.endswith(f"| {data} |"), f"{name}: {line}"


def test_the_measured_ratios_of_the_guide_lie_near_what_is_stated():
    """Every row is a method with steps, its ratio within 5 % of what its row states; T-Vaccine's recomputation comes on top."""
    measured = DOCS.read_text("utf-8").split("benchmarks/passes.py")[1]
    rows = re.findall(r"^\| `(\w+)` \| ([\d.]+) \| ([\d.]+) \|$", measured, re.M)
    stepping = {name for name, kind in DEFENCES.items() if issubclass(kind, Defence)}
    assert {"sft", "panacea", "vaccine"} <= {name for name, *_ in rows} <= stepping
    for name, stated, ratio in rows:
        extra = 4 / 3 if name == "t_vaccine" else 1
        assert abs(float(ratio) / (float(stated) * extra) - 1) < 0.05
