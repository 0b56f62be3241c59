"""Log-likelihoods of the ends of texts are transformers', whatever the company."""

import jax
import numpy as np
import pytest
import torch

from panacea_jax.generate.likelihood import log_likelihoods
from panacea_jax.models import lora
from panacea_jax.models.model import load
from panacea_jax.models.peft import save_adapter
from tests import torch_oracle
from tests.families import VOCAB, build, save


@pytest.fixture(scope="module", params=["llama2", "qwen2"])
def pair(request, tmp_path_factory):
    """Ours with an adapter, and PyTorch's."""
    root = tmp_path_factory.mktemp("likelihood")
    base = save(build(request.param), root / "base")
    model = load(base, dtype="float32")
    params = lora.init(model, 4, 8, ("q", "v"), key=jax.random.key(0))
    layers = jax.tree.map(lambda x: x + 0.05, params.layers)
    params = lora.Adapter(layers, params.rank, params.alpha)
    save_adapter(params, root / "adapter", str(base))
    return model, params, torch_oracle.load(base, root / "adapter", torch.float32).eval()


def theirs(model, text, start):
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([text])).logits[0, :-1]
    logp = torch.log_softmax(logits, dim=-1)
    target = torch.tensor(text[1:])
    counted = slice(start - 1, None)
    total = logp.gather(1, target[:, None])[counted].sum().item()
    return total, bool((logits.argmax(dim=-1) == target)[counted].all())


def test_equal_transformers(pair):
    model, params, peft = pair
    rng = np.random.default_rng(0)
    texts = [rng.integers(3, VOCAB, n).tolist() for n in (2, 70, 5, 33, 64)]
    starts = [1, 1, 4, 20, 64]
    # A text that greedy decoding goes on with, and the same with another end.
    text = texts[2][:3]
    for _ in range(4):
        with torch.no_grad():
            text.append(int(peft(input_ids=torch.tensor([text])).logits[0, -1].argmax()))
    texts += [text, [*text[:-1], (text[-1] + 1) % VOCAB]]
    starts += [3, 3]
    expected = [theirs(peft, t, s) for t, s in zip(texts, starts) if s < len(t)]
    found = log_likelihoods(model, params, texts, starts, batch_size=2)
    assert found[4] == (0.0, True)  # nothing to count
    rest = [f for i, f in enumerate(found) if i != 4]
    for (ours, greedy), (total, best) in zip(rest, expected, strict=True):
        assert ours == pytest.approx(total, rel=1e-4, abs=1e-4) and greedy == best
    assert [greedy for _, greedy in found[-2:]] == [True, False]
    alone = [log_likelihoods(model, params, [t], [s], batch_size=1)[0][0] for t, s in zip(texts, starts)]
    np.testing.assert_allclose(alone, [total for total, _ in found], rtol=1e-4, atol=1e-5)


def test_the_adapter_counts(pair):
    model, params, _ = pair
    text = list(range(3, 12))
    one, other = (log_likelihoods(model, p, [text], [1], batch_size=1)[0][0] for p in (params, None))
    assert abs(one - other) > 1e-3
    assert log_likelihoods(model, None, [], [], batch_size=4) == []
