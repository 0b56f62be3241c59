"""Several runs in one picture: by hand for models of three and five layers, and the files."""

import csv
import itertools
import json

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from panacea_jax.analysis.layer_comparison import LayerRun, common_kinds, compare_runs, told_apart
from panacea_jax.analysis.layer_files import write_comparison
from panacea_jax.analysis.layer_pictures import plot_comparison
from panacea_jax.analysis.layer_probe import probed
from panacea_jax.errors import InputError


def coefficients(*shares, effective=None, modules=("q_proj",), kind="last"):
    """Those of an ε of norm 1 over layers of four entries."""
    rows = [
        {
            "layer": l, "norm": share**0.5, "share": share, "density": share**0.5 / 2,
            "effective": None if effective is None else effective[l], "modules": {name: {"norm": 1.0, "share": share} for name in modules},
        }
        for l, share in enumerate(shares)
    ]  # fmt: skip
    return {"epsilon": kind, "layers": rows, "outside": None}


def run(source, model, *args, **more):
    found = coefficients(*args, **more)
    return LayerRun(source, model, {found["epsilon"]: found})


@pytest.fixture
def runs():
    """Two seeds of a model of three layers, one run of a model of five."""
    return [
        run("a", "small", 0.5, 0.3, 0.2, effective=(3, 2, 1)),
        run("b", "small", 0.7, 0.1, 0.2, effective=(3, 1, 2)),
        run("c", "large", 0.4, 0.3, 0.1, 0.15, 0.05),
    ]


def test_models_by_hand(runs):
    found = compare_runs(runs, "last")
    small, large = found["models"]
    assert (small["runs"], large["runs"]) == (2, 1)
    assert [row["depth"] for row in large["layers"]] == [0, 0.25, 0.5, 0.75, 1]
    # Over their mean, 1/3: 1.5 and 2.1 in the first layer.
    assert small["layers"][0]["share"] == pytest.approx({"mean": 1.8, "std": 0.6 / 2**0.5})
    assert large["layers"][0]["share"] == pytest.approx({"mean": 2.0, "std": None})
    assert small["layers"][1]["effective"] == pytest.approx({"mean": 0.75, "std": 0.5 / 2**0.5})
    assert "effective" not in large["layers"][0]  # of which it is not known
    # Ranks 3 2 1 and 3 1 2.
    assert small["agreement"] == pytest.approx(0.5) and large["agreement"] is None
    assert found["runs"][0]["layers"][2] == {
        "layer": 2, "depth": 1.0, "share": 0.2, "density": 0.2**0.5 / 2, "effective": 1,
    }  # fmt: skip


def test_models_are_correlated_where_the_shallower_has_layers(runs):
    """The large one at depths 0, ½ and 1 has 2, 0.5 and 0.25; the small one's means are 1.8, 0.6 and 0.6."""
    [correlation] = compare_runs(runs, "last")["correlations"]
    assert (correlation["figure"], correlation["a"], correlation["b"]) == ("share", "small", "large")
    assert correlation["layers"] == 3
    # Ranks 3 1½ 1½ and 3 2 1.
    assert correlation["spearman"] == pytest.approx(1.5 / (1.5 * 2) ** 0.5)


def test_nothing_is_compared_where_a_model_has_no_layers():
    """An adapter of the upper four of ten layers, depths 2/3 to 1, beside one of three layers and one of two upper ones."""
    upper, whole, two = run("a", "upper", 0.1, 0.2, 0.3, 0.4), run("b", "whole", 0.2, 0.3, 0.5), run("c", "two", 0.4, 0.6)
    for model, layers in ((upper, (6, 7, 8, 9)), (two, (7, 9))):
        for row, layer in zip(model.kinds["last"]["layers"], layers):
            row["layer"] = layer
    correlations = compare_runs([upper, whole, two], "last")["correlations"]
    found = {(c["a"], c["b"]): (c["layers"], c["spearman"] and round(c["spearman"], 9)) for c in correlations}
    assert found == {("upper", "whole"): (1, None), ("upper", "two"): (2, 1), ("whole", "two"): (2, 1)}


def test_between_layers_a_model_is_read_on_the_straight_line():
    models = [run("a", "four", 0.4, 0.3, 0.2, 0.1), run("b", "six", *np.array([9, 1, 8, 2, 7, 3]) / 30)]
    [correlation] = compare_runs(models, "last")["correlations"]
    six = np.array([9, 1, 8, 2, 7, 3]) / 5
    at = [six[0], six[1] / 3 + six[2] * 2 / 3, six[3] * 2 / 3 + six[4] / 3, six[5]]
    ranks = np.argsort(np.argsort(at))
    assert correlation["spearman"] == pytest.approx(np.corrcoef(ranks, [3, 2, 1, 0])[0, 1])


def test_what_is_named_alike_but_is_not_is_told_apart():
    runs = [run("a", "base", 0.5, 0.5), run("b", "base", 1.0), run("c", "other", 1.0)]
    names = [r.model for r in told_apart(runs)]
    assert names == ["base, 2 layers, q", "base, 1 layers, q", "other"]
    with pytest.raises(InputError, match="1 layers and of 2 layers are both called 'base'"):
        compare_runs(runs, "last")


@pytest.mark.parametrize(("numbers", "named"), [((2, 3), "layers 2–3"), ((0, 3), "layers 0, 3")])
def test_adapters_of_other_layers_of_one_model_are_told_apart(numbers, named):
    """As many as there are, so a mean over both would be of unlike layers."""
    runs = [run("a", "base", 0.5, 0.5), run("b", "base", 0.4, 0.6)]
    for row, number in zip(runs[1].kinds["last"]["layers"], numbers):
        row["layer"] = number
    assert [r.model for r in told_apart(runs)] == ["base, 2 layers, q", f"base, {named}, q"]
    with pytest.raises(InputError, match=f"2 layers and of {named} are both called 'base'"):
        compare_runs(runs, "last")
    trained = runs[1].kinds["last"]
    with pytest.raises(InputError, match=f"fine-tuning's ε has {named}, the probed model 2 layers"):
        probed({"change": np.ones((1, 2))}, [0, 1], [trained])
    assert probed({"change": np.ones((1, 2))}, numbers, [trained])["figures"][1]["share_in_training"]["last"] == 0.6


def test_kinds_that_not_all_have_are_left_out():
    both = LayerRun("a", "m", {k: coefficients(1.0, kind=k) for k in ("last", "mean")})
    assert common_kinds([both, run("b", "m", 1.0, kind="mean")]) == ["mean"]
    with pytest.raises(InputError, match="a holds last, mean; b holds probe_mean"):
        common_kinds([both, run("b", "m", 1.0, kind="probe_mean")])


def test_an_even_epsilon_is_one_everywhere_and_none_is_zero():
    found = compare_runs([run("a", "even", 0.25, 0.25, 0.25, 0.25), run("b", "none", 0.0, 0.0)], "last")
    even, none = ([row["share"]["mean"] for row in model["layers"]] for model in found["models"])
    assert even == [1, 1, 1, 1] and none == [0, 0]
    assert found["correlations"][0]["spearman"] is None


def test_files(runs, tmp_path):
    found = compare_runs(runs, "last")
    path = write_comparison([found], tmp_path)
    assert path.name == "layers_compared.json" and json.loads(path.read_text()) == found
    with (tmp_path / "layers_compared.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 3 + 3 + 5
    assert lines[-1] == {
        "epsilon": "last", "model": "large", "source": "c", "layer": "4", "depth": "1.0", "share": "0.05",
        "density": str(0.05**0.5 / 2), "effective": "",
    }  # fmt: skip
    with (tmp_path / "layers_compared_correlations.csv").open(newline="") as file:
        [line] = csv.DictReader(file)
    assert float(line["spearman"]) == found["correlations"][0]["spearman"]
    assert (tmp_path / "layers_compared.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    write_comparison([found, found], tmp_path)
    assert json.loads(path.read_text()) == [found, found]


def test_nothing_stands_on_anything_else_in_the_picture(monkeypatch, tmp_path):
    """Correlations, legend and panels of six models, in the pixels that they take."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: figures.append(self))
    shares = itertools.islice(itertools.permutations((0.4, 0.3, 0.2, 0.1)), 6)
    models = [run(f"r{i}", f"a model of a longer name {i}", *each) for i, each in enumerate(shares)]
    plot_comparison([compare_runs(models, "last")], tmp_path / "p.png")
    FigureCanvasAgg(figures[0]).draw()
    panels = figures[0].axes
    boxes = [panel.get_window_extent() for panel in panels] + [panels[-1].get_legend().get_window_extent()]
    texts = [text for panel in panels for text in panel.texts]
    assert texts and all(len(text.get_text().splitlines()) == 6 for text in texts)
    boxes += [text.get_window_extent() for text in texts]
    assert not [(a, b) for a, b in itertools.combinations(boxes, 2) if a.overlaps(b)]
    assert all(figures[0].bbox.containsx(box.x0) and figures[0].bbox.containsx(box.x1) for box in boxes)
