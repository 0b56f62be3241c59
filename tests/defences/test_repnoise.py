"""RepNoise: five steps equal PyTorch's, its parts in closed form, pairs of records, memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from panacea_jax.data.batches import Batch
from panacea_jax.defences import Loss, RepNoise, Sft
from panacea_jax.defences.repnoise import CodeMask, differing, layerwise_loss, mmd
from panacea_jax.errors import InputError
from panacea_jax.models import model as models
from panacea_jax.models.families import config_from_dict
from tests import torch_oracle
from tests.defences.five_steps import (
    assert_equal_tensors,
    run,
    setting,
    start_tensors,
    streams,
    torch_model,
    torch_steps,
    wide_setting,
)
from tests.defences.oracles import repnoise as oracle

__all__ = ["setting", "wide_setting"]  # fixtures


def noise_of(step, model, shape):
    """The numbers that a run with seed 0 draws at a step, one array a layer."""
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), step), model.config.num_layers)
    return [
        np.asarray(jax.random.normal(k, (*shape, model.config.hidden_size), model.dtype))
        for k in keys
    ]


def compare(setting, alpha, beta, full, masks="mended", loss=oracle.loss):
    model, given, theirs = setting[0], streams(), torch_model(setting, full)
    _, ours = run(setting, RepNoise(alpha=alpha, beta=beta, masks=masks), given, full)

    def gradient(step):
        user, harmful = (given[n].batch(step) for n in ("user", "harmful"))
        noise = noise_of(step, model, harmful.tokens.shape)
        return torch_oracle.gradients(theirs, loss(theirs, user, harmful, noise, alpha, beta))

    torch_steps(theirs, gradient)
    assert_equal_tensors(ours, theirs, start_tensors(setting, full), setting[3])


# β is large enough for the noise term to weigh: at 0.001 its error would not show.
def test_five_steps(setting):
    compare(setting, 0.7, 2.0, full=False)


def test_five_steps_with_the_masks_of_the_public_code(setting):
    compare(setting, 0.7, 2.0, full=False, masks="code", loss=oracle.code_loss)


def test_code_masks_by_hand():
    """Of harmless 5 6 8 0 9 and harmful 5 6 7 4 4: 8 is scored by logits of zero, 0 is no label, 9 has a gradient."""
    harmless, harmful = batch_of([[5, 6, 8, 0, 9], [1, 2]], 5), batch_of([[5, 6, 7, 4, 4], [1, 2, 3]], 6)
    found = CodeMask.of(harmless, harmful, 100)
    np.testing.assert_array_equal(np.argwhere(found.scored.loss_mask), [[0, 4]])
    assert float(found.share) == 0.5 and float(found.constant) == pytest.approx(np.log(100) / 2)
    assert float(found.mean(jnp.float32(3.0), 2)) == pytest.approx(1.5 + np.log(100))
    # In the other text 7 and 3 begin their spans; the two 4s have a gradient.
    found = CodeMask.of(harmful, harmless, 100)
    np.testing.assert_array_equal(np.argwhere(found.scored.loss_mask), [[0, 3], [0, 4]])
    assert float(found.share) == 0.5
    same = CodeMask.of(harmless, harmless, 100)
    assert float(same.share) == float(same.constant) == 0


def test_five_steps_of_all_parameters(wide_setting):
    compare(wide_setting, 0.7, 2.0, full=True)


def test_without_alpha_and_beta_it_is_sft_and_each_term_counts(wide_setting):
    model, adapter, _, _ = wide_setting
    loss, key = Loss.of(model), jax.random.key(0)
    batches = {n: jax.tree.map(jnp.asarray, s.batch(0)) for n, s in streams().items()}

    def gradient(defence):
        @jax.jit
        def found(loss, w):
            return defence.gradient(loss, w, batches, (), key)[0]

        return np.concatenate([np.ravel(x) for x in jax.tree.leaves(found(loss, adapter))])

    plain = gradient(Sft())
    np.testing.assert_allclose(gradient(RepNoise(alpha=0.0, beta=0.0)), plain, rtol=0, atol=1e-14)
    for term in ({"alpha": 0.0, "beta": 1.0}, {"alpha": 1.0, "beta": 0.0}):
        assert np.linalg.norm(gradient(RepNoise(**term)) - plain) > 1e-3


def batch_of(rows, length):
    tokens = np.zeros((len(rows), length), np.int32)
    valid = np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], valid[i, : len(row)] = row, True
    return Batch(*map(jnp.asarray, (tokens, valid, valid)))


def test_differing_tokens_by_hand():
    """Token id 0 is a token like any other, padding never counts, and the shapes need not agree."""
    harmful = batch_of([[5, 6, 0, 7], [5, 0], [1, 2, 3]], 5)
    harmless = batch_of([[5, 6, 1], [5]], 3)
    wanted = [
        [0, 0, 1, 1, 0],  # 7 stands beyond the harmless batch
        [0, 1, 0, 0, 0],  # token 0 against padding, whose id is 0 as well
        [1, 1, 1, 0, 0],  # no row to compare with
    ]
    np.testing.assert_array_equal(differing(harmful, harmless), np.asarray(wanted, bool))


def test_mmd_of_equal_sets_is_zero_and_of_far_ones_near_its_limit():
    x = jax.random.normal(jax.random.key(0), (4, 3, 5))
    rows = jnp.ones(4, bool)
    assert float(mmd(x, x, rows)) == pytest.approx(0, abs=1e-5)
    assert float(mmd(x, x + 100, rows)) > 5


def test_mmd_leaves_out_rows_that_only_fill_up():
    x, y = jax.random.normal(jax.random.key(0), (2, 4, 3, 5))
    rows = jnp.asarray([True, True, True, False])
    alone = mmd(x[:3], y[:3], jnp.ones(3, bool))
    assert float(mmd(x, y, rows)) == pytest.approx(float(alone), rel=1e-6)
    other = mmd(x.at[3].set(50.0), y, rows)
    assert float(other) == pytest.approx(float(alone), rel=1e-6)


def test_mmd_is_the_oracles():
    x, y = jax.random.normal(jax.random.key(0), (2, 4, 3, 5))
    theirs = oracle.kernel_mmd(*(torch.tensor(np.asarray(z)).flatten(1) for z in (x, y)))
    assert float(mmd(x, y, jnp.ones(4, bool))) == pytest.approx(theirs.item(), rel=1e-5)


def test_layerwise_losses_hold_the_logits_of_one_layer_at_a_time():
    """Compiled temporaries grow by hidden states, not by logits, when layers are added."""
    vocab, rows, length = 4096, 4, 32

    def temporaries(layers):
        config = config_from_dict({
            "model_type": "llama", "vocab_size": vocab, "hidden_size": 16, "intermediate_size": 16,
            "num_hidden_layers": layers, "num_attention_heads": 2, "num_key_value_heads": 2,
            "rms_norm_eps": 1e-6, "max_position_embeddings": 64,
        })  # fmt: skip
        loss = Loss.of(models.random_model(config, jax.random.key(0)))
        batch = batch_of([[1] * length] * rows, length)
        states = jnp.ones((layers + 1, rows, length, 16))
        gradient = jax.jit(jax.grad(lambda s, loss: layerwise_loss(loss, None, s, batch)))
        return gradient.lower(states, loss).compile().memory_analysis().temp_size_in_bytes

    logits = 4 * vocab * rows * length
    assert temporaries(12) - temporaries(2) < 0.5 * logits


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("key", ["alpha", "beta"])
def test_impossible_values_name_the_key(key, bad):
    with pytest.raises(InputError, match=f"config.defence.{key}"):
        RepNoise(**{key: bad})
