"""A folder shaped like a 70B model, of sparse files, is opened and planned without being read."""

import json
from pathlib import Path

import numpy as np
import pytest

from panacea_jax import cli
from panacea_jax.evaluate.judges.reading import model_fingerprint
from panacea_jax.models.families import config_from_dict
from panacea_jax.models.model import abstract_model
from panacea_jax.models.weights import find_tensors, hf_shapes
from tests.data.conftest import write_tokenizer

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 8192,
    "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "torch_dtype": "bfloat16",
}  # fmt: skip
PARAMETERS = 70_553_706_496
FILES = 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("large") / "70b"
    place.mkdir()
    (place / "config.json").write_text(json.dumps(CONFIG))
    shapes = list(hf_shapes(abstract_model(config_from_dict(CONFIG))[1]).items())
    names = [f"model-{i + 1:05d}-of-{FILES:05d}.safetensors" for i in range(FILES)]
    file_of = {}
    for i, name in enumerate(names):
        header, end = {}, 0
        for tensor, shape in shapes[i * len(shapes) // FILES : (i + 1) * len(shapes) // FILES]:
            start, end = end, end + 2 * int(np.prod(shape))
            header[tensor] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
            file_of[tensor] = name
        encoded = json.dumps(header).encode()
        with (place / name).open("wb") as stream:
            stream.write(len(encoded).to_bytes(8, "little") + encoded)
            try:
                stream.truncate(8 + len(encoded) + end)
            except OSError as error:
                pytest.skip(f"no file of {end} bytes here: {error}")
    (place / "model.safetensors.index.json").write_text(json.dumps({"weight_map": file_of}))
    stats = [(place / name).stat() for name in names]
    assert 2 * PARAMETERS < sum(s.st_size for s in stats) < 2 * PARAMETERS + 10**6
    if sum(512 * s.st_blocks for s in stats) > 10**7:
        pytest.skip("this file system has no sparse files")
    return write_tokenizer(place)


class Frugal:
    """Asserts that a block of code reads little, of all files, modules among them."""

    def __enter__(self):
        self.read = self._bytes()

    def __exit__(self, kind, *_):
        if kind is None:
            assert self._bytes() - self.read < 100e6

    @staticmethod
    def _bytes():
        io = Path("/proc/self/io")
        return int(io.read_text().split()[1]) if io.exists() else 0


def test_plan(folder, capsys, tmp_path):
    flags = ["--config.mesh.fsdp=32", "--config.mesh.data=1", "--config.model.remat=full"]
    with Frugal():
        code = cli.run(
            ["plan", f"--config.model.path={folder}", "--topology=gpu:h100x32", f"--workdir={tmp_path}", *flags]
        )  # fmt: skip
    assert code == 0, capsys.readouterr().err
    [plan] = json.loads((tmp_path / "plan.json").read_text())
    assert plan["fits"]
    # All but the norms is split over the 32.
    assert plan["resident"]["base weights"] == pytest.approx(2 * PARAMETERS / 32, rel=0.01)


def test_doctor(folder, capsys):
    with Frugal():
        assert cli.run(["doctor", f"--config.model.path={folder}"]) == 0
    said = capsys.readouterr().out
    assert f"{PARAMETERS:,}" in said and f"723 in {FILES} files" in said


def test_fingerprint_and_a_part_of_a_matrix(folder):
    """What one of 512 devices needs of it."""
    with Frugal():
        assert len(model_fingerprint(folder)) == 12
        tensor = find_tensors(folder)["model.layers.79.mlp.up_proj.weight"]
        part = np.concatenate(list(tensor.blocks([(0, 28672), (16, 32)])))
        assert part.shape == (28672, 16) and not part.any()
