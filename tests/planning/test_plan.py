"""Planning: the model against what compiled programs hold and exchange, on fake devices."""

import json
import re

import jax
import pytest

from panacea_jax import cli
from panacea_jax.config import get_config
from panacea_jax.defences import DEFENCES, Defence
from panacea_jax.defences.cross_entropy import CHUNK
from panacea_jax.errors import InputError
from panacea_jax.models.families import config_from_dict
from panacea_jax.parallel import make_mesh
from panacea_jax.parallel.chips import CHIPS, Chip
from panacea_jax.parallel.mesh import stand_ins
from panacea_jax.planning import cost_model, plan
from panacea_jax.planning.abstract_step import abstract_step
from panacea_jax.planning.explain import explain
from panacea_jax.planning.hlo import operations
from panacea_jax.planning.topology import Topology, topology
from panacea_jax.stages import plan as plan_command
from panacea_jax.train.step import make_step
from tests.on_devices import on_devices
from tests.planning.planned import exchanges

# Data, fsdp, tensor, records; "cut": the adapter is, like its matrices; "upper": of the last layer of three alone.
MESHES = (
    (8, 1, 1, 8),
    (1, 8, 1, 8),
    (1, 4, 2, 8),
    (2, 2, 2, 8),
    (1, 1, 8, 8),
    (1, 2, 1, 2),
    (1, 4, 1, 4),
    (2, 1, 1, 2),
    (4, 1, 1, 4),
    (1, 8, 1, 8, "cut"),
    (2, 4, 1, 8, "cut"),
    (1, 8, 1, 8, "upper"),
)
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096,
    "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
}  # fmt: skip


@pytest.fixture(scope="module")
def found():
    """By mesh and batch size, what tests/planning/planned.py prints."""
    return dict(zip(MESHES, on_devices("tests.planning.planned", json.dumps(MESHES), "full")))


OVER_ROWS = [mesh for mesh in MESHES if mesh[2] == 1]


@pytest.mark.parametrize("mesh", OVER_ROWS)
def test_bytes_sent_are_as_modelled(found, mesh):
    """Not over ``tensor``: the CPU's compiler sums the gradients of q, k, v and of gate and up one by one, the model once."""
    assert found[mesh]["sent"] == pytest.approx(found[mesh]["modelled"], rel=0.15), found[mesh]


@pytest.mark.parametrize("mesh", MESHES[:4])
def test_weights_are_gathered_a_layer_at_a_time(found, mesh):
    assert found[mesh]["largest_gather"] <= found[mesh]["layer"]


@pytest.mark.parametrize("mesh", MESHES)
def test_what_stays_is_as_computed(found, mesh):
    resident = sum(found[mesh]["resident"].values())
    assert found[mesh]["arguments"] == pytest.approx(resident, rel=0.1)


@pytest.mark.parametrize("axis", [0, 1], ids=["data", "fsdp"])
def test_weak_scaling(found, axis):
    """A record a device on 2, 4 and 8: a device's work stays as it is, and what it sends grows like (n − 1)/n; both are read from the
    compiled program. Over fsdp the sharded base falls like 1/n.
    """
    counts = (2, 4, 8)
    runs = [found[n if axis == 0 else 1, n if axis == 1 else 1, 1, n] for n in counts]
    flops = [run["counted_flops"] for run in runs]
    assert max(flops) <= 1.02 * min(flops), flops
    per_share = [run["sent"] * n / (n - 1) for run, n in zip(runs, counts)]
    assert max(per_share) <= 1.05 * min(per_share), per_share
    base = [run["resident"]["base weights"] * (n if axis == 1 else 1) for run, n in zip(runs, counts)]  # fmt: skip
    assert max(base) <= 1.03 * min(base), base


def test_bytes_between_slices(monkeypatch):
    """Of two slices with four devices each every device sends the half of its quarter of the gradients and gets as much, twice (a sum is a
    scatter and a gather), for each of three passes.
    """
    monkeypatch.setattr(cost_model, "slices_of", lambda devices: 2)
    config = get_config()
    mesh = make_mesh(1, 2, 2, stand_ins(8), replica=2)
    step = abstract_step(config, config_from_dict(CONFIG), mesh)
    gradients = 3 * 32 * (4096 + 4096) * 32 * 2  # q, k, v; 32 layers, rank 32, bfloat16
    assert cost_model.sent_between(step) == 3 * gradients / 4 * 2 * 1 / 2


TINY = CONFIG | {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64,
                 "num_attention_heads": 2, "num_key_value_heads": 2}  # fmt: skip


@pytest.mark.parametrize("name", [n for n, kind in DEFENCES.items() if issubclass(kind, Defence)])
def test_the_step_of_every_method_can_be_planned(name):
    """Traced from shapes alone, as for a topology that is not there."""
    config = get_config()
    config.defence.name, config.lora.rank, config.data.max_length = name, 2, 16
    config.train.batch_size = config.train.harmful_batch_size = 2
    if name == "t_vaccine":
        config.defence.layers = 1
    if name == "tar":
        config.defence.inner_steps = 4
    step = abstract_step(config, config_from_dict(TINY), make_mesh(devices=jax.devices()[:1]))
    program = make_step(step.model, step.defence, step.optimizer, step.shardings)
    program.trace(step.state, step.weights, step.batches, step.key)
    assert cost_model.flops(step) > 0


@pytest.mark.parametrize(("remat", "back"), [("none", 1), ("full", 2)])
def test_layers_below_the_lowest_adapted_one_have_no_backward_pass(remat, back):
    """By hand, for an adapter of the upper 8 of 32 layers: their weights are neither read nor gathered again, nor their sums sent."""
    config = get_config()
    config.lora.layers, config.model.remat, config.train.batch_size = "upper:8", remat, 8
    config.defence.name, config.model.dtype = "sft", "bfloat16"
    model = config_from_dict(CONFIG)
    turns, matrices = 1 + back / 4, 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    kept = abstract_step(config, model, make_mesh(1, 1, 1, stand_ins(1)))
    rest = 2 * 4096 * 32000 + 4096
    assert cost_model.weights_read(kept) == pytest.approx(2 * (turns * (matrices + 32 * 2 * 4096) + 2 * rest))
    parameters = matrices + 4096 * 32000
    flops = 8 * config.data.max_length * turns * model.flops_per_token(config.data.max_length)
    assert cost_model.flops(kept) == pytest.approx(flops) and model.matmul_parameters() == parameters
    gathered = cost_model.sent(abstract_step(config, model, make_mesh(1, 8, 1, stand_ins(8))))
    reduced = 3 * 8 * (4096 + 4096) * 32 * 2 * 2 * 7 / 8  # q, k, v; 8 layers, rank 32, summed in bfloat16
    assert gathered == pytest.approx(2 * (1.25 * matrices + 4096 * 32000) * 7 / 8 + reduced)
    summed = cost_model.sent(abstract_step(config, model, make_mesh(1, 1, 8, stand_ins(8))))
    stream = 8 * config.data.max_length * 4096 * 2
    assert summed == pytest.approx(2 * turns * 32 * stream * 2 * 7 / 8)


def test_a_base_in_few_bits_is_divided_like_any_other():
    """It is loaded whole first, so what loading refuses is not planned."""
    config = get_config()
    config.model.quantization = "nf4"
    with pytest.raises(InputError, match=r"config\.mesh\.fsdp = 3: does not divide 4096"):
        abstract_step(config, config_from_dict(CONFIG), make_mesh(1, 3, 1, stand_ins(3)))


@pytest.mark.parametrize("remat", ["none", "full"])
def test_temporary_bytes_by_kind(remat):
    """By hand, for a 7B step of ten records of 256 tokens on one device in bfloat16, with all scores."""
    config = get_config()
    config.train.batch_size = config.train.harmful_batch_size = 10
    config.data.max_length, config.model.remat, config.model.attention = 256, remat, "xla"
    step = abstract_step(config, config_from_dict(CONFIG), make_mesh(1, 1, 1, stand_ins(1)))
    tokens, layers, heads, wide = 2560, 32, 32, 11008
    stream, scores = tokens * 4096 * 2, tokens * 256 * heads * (4 + 2)
    a_layer = tokens * (4 * 4096 + 3 * wide) * 2 + 4 * stream + scores
    assert cost_model.temporary(step) == {
        "activations": layers * stream + a_layer * (1 if remat == "full" else layers),
        "logits": CHUNK * 32000 * (4 + 4 + 2),
        "gathered weights": 0,
        "gradients": 2 * 3 * layers * (4096 + 4096) * 32 * 4,
    }


PROGRAM = """
HloModule jit_step

%cut (p.0: f32[10,4,8], p.1: s32[]) -> f32[4,8] {
  %p.0 = f32[10,4,8]{2,1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = f32[1,4,8]{2,1,0} dynamic-slice(%p.0, %p.1, %zero, %zero), dynamic_slice_sizes={1,4,8}
  ROOT %flat = f32[4,8]{1,0} bitcast(%slice)
}

%body (carry: (s32[], f32[2,4], f32[10,4,8])) -> (s32[], f32[2,4], f32[10,4,8]) {
  %carry = (s32[], f32[2,4]{1,0}, f32[10,4,8]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %x = f32[2,4]{1,0} get-tuple-element(%carry), index=1
  %w = f32[10,4,8]{2,1,0} get-tuple-element(%carry), index=2
  %one = f32[4,8]{1,0} fusion(%w, %i), kind=kLoop, calls=%cut, metadata={op_name="jit(f)/layers/while/body/slice"}
  %y = f32[2,8]{1,0} dot(%x, %one), lhs_contracting_dims={1}, rhs_contracting_dims={0}, metadata={op_name="jit(f)/transpose(jvp(layers))/while/body/mlp/dot"}
  %a = bf16[32,128,4096]{2,1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, replica_groups={{0,1,2,3}}, metadata={op_name="jit(f)/while/body/x"}
  %again = bf16[32,128,4096]{2,1,0} all-gather(%p), channel_id=7, replica_groups={{0,1,2,3}}, metadata={op_name="jit(f)/while/body/x"}
  ROOT %out = (s32[], f32[2,4]{1,0}, f32[10,4,8]{2,1,0}) tuple(%i, %x, %w)
}

ENTRY %main (q: (s32[], f32[2,4], f32[10,4,8])) -> f32[8] {
  %q = (s32[], f32[2,4]{1,0}, f32[10,4,8]{2,1,0}) parameter(0)
  %loop = (s32[], f32[2,4]{1,0}, f32[10,4,8]{2,1,0}) while(%q), condition=%test, body=%body, backend_config={"known_trip_count":{"n":"10"}}
  %r = (f32[8]{0}, f32[4,2]{1,0}) all-reduce(%m, %b), channel_id=2, replica_groups=[2,4]<=[8], metadata={op_name="jit(step)/add"}
  %s = (f32[2]{0}, f32[8]{0}) all-gather-start(%c), channel_id=3, replica_groups=mesh['a'=4,'b'=2] {'a'}, metadata={op_name="jit(step)/y"}
  %done = f32[8]{0} all-gather-done(%s)
  %o = f32[8]{0} all-gather(%c), channel_id=9, replica_groups=mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'a'}, dimensions={0}
  %alone = f32[8]{0} all-reduce(%d), channel_id=4, replica_groups={{0},{1}}, metadata={op_name="jit(step)/z"}
  %turned = f32[8,4]{1,0} transpose(%h), dimensions={1,0}
  ROOT %last = f32[8]{0} add(%o, %done)
}
"""  # noqa: E501 - as the compiler has them


def test_reading_a_program():
    gather, reduce, start, other = exchanges(PROGRAM, devices=8)
    assert (gather.result, gather.group, gather.times, gather.waits) == (2 * 32 * 128 * 4096, 4, 10, True)
    assert gather.sent == 10 * gather.result * 3 / 4
    assert (reduce.result, reduce.group, reduce.sent) == (64, 4, 2 * 64 * 3 / 4)
    assert (start.result, start.group, start.waits) == (32, 4, False)
    assert (other.result, other.group, other.times) == (32, 4, 1)


def test_a_start_makes_the_second_half_of_its_shape():
    """Numbers that a TPU's program adds are neither."""
    line = "  %s = (f32[4]{0}, f32[16]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%c), source_target_pairs={{0,1},{1,0}}\n"
    several = "  %t = ((f32[2]{0}, f32[4]{0}), (f32[8]{0}, f32[16]{0})) all-gather-start(%c, %d), channel_id=5, replica_groups=[2,4]<=[8]\n"
    found = exchanges(PROGRAM.replace("  %turned", line + several + "  %turned"), devices=8)
    assert [o.result for o in found if o.kind == "collective-permute" or o.result == 96] == [64, 96]


def test_what_operations_compute_and_move():
    """Ten turns of a product by a layer's weights; of the ten layers' stack a turn reads its own."""
    found = {o.name.rpartition("/")[2]: o for o in operations(PROGRAM, devices=8) if o.group == 1 and o.name}
    dot, cut = found["dot"], found["slice"]
    assert (dot.kind, dot.times, dot.flops, dot.dtype) == ("matmul", 10, 2 * 2 * 4 * 8, "f32")
    assert dot.moved == 4 * (2 * 4 + 4 * 8 + 2 * 8)
    assert (cut.kind, cut.times, cut.moved) == ("copy", 10, 4 * (4 * 8 + 1 + 4 * 8))


def test_turns_of_a_loop():
    """As the text says, else by the condition, as programs of TPUs have it."""
    told = ', backend_config={"known_trip_count":{"n":"10"}}'
    assert told in PROGRAM
    condition = """
%test (t: (s32[], f32[2,4], f32[10,4,8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(7)
  %t = (s32[], f32[2,4]{1,0}, f32[10,4,8]{2,1,0}) parameter(0)
  %n = s32[]{:T(128)} get-tuple-element(%t), index=0
  ROOT %less = pred[]{:T(512)} compare(%n, %limit), direction=LT
}

ENTRY"""
    for text, turns in ((PROGRAM, 10), (PROGRAM.replace(told, ""), 1), (PROGRAM.replace(told, "").replace("\nENTRY", condition), 7)):
        [dot] = [o for o in operations(text, devices=8) if o.flops]
        assert dot.times == turns


def test_where_the_time_goes():
    chip = Chip(flops=1e3, memory=1e9, bandwidth=1e4, links=1e6)
    explained = explain(operations(PROGRAM, devices=8), chip)
    product = explained.places["MLP"]["backward"]
    assert (product.bound, product.flops) == ("compute", 1280)
    assert product.seconds == pytest.approx(1.28)
    assert explained.largest[0][0] == "all-gather: x, elsewhere, forward"
    assert explained.largest[0][2].seconds == pytest.approx(10 * 2 * 32 * 128 * 4096 * 3 / 4 / 1e6)
    assert (explained.wide, explained.exchanges) == ((1280, 1280), (4, 3))
    assert explained.copies.moved == 10 * 260 + 128  # cut out ten times; and turned


def test_what_explain_prints(tmp_path, capsys, monkeypatch):
    """By scope, the largest operations and the rest; without a compiled program it says so."""
    plan_command.print_explained(explain(operations(PROGRAM, devices=8), Chip(1e12, 1e9, 1e9, 1e9)))
    out = capsys.readouterr().out
    assert "MLP" in out and "1. 10 × all-gather: x, elsewhere, forward: 251.66 ms, by links" in out
    assert "Exchanges: 4, of which 3 wait" in out
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    monkeypatch.setattr(plan_command, "topology", lambda name: Topology(name, CHIPS["h100"], 1, None))
    assert cli.run(["plan", f"--config.model.path={tmp_path}", "--topology=gpu:h100x1", "--explain"]) == 2
    assert "--explain: nothing was compiled for --topology=gpu:h100x1" in capsys.readouterr().err


def test_a_gpu_is_planned_by_the_model(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    arguments = ["plan", f"--config.model.path={tmp_path}", f"--workdir={tmp_path}/out"]
    assert cli.run([*arguments, "--topology=gpu:h100x8", "--search"]) == 0
    plans = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert plans[0]["fits"] and plans[0]["arguments"] is None
    assert plans[0]["limit"] == 0.75 * 80 * 2**30
    costs = [p["step_seconds"] * 8 / p["batch_size"] for p in plans if p["fits"]]
    assert costs == sorted(costs)
    # 13.5 GB of bf16 weights and an adapter with its moments, ε, ε's mean and the start, on eight devices.
    whole = [p for p in plans if p["mesh"]["fsdp"] * p["mesh"]["tensor"] == 8]
    for p in whole:
        assert p["resident"]["base weights"] == pytest.approx(13.48e9 / 8, rel=0.01)
        assert p["temporary"] == sum(p["modelled"].values())
    printed = capsys.readouterr().out
    assert "not a compiler's figure" in printed and "activations" in printed


def test_what_does_not_fit_is_said(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": 320}))
    assert cli.run(["plan", f"--config.model.path={tmp_path}", "--topology=gpu:a100x1"]) == 2
    assert "a device needed; use more chips" in capsys.readouterr().err


def test_a_program_that_is_too_large_to_compile(tmp_path, capsys, monkeypatch):
    """As the TPU compiler words it; it is an answer, not a failure."""
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    here = Topology("v5e:1x1", CHIPS["v5e"], 1, jax.devices()[:1])
    monkeypatch.setattr(plan_command, "topology", lambda name: here)
    arguments = ["plan", f"--config.model.path={tmp_path}", "--topology=v5e:1x1"]
    arguments += ["--config.data.max_length=16", f"--workdir={tmp_path}/out"]
    assert cli.run(arguments) == 0
    message = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO temporaries "
        "(46.71G) exceeds available HBM (15.75G). HLO module: jit_step."
    )

    def refuse(step, options):
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(plan, "_compile", refuse)
    capsys.readouterr()
    assert cli.run(arguments) == 2
    said = capsys.readouterr()
    assert "temporaries of 46.71G and 15.75G of memory; use more chips" in said.err
    assert "NO" in said.out
    [found] = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert not found["fits"] and found["refused"]


@pytest.mark.parametrize(
    ("name", "said"),
    [("v5e", "write KIND:SHAPE"), ("v9:2x2", "write KIND:SHAPE"), ("gpu:h100", "write KIND:SHAPE"), ("gpu:t4x2", "known GPUs"),
     ("2*v4:2x2x1", "several slices can be planned of v5e, v5p, v6e"), ("0*v5e:2x2", "several slices")],
)  # fmt: skip
def test_bad_topology(tmp_path, capsys, name, said):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert cli.run(["plan", f"--config.model.path={tmp_path}", f"--topology={name}"]) == 2
    assert said in capsys.readouterr().err


def test_a_mesh_that_does_not_divide_the_machine(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    arguments = [
        "plan",
        f"--config.model.path={tmp_path}",
        "--topology=gpu:h100x8",
        "--config.mesh.tensor=3",
    ]
    assert cli.run(arguments) == 2
    assert "config.mesh" in capsys.readouterr().err


def test_only_gradients_cross_slices():
    """Compiled for two slices of four chips, where libtpu is installed: weights are gathered within a slice."""
    pytest.importorskip("libtpu")
    config = get_config()
    config.model.dtype, config.model.attention, config.data.max_length = "bfloat16", "xla", 128
    config.train.batch_size = config.train.harmful_batch_size = 8
    small = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 3, "vocab_size": 512,
             "num_attention_heads": 4, "num_key_value_heads": 4}  # fmt: skip
    devices = topology("2*v5e:2x2").devices
    mesh = make_mesh(**config.mesh, devices=devices)
    step = abstract_step(config, config_from_dict(CONFIG | small), mesh)
    program = make_step(step.model, step.defence, step.optimizer, step.shardings)
    text = program.lower(step.state, step.weights, step.batches, step.key).compile().as_text()
    assert {c.group for c in exchanges(text, 8) if c.kind == "all-gather"} == {4}
    between = re.findall(r'MegascaleRendezvousKeyName="([a-z-]+)', text)
    assert between and set(between) == {"all-reduce"}


def test_topologies_of_tpus():
    """Names and counts, where libtpu is installed."""
    pytest.importorskip("libtpu")
    two = topology("2*v5e:2x2")
    assert (two.size, two.slices, {d.slice_index for d in two.devices}) == (8, 2, {0, 1})
    for name, devices in (
        ("v5e:4x4", 16),
        ("v5p:2x2x1", 4),
        ("v4:2x2x1", 4),
        ("v6e:2x2", 4),
        ("tpu7x:2x2x1", 8),
    ):
        found = topology(name)
        assert len(found.devices) == found.size == devices
