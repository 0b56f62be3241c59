"""Buckets, the fingerprint, the self-test of model judges, and reading on several devices."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from panacea_jax.errors import InputError
from panacea_jax.evaluate.judges.protocol import Judgement
from panacea_jax.evaluate.judges.reading import (
    check_scores,
    model_fingerprint,
    read_ends,
    sigmoid,
    text_bucket,
)
from panacea_jax.models.model import load
from tests.evaluate.judges.models import write_classifier
from tests.on_devices import on_devices


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reading")
    write_classifier(path)
    return path


def test_few_buckets():
    assert [text_bucket(n, 256) for n in (1, 64, 65, 128, 129, 256)] == [64, 64, 128, 128, 256, 256]
    assert text_bucket(3, 40) == 40
    assert len({text_bucket(n, 3000) for n in range(1, 3001)}) == 7


def test_a_foreign_tokenizer(folder):
    model = load(folder, dtype="float32", classifier=True)
    with pytest.raises(InputError, match="record 1 has token id 71, outside the model's vocabulary of 71"):
        read_ends(model, [[1, 71]], np.zeros((1, 14), np.int64), batch_size=2, limit=64)


def test_a_classifier_is_no_base_model(folder):
    with pytest.raises(InputError, match="unsupported architecture LlamaForSequenceClassification"):
        load(folder)


def test_fingerprint_is_of_what_the_tensors_say(folder, tmp_path):
    """Not of when the files were written, nor of how they are cut."""
    whole = model_fingerprint(folder)
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    os.utime(copy / "model.safetensors", (1, 1))
    weights = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    names = sorted(weights)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, chosen in parts.items():
        save_file({n: weights[n] for n in chosen}, copy / file, {"format": "pt"})
    index = {"weight_map": {n: file for file, chosen in parts.items() for n in chosen}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    assert model_fingerprint(copy) == whole
    weights[names[3]].reshape(-1)[0] += 1
    save_file({n: weights[n] for n in names[1::2]}, copy / "model-2.safetensors", {"format": "pt"})
    assert model_fingerprint(copy) != whole
    (folder / "special_tokens_map.json").write_text("{}")
    assert model_fingerprint(folder) != whole


class Broken:
    """A judge whose score depends on its batch, or is no probability."""

    name, version = "broken", "1"

    def __init__(self, score):
        self.score = score

    def judge(self, prompts, answers):
        return [
            Judgement(False, False, {"p": self.score(len(prompts), i)}) for i in range(len(prompts))
        ]

    def self_test(self) -> int:
        return check_scores(self)


@pytest.mark.parametrize(
    ("score", "problem"),
    [
        (lambda n, i: 0.5 if n > 1 else 0.501, "in one batch and"),
        (lambda n, i: i / 10, "in one batch and"),
        (lambda n, i: float("nan"), "p = nan"),
        (lambda n, i: 1.1, "p = 1.1"),
    ],
)
def test_self_test_notices(score, problem):
    with pytest.raises(RuntimeError, match=problem):
        Broken(score).self_test()


def test_sigmoid_keeps_its_dtype():
    x = np.linspace(-9, 9, 37, dtype=np.float32)
    assert sigmoid(x).dtype == np.float32
    np.testing.assert_allclose(sigmoid(x), 1 / (1 + np.exp(-x.astype(np.float64))), atol=1e-7)


def test_eight_devices_judge_as_one(tmp_path):
    write_classifier(tmp_path / "beaver")
    found = on_devices("tests.evaluate.judges.sharded", tmp_path / "beaver")
    assert found["devices"] == 8
    assert found["shard"] == [2, 24, 24] and found["whole"] == [2, 48, 48]
    np.testing.assert_allclose(found["sharded"], found["single"], atol=1e-5, rtol=0)
    assert np.std(found["single"]) > 0.05
