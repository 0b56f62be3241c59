"""Greedy decoding against transformers' ``generate``."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from panacea_jax.errors import InputError
from panacea_jax.generate import decode
from panacea_jax.models import model as models
from tests.families import FAMILIES, VOCAB, build, save

NEW = 32
LENGTHS = (9, 16, 7, 12, 20, 11)  # two buckets: 16 and 32


def _prompts(seed=3):
    rng = np.random.default_rng(seed)
    return [rng.integers(1, VOCAB, n).tolist() for n in LENGTHS]


def _theirs(model, prompts, eos=None, new=NEW):
    """transformers' continuation of one left-padded batch, without padding and end token."""
    width = max(map(len, prompts))
    tokens = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    with torch.no_grad():
        out = model.generate(
            tokens,
            attention_mask=mask,
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=eos,
        )
    rows = [row[width:].tolist() for row in out]
    ends = [next((i for i, t in enumerate(row) if t in (eos or ())), new) for row in rows]
    return [row[:end] for row, end in zip(rows, ends)]


def _ours(model, prompts, eos=(), params=None, **kwargs):
    settings = {"batch_size": 4, "max_new_tokens": NEW, "pad_id": 0, **kwargs}
    found = decode.generate(model, model.weights, params, prompts, eos_ids=eos, **settings)
    return {i: (ids, finished) for i, ids, finished in found}


@pytest.fixture(scope="module", params=list(FAMILIES))
def pair(request, tmp_path_factory):
    theirs = build(request.param, seed=5)
    folder = save(theirs, tmp_path_factory.mktemp("hf") / request.param)
    return theirs, models.load(folder, dtype="float32")


def test_ids_equal_transformers(pair):
    theirs, ours = pair
    prompts = [p for p in _prompts() if len(p) <= 16]
    want = _theirs(theirs, prompts)
    got = _ours(ours, prompts)
    assert sorted(got) == list(range(len(prompts)))
    for i, ids in enumerate(want):
        assert got[i] == (ids, False)
        assert len(ids) == NEW
    assert len({tuple(ids) for ids in want}) == len(prompts)
    assert max(len(set(ids)) for ids in want) > 5  # not one token over and over

    # Any of several end tokens stops a row, and only that row.
    eos = [want[0][6], want[3][2]]
    got = _ours(ours, prompts, eos)
    for i, ids in enumerate(_theirs(theirs, prompts, eos)):
        assert got[i] == (ids, len(ids) < NEW)
    assert len(got[0][0]) <= 6 and len(got[3][0]) <= 2


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = save(build("gemma2", seed=7), tmp_path_factory.mktemp("hf") / "small")
    return models.load(folder, dtype="float32")


def test_same_alone_in_company_and_in_any_order(small):
    prompts = _prompts(11)
    together = _ours(small, prompts)
    for i, prompt in enumerate(prompts):
        assert _ours(small, [prompt])[0] == together[i]
    turned = _ours(small, prompts[::-1])
    assert [turned[len(prompts) - 1 - i] for i in range(len(prompts))] == [
        together[i] for i in range(len(prompts))
    ]
    # A neighbour that ends at once, or never, changes nothing either.
    eos = [together[1][0][0]]
    ends = _ours(small, prompts, eos)
    assert ends[1] == ([], True)
    for i in range(len(prompts)):
        ids = together[i][0]
        stop = next((j for j, t in enumerate(ids) if t in eos), None)
        assert ends[i] == (ids[:stop], stop is not None)


def test_pad_token_may_be_the_end_token(small):
    prompts = _prompts(11)
    free = _ours(small, prompts)
    eos = free[2][0][4]
    assert _ours(small, prompts, [eos], pad_id=eos) == _ours(small, prompts, [eos])


def test_idle_rows_and_ended_rows_stop_the_loop(small):
    """After the end token of the only active row nothing more is computed for any row."""
    prompt = _prompts(11)[0]
    free = _ours(small, [prompt])[0][0]
    program = decode._program(decode._Static(small), NEW, 0)
    tokens, valid = map(jnp.asarray, decode._left_padded([prompt], 4, 16, 0))
    eos, active = jnp.asarray([free[3]]), jnp.arange(4) < 1
    out, count, finished = program(small.weights, None, tokens, valid, active, eos)
    stop = free.index(free[3])
    assert int(count[0]) == stop and bool(finished[0])
    assert (np.asarray(out)[:, stop + 1 :] == 0).all()
    assert not np.asarray(finished)[1:].any() and (np.asarray(count)[1:] == stop + 1).all()


def test_one_program_a_bucket(small):
    decode._program.cache_clear()
    prompts = [p for seed in range(4) for p in _prompts(seed)]
    _ours(small, prompts)
    program = decode._program(decode._Static(small), NEW, 0)
    assert program._cache_size() == len({decode.bucket(len(p)) for p in prompts}) == 2
    other = models.load(small.folder, dtype="float32")  # equal graph: nothing is built anew
    _ours(other, prompts[:3])
    assert program is decode._program(decode._Static(other), NEW, 0)
    assert program._cache_size() == 2


def test_adapter_is_applied(small):
    from panacea_jax.models import lora

    adapter = lora.init(small, rank=2, alpha=4, targets=("q", "v"), key=jax.random.key(0))
    prompts = _prompts(1)
    assert _ours(small, prompts, params=adapter) == _ours(small, prompts)  # B is zero
    moved = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(1), x.shape), adapter)
    got = _ours(small, prompts, params=moved)
    assert got != _ours(small, prompts)
    full = lora.merge(small.weights, moved)
    found = decode.generate(
        small, None, full, prompts, batch_size=4, max_new_tokens=NEW, eos_ids=(), pad_id=0
    )
    assert {i: (ids, end) for i, ids, end in found} == got  # all-parameter mode, merged weights


def test_results_are_reported_shortest_bucket_first(small):
    seen = []
    results = _ours(small, _prompts(), on_result=lambda *result: seen.append(result))
    assert [i for i, _, _ in seen] == [0, 1, 2, 3, 5, 4]
    assert {i: (ids, end) for i, ids, end in seen} == results


@pytest.mark.parametrize(("length", "want"), [(1, 16), (16, 16), (17, 32), (64, 64), (65, 128)])
def test_bucket(length, want):
    assert decode.bucket(length) == want


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([[1], []], {}, "prompt 1 has no tokens"),
        ([[1, VOCAB]], {}, "prompt 0 .*outside the model's vocabulary of 96"),
        ([[1]], {"batch_size": 0}, "batch_size = 0"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens = 0"),
    ],
)
def test_bad_input(small, prompts, settings, message):
    with pytest.raises(InputError, match=message):
        _ours(small, prompts, **settings)
