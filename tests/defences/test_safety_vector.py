"""What compares with an unaligned base, on eight devices, and in a comparison."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from panacea_jax.models import lora
from panacea_jax.models.model import load
from panacea_jax.models.peft import save_adapter
from tests import runs
from tests.defences.test_asft import moved, other_than
from tests.on_devices import on_devices
from tests.parallel.sharded import TARGETS
from tests.tiny import write_model


def test_eight_devices_make_what_one_does(tmp_path):
    """mesh fsdp = 4, tensor = 2, float64; AsFT's directions are cut like their matrices."""
    base = write_model(tmp_path / "base")
    other_than(base, tmp_path / "before")
    model = load(base, dtype="float32")
    for seed, name in enumerate(("tuned", "safe")):
        save_adapter(moved(lora.init(model, 3, 6, TARGETS, key=jax.random.key(seed)), seed), tmp_path / name, str(base))
    found = on_devices("tests.defences.sharded_safety_vector", tmp_path)
    assert found["parts"] == 8
    assert len(found["errors"]) == 10
    for name, error in found["errors"].items():
        assert error < 1e-5, f"{name}: {error}"


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """(place, work directory) of a comparison with an alignment stage of two steps."""
    root = tmp_path_factory.mktemp("compared")
    place = runs.make_place(root / "place")
    methods = ("lox:k=1+asft:lam=0.5", "resta:gamma=0.5", "safemerge:threshold=1.0")
    flags = place.flags(
        f"--config.compare.methods={methods!r}", "--config.compare.ratios=(0.25,)", "--config.align.defence.name=sft",
        "--config.align.train.steps=2", "--config.align.train.batch_size=4", "--config.train.steps=2", "--config.checkpoint.every=0",
    )  # fmt: skip
    assert runs.panacea("run", *flags, f"--workdir={root / 'out'}") == 0
    return place, root / "out"


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


def test_a_comparison_knows_the_unaligned_base(compared):
    """It is what the comparison's alignment starts from; the aligned model is what that left."""
    place, out = compared
    shared = out / "shared" / "seed0"
    assert {p.name for p in shared.iterdir()} == {"sft", "lox_k=1"}
    [asft] = (shared / "lox_k=1").rglob("asft*/finetune")
    made = manifest(asft)["config"]
    assert made["defence"]["base"] == str(place.base) and made["lora"]["init_from"] == str(shared / "lox_k=1" / "align" / "adapter")
    for method in ("resta", "safemerge"):
        [heal] = out.glob(f"cells/{method}*/*/heal")
        defence = manifest(heal)["config"]["defence"]
        assert (defence["base"], defence["aligned"]) == (str(place.base), str(shared / "sft" / "align" / "adapter"))
        ranks = [
            json.loads((folder / "adapter" / "adapter_config.json").read_text())["r"]
            for folder in (heal, next((shared / "sft").rglob("sft/finetune")))
        ]
        assert ranks == [4, 2]
    said = json.loads((out / "compare.json").read_text())
    extra = {row["method"]: row["extra_data"] for row in said["rows"] if "extra_data" in row}
    assert [extra.get(m) for m in ("resta:gamma=0.5", "safemerge:threshold=1.0")] == [["unaligned base"]] * 2


def test_lox_leaves_another_adapter_than_sft(compared):
    _, out = compared
    b = [
        lora_b(out / "shared" / "seed0" / name / "align" / "adapter")
        for name in ("sft", "lox_k=1")
    ]
    assert all(not np.allclose(b[0][n], b[1][n]) for n in b[0])


def lora_b(folder):
    return {n: x for n, x in load_file(folder / "adapter_model.safetensors").items() if "lora_B" in n}


def test_healing_side_by_side(tmp_path):
    """Adapters of other ranks than the one that is healed are answered with and exported like any."""
    place = runs.make_place(tmp_path / "place")
    model = load(place.base, dtype="float32")
    for seed, name in enumerate(("tuned", "safe")):
        fresh = lora.init(model, 2, 4, runs.ADAPTED, key=jax.random.key(seed))
        save_adapter(moved(fresh, seed), tmp_path / name, str(place.base))
    before, _ = other_than(place.base, tmp_path / "before")
    safe = tmp_path / "safe"
    methods = (f"resta:base={place.base},aligned={safe},gamma=0.5", f"safemerge:base={before},safe={safe},threshold=1")
    flags = place.flags(
        f"--config.lora.init_from={tmp_path / 'tuned'}", f"--config.heal.methods={methods!r}", "--config.data.attack=",
        "--config.defence.name=sft", "--config.heal.new_tokens=4", "--config.heal.held_out=0.4",
    )  # fmt: skip
    assert runs.panacea("heal", *flags, f"--workdir={tmp_path / 'run'}") == 0
    rows = {row["method"]: row for row in json.loads((tmp_path / "run" / "heal" / "heal.json").read_text())["rows"]}
    changes = [rows[name]["change"] for name in rows if name.startswith(("resta", "safemerge"))]
    assert len(changes) == 2 and min(changes) > 0.1 and not any(row["left_out"] for row in rows.values())
    assert (tmp_path / "run" / "heal" / "adapter" / "adapter_model.safetensors").is_file()
