"""Where arrays go, and that a sharded run computes what a single device does."""

import jax
import pytest
from jax.sharding import PartitionSpec

from panacea_jax.errors import InputError
from panacea_jax.parallel import sharding
from panacea_jax.parallel.mesh import make_mesh
from panacea_jax.parallel.sharding import (
    adapter_shardings,
    batch_rows,
    batch_sharding,
    bytes_per_device,
    replicated,
    weight_sharding,
)
from tests.on_devices import on_devices
from tests.tiny import write_model


def mesh(*sizes):
    """A mesh of one device in many places: enough for rules, which only look at sizes."""
    count = sizes[0] * sizes[1] * sizes[2]
    return make_mesh(*sizes, devices=list(jax.devices()[:1]) * count)


@pytest.mark.parametrize(
    ("path", "shape", "wanted"),
    [
        ("embed_tokens/embedding", (64, 32), ("tensor", "fsdp")),
        ("lm_head/kernel", (32, 64), ("fsdp", "tensor")),
        *(
            (f"layers/self_attn/{p}_proj/kernel", (3, 32, 64), (None, "fsdp", "tensor"))
            for p in "qkv"
        ),
        *(
            (f"layers/mlp/{p}_proj/kernel", (3, 32, 64), (None, "fsdp", "tensor"))
            for p in ("gate", "up")
        ),
        ("layers/self_attn/o_proj/kernel", (3, 64, 32), (None, "tensor", "fsdp")),
        ("layers/mlp/down_proj/kernel", (3, 64, 32), (None, "tensor", "fsdp")),
        ("layers/self_attn/q_proj/bias", (3, 64), (None, "tensor")),
        ("layers/self_attn/o_proj/bias", (3, 64), ()),
        ("layers/input_layernorm/scale", (3, 32), ()),
        ("layers/self_attn/q_norm/scale", (3, 16), ()),
        ("norm/scale", (32,), ()),
    ],
)
def test_rules(path, shape, wanted):
    assert weight_sharding(mesh(2, 2, 4), path, shape).spec == PartitionSpec(*wanted)


@pytest.mark.parametrize(
    ("shape", "uneven", "said"),
    [
        ((3, 32, 64), (None, "fsdp", "tensor"), ""),
        ((3, 33, 64), (None, None, "tensor"), "fsdp = 2: does not divide 33, dimension 1 of"),
        ((3, 32, 66), (None, "fsdp", None), "tensor = 4: does not divide 66, dimension 2 of"),
        ((3, 33, 66), (None, None, None), "fsdp = 2: does not divide 33, dimension 1 of"),
    ],
)
def test_an_axis_that_does_not_divide(shape, uneven, said):
    path = "layers/self_attn/k_proj/kernel"
    if said:
        with pytest.raises(InputError, match=rf"config\.mesh\.{said} {path} \[3, "):
            weight_sharding(mesh(1, 2, 4), path, shape)
    else:
        weight_sharding(mesh(1, 2, 4), path, shape)
    place = weight_sharding(mesh(1, 2, 4), path, shape, uneven=True)
    assert place.spec == PartitionSpec(*uneven)
    place.shard_shape(shape)  # raises where an axis does not divide


def test_a_rule_that_takes_an_axis_twice(monkeypatch):
    monkeypatch.setattr(sharding, "WEIGHT_RULES", ((r"kernel$", ("tensor", "fsdp", "tensor")),))
    said = r"layers/mlp/up_proj/kernel \[4, 32, 64\]: its rule splits two dimensions over tensor"
    with pytest.raises(InputError, match=said):
        weight_sharding(mesh(1, 2, 4), "layers/mlp/up_proj/kernel", (4, 32, 64))


def test_a_vocabulary_may_be_odd():
    for path, shape, spec in (
        ("embed_tokens/embedding", (32001, 64), (None, "fsdp")),
        ("lm_head/kernel", (64, 32001), ("fsdp", None)),
    ):
        assert weight_sharding(mesh(1, 2, 4), path, shape).spec == PartitionSpec(*spec)


def test_batches():
    m = make_mesh(2, 3, 1, devices=list(jax.devices()[:1]) * 12, replica=2)
    assert batch_rows(m) == 12
    assert batch_sharding(m).shard_shape((24, 7)) == (2, 7)
    assert replicated(m).shard_shape((12, 7)) == (12, 7)


def test_adapters_are_cut_by_size():
    """70B, rank 32: q's A is 80 MiB and cut like q, its B likewise; k's B, 10 MiB, is whole. At 7B all are."""

    def factors(width, narrow, layers):
        shapes = {"q_proj": (width, width), "k_proj": (width, narrow), "o_proj": (width, width)}
        return {
            name: {
                "a": jax.ShapeDtypeStruct((layers, d_in, 32), "float32"),
                "b": jax.ShapeDtypeStruct((layers, 32, d_out), "float32"),
            }
            for name, (d_in, d_out) in shapes.items()
        }

    m = mesh(1, 4, 8)
    large = adapter_shardings(m, {"self_attn": factors(8192, 1024, 80)})["self_attn"]
    found = {name: [tuple(x.spec) for x in pair.values()] for name, pair in large.items()}
    assert found == {
        "q_proj": [(None, "fsdp"), (None, None, "tensor")],
        "k_proj": [(None, "fsdp"), ()],
        "o_proj": [(None, "tensor"), (None, None, "fsdp")],
    }
    small = adapter_shardings(m, {"self_attn": factors(4096, 4096, 32)})
    assert all(x.is_fully_replicated for x in jax.tree.leaves(small))
    with pytest.raises(
        InputError, match=r"fsdp = 4: does not divide 8190, .* layers/self_attn/k_proj/a"
    ):
        adapter_shardings(m, {"self_attn": factors(8190, 1024, 80)})


def test_bytes_per_device():
    sharding = weight_sharding(mesh(1, 2, 4), "layers/mlp/up_proj/kernel", (3, 32, 64))
    assert bytes_per_device(sharding, (3, 32, 64), 2) == 3 * 16 * 16 * 2


def test_eight_devices_train_what_one_does(tmp_path):
    """Ten Panacea steps on six meshes: the same adapter and ε; on 2×2×2 the same greedy answers, and a quarter of a matrix a device."""
    folder = write_model(tmp_path / "base")
    found = on_devices("tests.parallel.sharded", folder)
    assert found["devices"] == 8
    assert found["whole"] == [2, 32, 32] and found["shard"] == [2, 16, 16]
    assert found["trained"] > 1e-3 and found["moved"] > 1e-3
    assert set(found["meshes"]) == {
        "1×8×1×1", "1×1×8×1", "1×1×4×2", "1×2×2×2", "2×1×2×2, adapter cut", "1×1×4×2, adapter cut",
    }  # fmt: skip
    for name in ("1×1×4×2", "1×2×2×2"):
        assert found["meshes"][name]["parts"] == [1, 1, 1, 1]
    # q's B is cut over tensor, down's over fsdp; of w and of ε.
    assert found["meshes"]["2×1×2×2, adapter cut"]["parts"] == [2, 2, 2, 2]
    assert found["meshes"]["1×1×4×2, adapter cut"]["parts"] == [2, 4, 2, 4]
    for mesh, run in found["meshes"].items():
        assert run["error"] < 1e-5 and run["error_epsilon"] < 1e-4, (mesh, run)
        assert run["compilations"] == 1, mesh
    assert max(found["ascent"]) < 1e-5, found["ascent"]  # with three ascent steps: the adapter, and ε
    [whole, shard] = found["cache"]
    assert shard == [
        whole[0] // 4,
        whole[1] // 2,
        *whole[2:],
    ]  # rows over data and fsdp, heads over tensor
    assert found["answers"][0] == found["answers"][1]


def test_eight_devices_heal_as_one_does(tmp_path):
    """mesh fsdp = 4, tensor = 2: every healing method deploys what it does on one device."""
    write_model(tmp_path / "base")
    found = on_devices("tests.parallel.sharded_heal", tmp_path)
    assert found["devices"] == 8 and len(found["methods"]) == 8
    for name, (error, changed) in found["methods"].items():
        assert error < 1e-5, f"{name}: {error}"
        assert changed >= 3, name
