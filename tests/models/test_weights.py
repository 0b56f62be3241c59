"""Weights to and from Hugging Face folders, against transformers and the safetensors package."""

import json
import shutil

import jax
import numpy as np
import pytest
import torch
import transformers as tf
from safetensors.numpy import save_file
from safetensors.torch import load_file
from safetensors.torch import save_file as save_torch

from panacea_jax.errors import InputError
from panacea_jax.models import hub
from panacea_jax.models import model as models
from panacea_jax.models.config import read_config
from panacea_jax.models.saving import save_weights
from tests.families import FAMILIES, build, save


def _tensors(folder):
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def _bits(tensor):
    return tensor.contiguous().view(torch.uint8).numpy()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_round_trip_is_byte_equal(family, dtype, tmp_path):
    """Sharded files in, sharded files out; every tensor the same bits under the same name."""
    theirs = build(family, dtype=getattr(torch, dtype))
    save(theirs, tmp_path / "in", max_shard_size="40KB")
    assert len(list((tmp_path / "in").glob("*.safetensors"))) > 2
    ours = models.load(tmp_path / "in", dtype=dtype)
    hf_config = read_config(tmp_path / "in")
    save_weights(ours.weights, tmp_path / "out", hf_config, max_shard_bytes=50_000)
    want, got = _tensors(tmp_path / "in"), _tensors(tmp_path / "out")
    assert want.keys() == got.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype and got[name].shape == tensor.shape
        np.testing.assert_array_equal(_bits(got[name]), _bits(tensor), err_msg=name)
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2 and max(f.stat().st_size for f in files) < 60_000
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    size = sum(t.numel() * t.element_size() for t in want.values())
    assert index["metadata"]["total_size"] == size
    assert read_config(tmp_path / "out") == hf_config
    again = type(theirs).from_pretrained(tmp_path / "out", dtype="auto")
    assert again.dtype == theirs.dtype
    for a, b in zip(again.parameters(), theirs.parameters()):
        assert torch.equal(a, b)


def test_values_are_those_of_the_files(tmp_path):
    theirs = build("qwen2")
    ours = models.load(save(theirs, tmp_path / "m"), dtype="float32")
    for i, layer in enumerate(theirs.model.layers):
        down = layer.mlp.down_proj.weight.detach().numpy()
        np.testing.assert_array_equal(
            ours.weights["layers"]["mlp"]["down_proj"]["kernel"][i], down.T
        )
        bias = layer.self_attn.k_proj.bias.detach().numpy()
        np.testing.assert_array_equal(
            ours.weights["layers"]["self_attn"]["k_proj"]["bias"][i], bias
        )


def test_conversion_between_dtypes(tmp_path):
    theirs = build("llama2", dtype=torch.float16)
    folder = save(theirs, tmp_path / "in")
    ours = models.load(folder, dtype="bfloat16")
    head = theirs.lm_head.weight.detach().to(torch.bfloat16).T
    got = torch.tensor(np.asarray(ours.weights["lm_head"]["kernel"]).astype(np.float32))
    assert torch.equal(got.to(torch.bfloat16), head)
    save_weights(ours.weights, tmp_path / "out", read_config(folder), dtype="float32")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written["lm_head.weight"], head.T.float())
    config = tf.AutoConfig.from_pretrained(tmp_path / "out")
    assert config.dtype == torch.float32


def test_a_matrix_larger_than_a_tile(tmp_path):
    theirs = build("llama2", hidden_size=136, intermediate_size=200)
    ours = models.load(save(theirs, tmp_path / "m"), dtype="float32")
    want = theirs.model.layers[1].mlp.gate_proj.weight.detach().numpy().T
    np.testing.assert_array_equal(ours.weights["layers"]["mlp"]["gate_proj"]["kernel"][1], want)


def test_harmless_extras_are_ignored(tmp_path):
    folder = save(build("qwen2_tied"), tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(6)
    save_torch(tensors, folder / "model.safetensors")
    ours = models.load(folder, dtype="float32")
    assert "lm_head" not in ours.weights


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A folder of several shards."""
    return save(build("llama2"), tmp_path_factory.mktemp("w") / "good", max_shard_size="40KB")


@pytest.fixture
def folder(good, tmp_path):
    shutil.copytree(good, tmp_path / "m")
    return tmp_path / "m"


@pytest.fixture
def single(tmp_path):
    return save(build("llama2"), tmp_path / "single")


def _edit(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_torch(tensors, file)


def _fails(folder, *words):
    with pytest.raises(InputError) as error:
        models.load(folder, dtype="float32")
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


UP = "model.layers.1.mlp.up_proj.weight"


def test_missing_tensor(single):
    _edit(single, lambda t: t.pop(UP))
    _fails(single, UP, "missing", str(single))


def test_missing_head_of_an_untied_model(single):
    _edit(single, lambda t: t.pop("lm_head.weight"))
    _fails(single, "lm_head.weight", "missing")


@pytest.mark.parametrize(
    "name",
    ["model.layers.7.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.bias", "score.weight"],
)
def test_extra_tensor(single, name):
    _edit(single, lambda t: t.update({name: torch.zeros(3)}))
    _fails(single, name, "extra", "model.safetensors")


def test_misshaped_tensor(single):
    _edit(single, lambda t: t.update({UP: t[UP].T.contiguous()}))
    _fails(single, UP, "(48, 64)", "(64, 48)", "model.safetensors")


def test_unsupported_element_type(single):
    _edit(single, lambda t: t.update({UP: t[UP].to(torch.int8)}))
    _fails(single, UP, "I8")


def test_truncated_single_file(single):
    file = single / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    _fails(single, "truncated", str(file), "tensor model.", "100 bytes")


@pytest.mark.parametrize("keep", [0, 5, 200])
def test_truncated_header(single, keep):
    file = single / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    _fails(single, str(file), "header cut off")


def test_damaged_headers(single):
    file = single / "model.safetensors"
    for header in (b"not json", b"[]      ", b'{"a":{}}', b'{"a":3} ', b"\xff" * 8):
        file.write_bytes(len(header).to_bytes(8, "little") + header)
        _fails(single, str(file), "damaged")
    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}
    header = json.dumps({"a": entry}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    _fails(single, str(file), "tensor a", "8 bytes do not hold shape (4,)")


def test_shard_cut_off_names_tensor_and_file(folder):
    file = sorted(folder.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-8])
    _fails(folder, "truncated", file.name, "tensor model.")


def test_missing_shard(folder):
    file = sorted(folder.glob("*.safetensors"))[1]
    file.unlink()
    _fails(folder, file.name, "missing")


def test_index_promises_in_vain(folder):
    index = folder / "model.safetensors.index.json"
    parsed = json.loads(index.read_text())
    parsed["weight_map"]["model.layers.9.mlp.up_proj.weight"] = next(
        iter(parsed["weight_map"].values())
    )
    index.write_text(json.dumps(parsed))
    _fails(folder, "model.layers.9.mlp.up_proj.weight", "promises")


def test_index_may_not_point_elsewhere(folder):
    index = folder / "model.safetensors.index.json"
    parsed = json.loads(index.read_text())
    parsed["weight_map"]["x"] = "../other.safetensors"
    index.write_text(json.dumps(parsed))
    _fails(folder, "../other.safetensors", "not a file of this folder")


@pytest.mark.parametrize("text", ["{", "{}", '{"weight_map": 3}', "[]"])
def test_damaged_index(folder, text):
    (folder / "model.safetensors.index.json").write_text(text)
    _fails(folder, "index.json", "damaged")


def test_pickled_weights_are_refused(single):
    (single / "model.safetensors").unlink()
    _fails(single, "neither model.safetensors nor")
    (single / "pytorch_model.bin").write_bytes(b"never read")
    _fails(single, "pytorch_model.bin", "pickled", "refused")


def test_folder_or_hub_id(tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def download(repo, allow_patterns):
        asked.append((repo, allow_patterns))
        if repo == "no/where":
            raise OSError("offline\nand more")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    (tmp_path / "folder").mkdir()
    assert hub.local_folder(tmp_path / "folder") == tmp_path / "folder"
    for path in ("/no/such/folder", "./a/b", "a/b/c", "just-a-name", "~/models"):
        with pytest.raises(InputError, match="no such model folder, and not a hub id"):
            hub.local_folder(path)
    assert asked == []  # a path never turns into a network call
    assert hub.local_folder("some/model") == tmp_path
    assert not any("bin" in pattern or "py" in pattern for pattern in asked[0][1])
    with pytest.raises(InputError, match=r"no/where: .*hub: offline$"):
        hub.local_folder("no/where")


def test_nothing_is_overwritten_and_nothing_half_written(tmp_path, monkeypatch):
    ours = models.load(save(build("llama2"), tmp_path / "in"), dtype="float32")
    config = read_config(tmp_path / "in")
    before = (tmp_path / "in" / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match="already there"):
        save_weights(ours.weights, tmp_path / "in", config)
    assert (tmp_path / "in" / "model.safetensors").read_bytes() == before
    (tmp_path / "empty").mkdir()
    save_weights(ours.weights, tmp_path / "empty", config)
    assert (tmp_path / "empty" / "model.safetensors").is_file()
    (tmp_path / "a_file").write_text("x")
    with pytest.raises(InputError, match=r"cannot be written|already there"):
        save_weights(ours.weights, tmp_path / "a_file" / "out", config)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("panacea_jax.models.tensorfile.write_tensors", full)
    with pytest.raises(InputError, match="out: cannot be written: No space left"):
        save_weights(ours.weights, tmp_path / "out", config)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a_file", "empty", "in"]


def test_arrays_outlive_the_file(single):
    """What was loaded does not depend on the file any more (no mapping behind an array)."""
    ours = models.load(single, dtype="float32")
    want = jax.tree.map(lambda x: np.array(x), ours.weights)
    file = single / "model.safetensors"
    size = file.stat().st_size
    with file.open("r+b") as stream:
        stream.write(bytes(size))
    jax.tree.map(np.testing.assert_array_equal, ours.weights, want)


def test_reads_what_the_safetensors_package_writes(tmp_path):
    from panacea_jax.models import tensorfile

    arrays = {"b": np.arange(6, dtype=np.float16).reshape(2, 3), "a": np.zeros((0, 2), np.float64)}
    save_file(arrays, tmp_path / "x.safetensors", metadata={"k": "v"})
    found = tensorfile.read_header(tmp_path / "x.safetensors")
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        bounds = [(0, n) for n in array.shape]
        got = [np.zeros((0, *array.shape[1:])), *found[name].blocks(bounds)]
        np.testing.assert_array_equal(np.concatenate(got), array)
