"""`panacea layers --probe`: shares, importance and change of hidden states against PyTorch with hooks, on the same batches."""

import csv
import json

import numpy as np
import pytest
import torch
from scipy import stats

from panacea_jax.cli.parsing import parse_command
from panacea_jax.data.template import Template
from panacea_jax.defences import Antidote
from panacea_jax.models.vocabulary import open_vocabulary
from panacea_jax.stages.streams import make_streams
from tests import runs, torch_oracle
from tests.defences.oracles import vaccine
from tests.runs import panacea

BATCHES = 3


def probe(place, workdir, *more):
    flags = place.flags("--config.train.harmful_batch_size=3", *more)
    assert panacea("layers", *flags, f"--probe={BATCHES}", f"--workdir={workdir}") == 0


def figures(path):
    """The figures by layer of the file's second object, and the object."""
    last, mean = json.loads((path / "layers_probe.json").read_text())
    assert (last["epsilon"], mean["epsilon"]) == ("probe_last", "probe_mean")
    return mean["figures"], mean


def batches(place):
    """Those that a method which reads the harmful set has."""
    _, config = parse_command("finetune", place.flags("--config.train.harmful_batch_size=3"))
    _, tokenizer, size = open_vocabulary(place.base)
    streams, _ = make_streams(config, "heal", Antidote(), Template("chat", tokenizer), size, 1)
    return [streams["harmful"].batch(step) for step in range(BATCHES)]


def layer_outputs(model, batch):
    seen, handles = [], []
    for layer in [m for n, m in model.named_modules() if n.endswith(("layers.0", "layers.1"))]:
        handles.append(layer.register_forward_hook(lambda m, i, out: seen.append(out if torch.is_tensor(out) else out[0])))  # fmt: skip
    with torch.no_grad():
        torch_oracle.loss(model, batch)
    for handle in handles:
        handle.remove()
    return [x.double().numpy() for x in seen]


def expected(model, other, batch):
    """Shares of the harmful gradient, p, and the change of hidden states, by layer."""
    torch_oracle.loss(model, batch).backward()
    squares = np.zeros(2)
    for name, parameter in torch_oracle.trainable(model).items():
        if ".layers." in name:
            squares[int(name.split(".layers.")[1][0])] += float((parameter.grad.double() ** 2).sum())
    model.zero_grad()
    p = vaccine.probabilities(model, batch).detach().numpy()
    model.zero_grad()
    changes = []
    for a, b in zip(layer_outputs(model, batch), layer_outputs(other, batch)):
        ratios = np.linalg.norm(a - b, axis=-1) / np.linalg.norm(b, axis=-1)
        changes.append(ratios[np.asarray(batch.valid)].mean())
    return {"share": squares / squares.sum(), "importance": p, "change": np.array(changes)}


@pytest.fixture(scope="module", params=["adapter", "full"])
def probed(request, tmp_path_factory):
    """(workdir, what PyTorch says of each batch, whether all parameters)."""
    if request.param == "full":
        place, workdir = runs.finished_full_run(tmp_path_factory)
        model = torch_oracle.load_full(workdir / "finetune" / "model", torch.float32)
        other = torch_oracle.load_full(place.base, torch.float32)
        more = ("--against=none", "--config.train.full_parameters=True")
    else:
        place, workdir = runs.finished_run(tmp_path_factory)
        model = torch_oracle.load(place.base, workdir / "heal" / "adapter", torch.float32)
        other = torch_oracle.load(place.base, workdir / "align" / "adapter", torch.float32)
        more = (f"--against={workdir / 'align' / 'adapter'}",)
    out = tmp_path_factory.mktemp(request.param)
    probe(place, workdir, *more, f"--out={out}")
    return out, [expected(model, other, batch) for batch in batches(place)], workdir


def test_figures_are_those_of_pytorch(probed):
    out, wanted, _ = probed
    rows, _ = figures(out)
    for name in ("share", "importance", "change"):
        values = np.stack([w[name] for w in wanted])
        found = {what: [row[name][what] for row in rows] for what in ("last", "mean", "std")}
        np.testing.assert_allclose(found["last"], values[-1], rtol=2e-4)
        np.testing.assert_allclose(found["mean"], values.mean(0), rtol=2e-4)
        np.testing.assert_allclose(found["std"], values.std(0, ddof=1), rtol=5e-3, atol=1e-6)
        assert np.ptp(values.mean(0)) > 1e-3


def test_what_training_left_stands_beside_it(probed):
    out, _, workdir = probed
    last, mean = json.loads((workdir / "layers.json").read_text())
    rows, found = figures(out)
    for l, row in enumerate(rows):
        assert row["share_in_training"] == {
            "last": pytest.approx(last["layers"][l]["share"]), "mean": pytest.approx(mean["layers"][l]["share"]), "std": None,
        }  # fmt: skip
    full = found["probe"]["full_parameters"]
    assert full == ("effective" not in rows[0]) == ("effective_in_training" not in rows[0])
    assert not found["probe"]["fresh"]


def test_correlations_are_of_the_means(probed):
    out, _, _ = probed
    rows, found = figures(out)
    names = {name for c in found["correlations"] for name in (c["a"], c["b"])}
    assert {"share", "importance", "change", "share_in_training"} <= names and "density" not in names
    for c in found["correlations"]:
        a, b = ([row[c[side]]["mean"] for row in rows] for side in "ab")
        assert c["kendall"] == pytest.approx(stats.kendalltau(a, b).statistic)
        assert c["kendall_p"] == 1  # of two layers


def test_files(probed):
    out, _, _ = probed
    rows, found = figures(out)
    with (out / "layers_probe.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [float(line["importance_std"]) for line in lines] == [r["importance"]["std"] for r in rows]
    assert [line["share_in_training_std"] for line in lines] == ["", ""]
    with (out / "layers_probe_correlations.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == len(found["correlations"])
    assert (out / "layers_probe.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_fresh_adapter_moves_b_alone(tmp_path_factory, tmp_path, capsys):
    """Its A-gradient is 0, so that all of ε is in B; two seeds of it are compared."""
    place, _ = runs.finished_run(tmp_path_factory)
    for seed in (0, 1):
        probe(place, tmp_path / str(seed), f"--config.seed={seed}")
    assert "B = 0" in capsys.readouterr().err
    rows, found = figures(tmp_path / "0")
    assert found["probe"]["fresh"] and "change" not in rows[0]
    assert all(row["effective"]["mean"] > 0 for row in rows)
    assert rows != figures(tmp_path / "1")[0]  # another A, other batches
    assert panacea("layers", f"--workdir={tmp_path / '0'},{tmp_path / '1'}") == 0
    last, mean = json.loads((tmp_path / "0" / "layers_compared.json").read_text())
    assert (last["epsilon"], mean["epsilon"]) == ("probe_last", "probe_mean")
    [model] = mean["models"]
    assert (model["model"], model["runs"]) == ("base", 2)
    assert mean["runs"][1]["layers"][0]["share"] == figures(tmp_path / "1")[1]["layers"][0]["share"]


def test_against_a_work_directory_is_against_what_it_deploys(tmp_path_factory, tmp_path):
    place, workdir = runs.finished_run(tmp_path_factory)
    for name, against in (("folder", workdir / "heal" / "adapter"), ("workdir", workdir)):
        probe(place, tmp_path / name, f"--against={against}", f"--config.lora.init_from={workdir / 'align' / 'adapter'}")  # fmt: skip
    a, b = (figures(tmp_path / name)[0] for name in ("folder", "workdir"))
    assert a == b and a[0]["change"]["mean"] > 0
