"""Files of layer coefficients hold what the objects hold, and a picture is drawn."""

import csv
import json
from pathlib import Path

import pytest

from panacea_jax.analysis.layer_files import write_coefficients
from panacea_jax.analysis.layers import layer_coefficients
from panacea_jax.errors import InputError
from tests.analysis.test_layers import hand_made, random_adapter


def test_files_agree(tmp_path: Path) -> None:
    w = random_adapter(4)
    results = [
        layer_coefficients(random_adapter(5), w, 0.5),
        layer_coefficients(random_adapter(6), w, kind="mean"),
    ]
    as_json, as_csv, as_png = write_coefficients(results, tmp_path / "new")
    assert [p.name for p in (as_json, as_csv, as_png)] == [
        "layers.json",
        "layers.csv",
        "layers.png",
    ]
    assert json.loads(as_json.read_text()) == results
    with as_csv.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 6
    for line, (result, row) in zip(lines, [(r, row) for r in results for row in r["layers"]]):
        assert (line["epsilon"], int(line["layer"])) == (result["epsilon"], row["layer"])
        assert [float(line[k]) for k in ("norm", "share", "density")] == [
            row[k] for k in ("norm", "share", "density")
        ]
        assert (float(line["effective"]) if line["effective"] else None) == row["effective"]
        for name, module in row["modules"].items():
            assert (float(line[f"{name}_norm"]), float(line[f"{name}_share"])) == (
                module["norm"],
                module["share"],
            )
    data = as_png.read_bytes()
    width, height = (int.from_bytes(data[i : i + 4], "big") for i in (16, 20))
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and width == 1350 and height > width / 2


def test_one_kind_is_an_object_not_a_list(tmp_path: Path) -> None:
    result = layer_coefficients(hand_made())
    for argument in (result, [result]):
        write_coefficients(argument, tmp_path)
        assert json.loads((tmp_path / "layers.json").read_text()) == result


def test_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot be written"):
        write_coefficients(layer_coefficients(hand_made()), tmp_path / "file")
