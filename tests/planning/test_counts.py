"""What compiled steps compute, move, send and hold stays as it is, until somebody says otherwise (``make counts``)."""

import json

import jax
import pytest

from tests.on_devices import on_devices
from tests.planning.counted import GOLDEN

KEPT = json.loads(GOLDEN.read_text("utf-8"))
STEPS = [name for name in KEPT if name != "jax"]


@pytest.fixture(scope="module")
def found():
    if jax.__version__ != KEPT["jax"]:
        pytest.skip(f"counted with jax {KEPT['jax']}; `make counts` counts anew")
    return on_devices("tests.planning.counted", light=False)


@pytest.mark.parametrize("name", STEPS)
def test_a_compiled_step_costs_what_it_did(found, name):
    """Products, exchanges and kernels to the last; bytes to a tenth, since layouts and fusions follow the processor."""
    if name not in found:
        pytest.skip("its compiler is not installed")
    now, then = found[name], KEPT[name]
    for kind in ("GFLOP", "MB sent"):
        assert now[kind] == pytest.approx(then[kind], rel=1e-6), kind
    for kind in ("exchanges", "kernels"):
        assert now[kind] == then[kind]
    for kind in ("MB moved", "MB held"):
        assert now[kind] == pytest.approx(then[kind], rel=0.1), kind


def test_panacea_has_three_passes(found):
    """By the compiler's counts: three times the products of SFT's step, of batches as large."""
    sft, panacea = (found[f"{name}, 1 of the CPU"]["GFLOP"] for name in ("sft", "panacea"))
    assert panacea == pytest.approx(3 * sft, rel=0.01)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(on_devices("tests.planning.counted", light=False), indent=1) + "\n", "utf-8")
