"""The picture of a comparison over its settings."""

import pytest
from matplotlib.figure import Figure

from panacea_jax.comparison.picture import plot_settings


def row(method, ratio, setting, hs):
    return {"method": method, "ratio": ratio, "setting": setting, "figures": {"hs": {"mean": hs, "ci95": [hs - 1, hs + 1]}}}


def test_every_point_stands_over_its_setting(monkeypatch, tmp_path):
    """Also where the base was varied, of which the models before fine-tuning have a row each."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: figures.append(self))
    settings = [f"compare.world={world},train.steps={steps}" for world in ("tiny", "tiny_qwen3") for steps in (1, 2)]
    rows = [row("aligned", None, f"compare.world={world}", 50.0) for world in ("tiny", "tiny_qwen3")]
    rows += [row("sft", 0.1, setting, 10.0 * i) for i, setting in enumerate(settings)]
    worst = [{"method": "sft", "ratio": 0.1, "hs": {"cumulative": [0.0, 10.0, 20.0, 30.0]}}]
    plot_settings({"rows": rows, "ratios": [0.1], "methods": ["sft"], "worst": worst}, tmp_path / "compare.png")
    [axes] = figures[0].axes
    means = dict(zip(*axes.lines[0].get_data()))
    shown = {text.get_text(): means[place] for place, text in zip(axes.get_xticks(), axes.get_xticklabels())}
    assert shown == pytest.approx({setting: 10.0 * i for i, setting in enumerate(settings)})
