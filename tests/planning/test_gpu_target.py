"""GPUs that are not there: what the compiler is told of them, and a step compiled for one where the compiler is installed."""

import importlib.util
import json
import re

import pytest

from panacea_jax import cli
from panacea_jax.parallel.chips import CHIPS
from panacea_jax.planning import gpu_target
from panacea_jax.planning.hlo import custom_calls
from panacea_jax.planning.topology import GPUS, topology
from tests.planning.test_plan import TINY

COMPILER = importlib.util.find_spec("jax_cuda13_plugin")


def test_every_gpu_with_a_data_sheet_can_be_compiled_for():
    assert set(gpu_target.KINDS) == set(GPUS)


@pytest.mark.parametrize("kind", gpu_target.KINDS)
def test_what_the_compiler_is_told(kind):
    """float32 units × clock × 2 are the data sheet's float32 rate, in TFLOP/s; the rest is the chip's."""
    text = gpu_target.target_config(kind)
    told = {name: float(value) for name, value in re.findall(r"(\w+): ([\d.]+)", text)}
    rate = {"l4": 30.3, "a100": 19.5, "h100": 67, "h200": 67, "b200": 75}[kind]
    assert 2e-3 * told["core_count"] * told["fpus_per_core"] * told["clock_rate_ghz"] == pytest.approx(rate, rel=0.02)
    assert (told["memory_bandwidth"], told["device_memory_size"]) == (CHIPS[kind].bandwidth, CHIPS[kind].memory)
    major, minor = CHIPS[kind].compute_capability.split(".")
    assert f"cuda_compute_capability {{ major: {major} minor: {minor} }}" in text
    assert told["shared_memory_per_block_optin"] == told["shared_memory_per_core"] - 1024


def test_without_the_compiler_the_model_speaks(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert topology("gpu:b200x8").devices is None


def test_kernels_that_a_program_calls():
    text = """
      %a = (f32[2]) custom-call(%x), custom_call_target="__cublas$gemm", backend_config={}
      %b = (f32[2]) custom-call(%a), custom_call_target="__cudnn$fmhaSoftmax"
      %c = (f32[2]) custom-call(%b), custom_call_target="__cublas$gemm"
      %d = f32[2] fusion(%c), calls=%fused
    """
    assert custom_calls(text) == {"__cublas$gemm": 2, "__cudnn$fmhaSoftmax": 1}


@pytest.mark.skipif(not COMPILER, reason="needs pip install 'panacea_jax[plan-gpu]'")
@pytest.mark.parametrize("kind", gpu_target.KINDS)
def test_a_step_compiles_for_it(kind, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    flags = ["--config.data.max_length=64", "--config.model.dtype=bfloat16", f"--workdir={tmp_path}/out"]
    assert cli.run(["plan", f"--config.model.path={tmp_path}", f"--topology=gpu:{kind}x2", *flags]) == 0
    [plan] = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert plan["arguments"] and plan["compile_seconds"] and plan["sent"]
    assert plan["attention"] == "cudnn" and plan["attention_why"] and any("fmha" in name for name in plan["calls"])
