"""Antidote cuts exactly what NumPy cuts from activations that hooks on transformers + peft see, one record at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from panacea_jax.config import get_config, make_defence
from panacea_jax.data.batches import Stream, length_buckets
from panacea_jax.data.encode import Example
from panacea_jax.defences import Antidote, Loss, MagnitudePrune, RandomPrune
from panacea_jax.defences.antidote import mean_squares
from panacea_jax.defences.pruning import pruned_matrices, top_of_rows
from panacea_jax.errors import InputError
from panacea_jax.export import epsilon_tensors
from panacea_jax.models import lora
from panacea_jax.models.full import full_parameters
from panacea_jax.models.model import load
from panacea_jax.models.peft import adapter_tensors, save_adapter
from panacea_jax.train.once import apply_once
from tests import torch_oracle as oracle
from tests.families import VOCAB, build, save

RATIO = 0.3
RANK = 7


def examples(seed, n=11, vocab=VOCAB):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(5, 30, n)
    return [Example.answering(rng.integers(0, vocab, k).astype(np.int32), 2) for k in sizes]


SETS = {"harmful": examples(1), "alignment": examples(2)}


def streams(batch_size=4, **more):
    return {
        name: Stream(name, found, batch_size, 0, False, length_buckets(32), **more)
        for name, found in SETS.items()
    }


@pytest.fixture(params=["float32", "float64"])
def world(request, tmp_path, monkeypatch):
    """(model, adapter, folders)."""
    wide = request.param == "float64"
    if wide:
        oracle.use_float64_throughout(monkeypatch)
    with jax.enable_x64(wide):
        base = save(build("llama2"), tmp_path / "base")
        model = load(base, dtype=request.param)
        adapter = lora.init(
            model, RANK, 8, ("q", "k", "v", "down"), key=jax.random.key(0), dtype=request.param
        )
        layers = jax.tree.map(
            lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape, x.dtype),
            adapter.layers,
        )
        adapter = lora.Adapter(layers, adapter.rank, adapter.alpha)
        save_adapter(adapter, tmp_path / "adapter", str(base))
        yield model, adapter, (base, tmp_path / "adapter")


def torch_squares(model, modules, found):
    """By module name the running mean over records of Σ_t x², as the inputs come along."""
    mean = dict.fromkeys(modules, 0.0)
    inputs = {}
    for name, module in modules.items():
        module.register_forward_hook(
            lambda m, x, y, name=name: inputs.update({name: x[0].detach()})
        )
    for n, example in enumerate(found):
        with torch.no_grad():
            model(input_ids=torch.tensor(example.tokens, dtype=torch.long)[None])
        for name, x in inputs.items():
            total = x[0].pow(2).sum(0).numpy()
            mean[name] = mean[name] * n / (n + 1) + total / (n + 1)
    return mean


def numpy_mask(score, ratio):
    """True on the top of each row of ``[out, in]``."""
    zeros = int(score.shape[1] * (1 - ratio))
    mask = np.ones_like(score, bool)
    np.put_along_axis(mask, np.argsort(score, axis=1, kind="stable")[:, :zeros], False, axis=1)
    return mask


def numpy_masks(modules, squares, ratio):
    return {
        name: numpy_mask(np.abs(m.weight.detach().numpy()) * np.sqrt(squares[name]), ratio)
        for name, m in modules.items()
    }


def expected(model, modules, safety):
    masks = numpy_masks(modules, torch_squares(model, modules, SETS["harmful"]), RATIO)
    if safety:
        safe = numpy_masks(modules, torch_squares(model, modules, SETS["alignment"]), RATIO)
        masks = {name: mask & ~safe[name] for name, mask in masks.items()}
    return {
        name: np.where(masks[name], 0, m.weight.detach().numpy()) for name, m in modules.items()
    }, masks


@pytest.mark.parametrize("safety", [False, True])
def test_adapter(world, safety):
    model, adapter, folders = world
    theirs = oracle.load(*folders, getattr(torch, str(model.dtype)))
    modules = {
        name.removesuffix(".default"): module
        for name, module in theirs.named_modules()
        if name.endswith((".lora_A.default", ".lora_B.default"))
    }
    want, masks = expected(theirs, modules, safety)
    defence = Antidote(dense_ratio=RATIO, safety_mask=safety)
    result = apply_once(model, adapter, defence, streams())
    ours = adapter_tensors(result.deployed)
    assert ours.keys() == {f"{name}.weight" for name in want}
    for name, value in want.items():
        np.testing.assert_array_equal(ours[f"{name}.weight"], value, err_msg=name)
    counted = defence.report(adapter, result.state)
    assert counted["pruned"] == sum(int(m.sum()) for m in masks.values())
    assert counted["entries"] == sum(m.size for m in masks.values())
    if not safety:  # 48 inputs: 33 stay; 64: 44; 7 ranks: 4
        a, b = "layers.1.self_attn.k_proj.lora_A", "layers.2.mlp.down_proj.lora_B"
        assert (ours[f"base_model.model.model.{a}.weight"] == 0).sum(1).tolist() == [15] * RANK
        assert (ours[f"base_model.model.model.{b}.weight"] == 0).sum(1).tolist() == [3] * 48


def test_all_parameters(world):
    model, _, (base, _) = world
    theirs = oracle.load_full(base, getattr(torch, str(model.dtype)))
    modules = {
        n: m for n, m in theirs.named_modules() if n.endswith(("q_proj", "k_proj", "v_proj"))
    }
    want, _ = expected(theirs, modules, False)
    bare, params = full_parameters(model)
    result = apply_once(bare, params, Antidote(dense_ratio=RATIO), streams())
    before, ours = epsilon_tensors(params), epsilon_tensors(result.deployed)
    assert len(want) == 9
    for name, value in ours.items():
        module = name.removesuffix(".weight")
        np.testing.assert_array_equal(value, want.get(module, before[name]), err_msg=name)


def test_statistics_do_not_depend_on_batches(world):
    """One record at a time, four with padding rows at the end, or all at once: the same sums."""
    model, adapter, _ = world
    tolerance = 1e-12 if model.dtype == jnp.float64 else 1e-5
    loss = Loss.of(model)
    found = [
        mean_squares(loss, adapter, streams(size, row_multiple=rows)["harmful"].once())
        for size, rows in ((1, 1), (4, 3), (11, 1))
    ]
    assert found[0].keys() == pruned_matrices(adapter).keys()
    for name, value in found[0].items():
        assert value.shape == pruned_matrices(adapter)[name].shape[:2] and value.dtype == model.dtype
        for other in found[1:]:
            np.testing.assert_allclose(other[name], value, rtol=tolerance)


def test_statistics_are_float32_in_a_bfloat16_model_and_do_not_grow_with_the_set(tmp_path):
    base = save(build("llama2"), tmp_path / "base")
    model = load(base, dtype="bfloat16")
    adapter = lora.init(model, 2, 4, key=jax.random.key(0))
    held = []

    def watched(batches):
        for batch in batches:
            held.append(sum(x.nbytes for x in jax.live_arrays()))
            yield batch

    found = mean_squares(
        Loss.of(model), adapter, watched(streams(2, fixed_length=True)["harmful"].once())
    )
    assert {x.dtype for x in found.values()} == {jnp.dtype("float32")}
    few = mean_squares(Loss.of(model), adapter, [streams(2, fixed_length=True)["harmful"].batch(0)])
    assert {n: x.shape for n, x in few.items()} == {n: x.shape for n, x in found.items()}
    # From the second batch on there are statistics; the inputs of a batch are more than that many bytes.
    batch_inputs = 2 * 32 * model.config.hidden_size * 2
    assert len(held) == 6 and held[-1] - held[1] < batch_inputs


def test_equal_scores_are_cut_from_the_end():
    scores = jnp.asarray([[[1.0, 3.0], [1.0, 2.0], [1.0, 2.0], [1.0, 2.0]]])
    assert top_of_rows(scores, 0.5)[0].T.tolist() == [
        [False, False, True, True],
        [True, False, False, True],
    ]
    assert not top_of_rows(scores, 0.0).any() and top_of_rows(scores, 1.0).all()


@pytest.mark.parametrize("full", [False, True])
def test_magnitude(world, full):
    """The largest entries of each row, whatever the data."""
    model, params, _ = world
    if full:
        model, params = full_parameters(model)
    defence = MagnitudePrune(dense_ratio=RATIO)
    result = apply_once(model, params, defence, {})
    before, after = pruned_matrices(params), pruned_matrices(result.deployed)
    assert len(before) == (3 if full else 8)
    for name, w in before.items():
        for layer in range(3):
            rows = np.asarray(w[layer]).T
            want = np.where(numpy_mask(np.abs(rows), RATIO), 0, rows)
            np.testing.assert_array_equal(np.asarray(after[name][layer]).T, want)
    untouched = jax.tree.leaves(params)[0] if full else None
    assert untouched is None or (jax.tree.leaves(result.deployed)[0] == untouched).all()


def test_random(world):
    """The right number of zeros in each matrix of each layer, other places in each, and the rest as it was."""
    model, adapter, _ = world
    first, again, other = (
        pruned_matrices(apply_once(model, adapter, RandomPrune(RATIO, seed), {}).deployed)
        for seed in (0, 0, 1)
    )
    before = pruned_matrices(adapter)
    for name, w in before.items():
        zeros = np.asarray(first[name] == 0)
        assert zeros.sum((1, 2)).tolist() == [int(w[0].size * RATIO)] * 3
        assert not np.array_equal(zeros[0], zeros[1])
        np.testing.assert_array_equal(first[name], again[name])
        assert not np.array_equal(first[name], other[name])
        np.testing.assert_array_equal(np.asarray(first[name])[~zeros], np.asarray(w)[~zeros])
    q, k = (np.asarray(first[f"layers.self_attn.{p}_proj.a"] == 0) for p in "qk")
    assert not np.array_equal(q, k)


def test_random_places_are_uniform():
    """Over 400 draws each entry is cut about as often as any other (5σ of a binomial count)."""
    w = {"layers": {"self_attn": {"q_proj": {"kernel": jnp.ones((400, 5, 4))}}}}
    cut = pruned_matrices(RandomPrune(0.25).finish(w, ()))["layers.self_attn.q_proj.kernel"] == 0
    counts = np.asarray(cut).sum(0)
    assert abs(counts - 100).max() < 5 * np.sqrt(400 * 0.25 * 0.75)


@pytest.mark.parametrize("defence", [Antidote(0.0), MagnitudePrune(0), RandomPrune(0)])
def test_nothing_is_cut_at_ratio_0(world, defence):
    model, adapter, _ = world
    result = apply_once(model, adapter, defence, streams())
    for a, b in zip(jax.tree.leaves(adapter), jax.tree.leaves(result.deployed)):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", ["antidote", "random_prune", "magnitude_prune"])
@pytest.mark.parametrize("bad", [-0.1, 1.5, float("nan")])
def test_impossible_ratios(kind, bad):
    section = get_config().heal.defence
    section.name, section.dense_ratio = kind, bad
    with pytest.raises(InputError, match=r"config\.heal\.defence\.dense_ratio"):
        make_defence(section, "heal.")


def test_a_missing_set_is_named(world):
    model, adapter, _ = world
    with pytest.raises(KeyError, match="alignment"):
        apply_once(model, adapter, Antidote(safety_mask=True), {"harmful": streams()["harmful"]})
