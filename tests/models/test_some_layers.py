"""An adapter of some layers is that of all with zeros elsewhere: in every pass, in peft, merged, side by side; and it is cheaper."""

import dataclasses
import json
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest

from panacea_jax.data.batches import Batch
from panacea_jax.defences import Loss
from panacea_jax.errors import InputError
from panacea_jax.export import load_epsilon, save_epsilon, save_model
from panacea_jax.generate.decode import generate
from panacea_jax.models import lora
from panacea_jax.models.adapter import layer_numbers, spread
from panacea_jax.models.model import load
from panacea_jax.models.peft import adapter_tensors, save_adapter
from panacea_jax.models.peft_config import CONFIG_FILE
from tests.families import VOCAB
from tests.models.made_by_peft import TOKENS, logits, reloaded, torch_model
from tests.train.test_packing import difference

# Of three layers: the upper two, the last one, and a gap.
CHOICES = ((1, 2), (2,), (0, 2))


def drawn(model, numbers, seed=0, targets=("q", "v", "down"), rank=2):
    """Both factors away from zero."""
    adapter = lora.init(model, rank, 4, targets, key=jax.random.key(seed), layers=numbers)
    layers = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(jax.random.key(seed + x.size), x.shape), adapter.layers)  # fmt: skip
    return dataclasses.replace(adapter, layers=layers)


def filled(adapter, depth=3):
    """The adapter of all layers that does the same."""
    layers = spread(adapter.layers, adapter.adapted, range(depth))
    return dataclasses.replace(adapter, layers=layers, numbers=None)


@pytest.fixture(scope="module")
def batch():
    tokens = np.random.default_rng(0).integers(0, VOCAB, (3, 19)).astype(np.int32)
    valid = np.arange(19) < np.asarray([19, 12, 7])[:, None]
    return Batch(*map(jnp.asarray, (tokens, valid & (np.arange(19) >= 4), valid)))


@pytest.mark.parametrize(
    ("layers", "found"),
    [("", None), ((), None), ("upper:3", None), ("0-2", None), ("upper:2", (1, 2)), ("1-1", (1,)), ("2, 0", (0, 2)),
     ((0.0, 2.0), (0, 2)), (1, (1,)), (np.int64(1), (1,))],
)  # fmt: skip
def test_what_the_key_means(layers, found):
    assert layer_numbers(layers, 3) == found


@pytest.mark.parametrize("layers", ["upper:4", "1-3", "3", (0, 3), "upper:0", "2-1", "lower:1", "1.5", (0.5,), "-1"])
def test_what_it_does_not(layers):
    with pytest.raises(InputError, match=r"config\.lora\.layers = "):
        layer_numbers(layers, 3)


@pytest.mark.parametrize("numbers", CHOICES)
def test_peft_both_ways(base, model, tmp_path, numbers):
    """Written with ``layers_to_transform``; peft's logits, and the same adapter read again, which can be trained."""
    adapter = drawn(model, numbers)
    save_adapter(adapter, tmp_path / "a", str(base))
    assert json.loads((tmp_path / "a" / CONFIG_FILE).read_text())["layers_to_transform"] == list(numbers)
    theirs = reloaded(base, tmp_path / "a")
    ours = model.apply(model.weights, adapter, jnp.asarray(TOKENS))[0]
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert np.abs(theirs - logits(torch_model(base))).max() > 1e-2
    again = lora.load(tmp_path / "a", model)
    assert again.numbers == numbers
    jax.tree.map(np.testing.assert_array_equal, again, adapter)
    # Made by peft itself.
    names = ["q_proj", "v_proj"]
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=names, layers_to_transform=list(numbers))  # fmt: skip
    peft.get_peft_model(torch_model(base), config).save_pretrained(str(tmp_path / "b"))
    assert lora.load(tmp_path / "b", model).numbers == numbers


@pytest.mark.parametrize(("numbers", "remat"), list(zip(CHOICES, ("none", "dots", "full"))))
def test_loss_and_gradient(base, batch, numbers, remat):
    """By the adapter, and by offsets of all layers; hidden states and readings too."""
    model = load(base, dtype="float32", remat=remat)
    loss, some = Loss.of(model), drawn(model, numbers)
    offsets = 0.01 * jax.random.normal(jax.random.key(5), (3, *batch.tokens.shape, model.config.hidden_size))

    @jax.jit
    def run(params, offsets):
        plain = jax.value_and_grad(loss)(params, batch)
        moved = jax.value_and_grad(loss, (0, 2))(params, batch, offsets)
        return plain, moved, loss.hidden_states(params, batch, ("mlp_out", "input_squares"))

    (value, grads), (moved, (by_params, by_offsets)), states = run(some, offsets)
    (whole, expected), (whole_moved, (all_params, all_offsets)), whole_states = run(filled(some), offsets)
    assert float(value) == pytest.approx(float(whole), rel=1e-6)
    assert float(moved) == pytest.approx(float(whole_moved), rel=1e-6)
    own = lambda tree: jax.tree.map(lambda x: x[np.asarray(numbers)], tree.layers)  # noqa: E731
    assert difference(grads.layers, own(expected)) < 1e-5
    assert difference(by_params.layers, own(all_params)) < 1e-5
    assert difference(by_offsets, all_offsets) < 1e-5
    assert difference(states, whole_states) < 1e-5


def test_dropout_has_the_masks_of_the_layers(model, batch):
    some = dataclasses.replace(drawn(model, (1, 2)), dropout=0.5)
    keys = jax.random.key_data(jax.random.split(jax.random.key(3), 3))
    value = jax.jit(Loss.__call__)
    dropped, still = batch._replace(dropout=keys), jax.tree.map(jnp.asarray, batch)
    losses = [float(value(Loss.of(model), a, b)) for a, b in ((some, dropped), (filled(some), dropped), (some, still))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert abs(losses[0] - losses[2]) > 1e-4


@pytest.mark.parametrize(("numbers", "beside"), [((2,), 1), ((0, 2), 2)])
def test_decoding_and_merging(base, model, tmp_path, numbers, beside):
    adapter = drawn(model, numbers)
    settings = {"batch_size": 2, "max_new_tokens": 6, "eos_ids": [-1], "pad_id": 0}
    prompts = [[3, 4, 5], [7, 8], [9, 1, 2, 6]]

    def answers(weights, params, **more):
        return sorted((i, ids) for i, ids, _ in generate(model, weights, params, prompts, **settings, **more))

    found = answers(model.weights, adapter)
    assert found == answers(model.weights, filled(adapter)) == answers(lora.merge(model.weights, adapter), None)
    assert found != answers(model.weights, None)
    save_model(model, adapter, tmp_path / "merged")
    merged = logits(torch_model(tmp_path / "merged"))
    np.testing.assert_allclose(merged, model.apply(model.weights, adapter, jnp.asarray(TOKENS))[0], atol=1e-4)
    # Beside one of another layer and rank, and beside one of all layers.
    others = [drawn(model, (1,), 1, ("q", "up"), 3), drawn(model, "", 2, ("o",), 1)]
    several = lora.side_by_side([adapter, *others[:beside]])
    assert answers(model.weights, several, adapters=[0] * 3) == found
    last = answers(model.weights, several, adapters=[beside] * 3)
    assert last == answers(model.weights, others[beside - 1])


def test_epsilon_of_some_layers(model, tmp_path):
    """Its file knows the layers; one that lacks a layer is refused as before."""
    epsilon = drawn(model, (0, 2))
    save_epsilon(epsilon, tmp_path / "e.safetensors", {"kind": "last"})
    again = load_epsilon(tmp_path / "e.safetensors")
    assert (again.numbers, again.scale) == ((0, 2), epsilon.scale)
    jax.tree.map(np.testing.assert_array_equal, again.layers, epsilon.layers)
    assert {int(name.split(".")[4]) for name in adapter_tensors(epsilon)} == {0, 2}


def test_nothing_is_computed_backwards_below():
    """FLOPs of compiled SFT steps with four layers, loops counted turn by turn: a layer has a forward and a backward pass, or one."""
    benchmark = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "passes.py"))
    model, sft = benchmark["make_model"](), benchmark["defence_of"]("sft")
    whole, half, one = (benchmark["step_flops"](model, sft, layers) for layers in ("", "upper:2", "upper:1"))
    d, mlp, length, rank = 256, 512, 64, 8
    weights, factors, scores = 4 * d * d + 3 * d * mlp, 3 * 2 * d * rank, 4 * length * d
    forward, both = 2 * weights + scores, 4 * weights + 6 * factors + 3 * scores
    assert half / whole == pytest.approx((2 * forward + 2 * both) / (4 * both), rel=0.05)
    assert one / whole == pytest.approx((3 * forward + both) / (4 * both), rel=0.05)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_no_copy_of_the_weights_is_kept(base, batch, remat):
    """Temporaries of a compiled gradient are below those of all layers; a slice or a residual of the stacks would be 2/3 of the layers'."""
    model = load(base, dtype="float32", remat=remat)
    bytes_of = {}
    for layers in ("", "upper:2"):
        gradient = jax.jit(lambda loss, params, batch: jax.grad(loss)(params, batch))
        compiled = gradient.lower(Loss.of(model), drawn(model, layers), batch).compile()
        bytes_of[layers] = compiled.memory_analysis().temp_size_in_bytes
    weights = sum(x.nbytes for x in jax.tree.leaves(model.weights["layers"]))
    assert bytes_of["upper:2"] < bytes_of[""] + weights / 10, (bytes_of, weights)
