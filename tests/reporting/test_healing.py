"""Healing in a report: methods side by side as heal.json has them, and the curves of radii that chose themselves."""

import itertools

import pytest

from panacea_jax.errors import InputError
from panacea_jax.evaluate.intervals import wilson
from panacea_jax.healing.choice import BUDGET, Share
from panacea_jax.healing.curve import as_json
from panacea_jax.healing.radius import ChosenRadius, Point
from panacea_jax.healing.table import UNTREATED, Treated, rows_as_json, rows_from_json
from panacea_jax.reporting.gather import gather
from panacea_jax.reporting.healing_section import healing_section
from panacea_jax.reporting.report import write_report
from panacea_jax.workdir import write_json
from tests.reporting.folders import write_run, write_stage


def figures(hs, fa):
    return {"hs": Share(hs, 20), "fa": Share(fa, 20), "coherence": Share(20, 20)}


ROWS = [
    Treated(UNTREATED, figures(19, 20)),
    Treated("ascent:rho=auto", figures(1, 20), 1.5, 30.0),
    Treated("antidote", figures(18, 10), 4.0),
    Treated("realign", why="config.data.alignment is not set"),
]
# The largest radius has losses only: it ended the search, and nothing was asked there.
CURVE = ChosenRadius(1.5, [
    Point(0.0, {"hs": 0.5, "fa": 0.1}, figures(19, 20)), Point(1.5, {"hs": 3.0, "fa": 0.2}, figures(1, 20)),
    Point(2.0, {"hs": 4.0, "fa": 1.5}, figures(0, 12)), Point(4.0, {"hs": 9.0, "fa": 5.0}, {}),
], BUDGET)  # fmt: skip


@pytest.fixture
def healed(tmp_path):
    """A run whose adapter was healed by several methods, one of which chose its radius."""
    folder = write_run(tmp_path / "run", 9, 8, "sft")
    heal = write_stage(folder, "heal", {}, {})
    write_json(heal / "heal.json", rows_as_json(ROWS, ROWS[1], BUDGET))
    (heal / "ascent_rho=auto" / "heal").mkdir(parents=True)
    write_json(heal / "ascent_rho=auto" / "heal" / "radius.json", as_json(CURVE))
    return folder


def test_rows_are_read_as_they_were_written():
    assert rows_from_json(rows_as_json(ROWS, ROWS[1], BUDGET)) == (ROWS, ROWS[1], BUDGET)


def test_methods_stand_side_by_side(healed):
    section = healing_section(gather(healed))
    [table] = section.tables
    assert [row[0] for row in table.rows] == [row.method for row in ROWS]
    assert [row[-1] for row in table.rows] == ["", "best", "beyond its budget: FA", "left out: config.data.alignment is not set"]
    [chart] = [chart for chart in section.charts if chart.name == "healed_hs_fa"]
    points = {value["label"]: (value["x"], value["y"], value["front"]) for value in chart.spec["data"]["values"]}
    assert points == {UNTREATED: (95, 100, False), "ascent:rho=auto": (5, 100, True), "antidote": (90, 50, False)}


def test_a_radius_that_chose_itself_has_its_curve(healed):
    charts = {chart.name: chart for chart in healing_section(gather(healed)).charts}
    values = charts["radius_figures"].spec["data"]["values"]
    harmful = [(v["x"], v["y"], v["low"], v["high"]) for v in values if v["series"] == "HS"]
    assert harmful == [(x, 5 * k, *(100 * bound for bound in wilson(k, 20))) for x, k in ((0, 19), (1.5, 1), (2, 0))]
    losses = {(v["series"], v["x"]): v["y"] for v in charts["radius_losses"].spec["data"]["values"]}
    assert losses.keys() == set(itertools.product(("harmful", "task"), (0, 1.5, 2))) and losses["harmful", 1.5] == 3
    for chart in (charts["radius_figures"], charts["radius_losses"]):
        assert chart.spec["layer"][-1]["encoding"]["x"]["datum"] == 1.5 and "ascent_rho=auto" in chart.title


def test_they_are_drawn_on_the_page(healed):
    figures = write_report(healed).parent / "figures"
    assert {"healed_hs_fa.svg", "radius_figures.svg", "radius_losses.svg"} <= {path.name for path in figures.glob("*.svg")}
    assert "stroke-dasharray" in (figures / "radius_losses.svg").read_text("utf-8")


def test_other_files_of_that_name_are_refused(healed):
    write_json(healed / "heal" / "heal.json", {"rows": [{}]})
    with pytest.raises(InputError, match=r"heal\.json: not ours"):
        healing_section(gather(healed))
    assert healing_section(gather(write_run(healed.parent / "other", 1, 1))) is None
