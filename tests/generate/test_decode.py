"""Decoding against transformers' ``generate``, and against itself in other company."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from panacea_jax.errors import InputError
from panacea_jax.generate import decode, schedule
from panacea_jax.generate.sample import Sampling
from panacea_jax.models import model as models
from panacea_jax.models.bound import Inputs
from panacea_jax.models.cache import init_cache, insert, quantise_tokens
from tests.families import FAMILIES, VOCAB, build, save
from tests.on_devices import on_devices

NEW = 32
LENGTHS = (9, 16, 7, 12, 20, 31)  # three buckets: 16, 24 and 32


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
    """Eleven prompts of 1 to 40 tokens through three rows, so that every row is replaced, some in the middle of their neighbours' text."""
    theirs, ours = pair
    rng = np.random.default_rng(3)
    prompts = [rng.integers(1, VOCAB, n).tolist() for n in (9, 16, 1, 12, 40, 11, 3, 25, 17, 33, 2)]
    want = _theirs(theirs, prompts)
    got = _ours(ours, prompts, batch_size=3)
    assert got == {i: (ids, False) for i, ids in enumerate(want)}
    assert len({tuple(ids) for ids in want}) == len(prompts)
    assert max(len(set(ids)) for ids in want) > 5  # not one token over and over

    # Any of several end tokens stops a row, and only that row.
    eos = [want[0][6], want[3][2]]
    got = _ours(ours, prompts, eos, batch_size=3)
    for i, ids in enumerate(_theirs(theirs, prompts, eos)):
        assert got[i] == (ids, len(ids) < NEW)
    assert len(got[0][0]) <= 6 and len(got[3][0]) <= 2


def test_a_shared_beginning_is_read_once(pair):
    """Texts that begin alike, decoded with the beginning in the cache once; also where a part of them comes alone."""
    theirs, ours = pair
    rng = np.random.default_rng(8)
    begin = rng.integers(1, VOCAB, 21).tolist()
    prompts = [begin + rng.integers(1, VOCAB, n).tolist() for n in (9, 16, 1, 12, 2)]
    shared = decode.common_prefix(prompts)
    assert shared == 21
    got = _ours(ours, prompts, batch_size=3, shared=shared)
    assert got == {i: (ids, False) for i, ids in enumerate(_theirs(theirs, prompts))}
    some = _ours(ours, prompts[1:3], batch_size=3, shared=shared, slots=37 + NEW)
    assert some == {0: got[1], 1: got[2]}
    with pytest.raises(ValueError, match="do not share 21 tokens"):
        _ours(ours, [prompts[0], prompts[1][1:]], shared=21)


def test_common_prefix():
    long = list(range(40))
    assert decode.common_prefix([long, long]) == 39  # each keeps a token of its own
    assert decode.common_prefix([long, [*long[:16], 99, 99]]) == 16
    assert decode.common_prefix([long, [*long[:15], 99]]) == 0  # not worth it
    assert decode.common_prefix([long]) == 39


def test_slots_grow_and_shrink(pair, monkeypatch):
    """As on a CPU with a large cache: texts of 3 to 150 tokens through three rows."""
    theirs, ours = pair
    rng = np.random.default_rng(4)
    prompts = [rng.integers(1, VOCAB, n).tolist() for n in (3, 150, 70, 9, 100, 45, 5)]
    slots, sizes = decode.cache_slots, []
    monkeypatch.setattr(decode, "GROWS", 0)
    monkeypatch.setattr(decode, "cache_slots", lambda *x: sizes.append(slots(*x)) or sizes[-1])
    got = _ours(ours, prompts, batch_size=3)
    assert got == {i: (ids, False) for i, ids in enumerate(_theirs(theirs, prompts))}
    assert list(dict.fromkeys(sizes)) == [64, 192, 128] and 64 in sizes[2:]
    assert [slots(n, 182, 4) for n in (1, 64, 65, 182)] == [64, 64, 128, 192]
    assert [slots(n, 1000, 4) for n in (1, 300, 999)] == [256, 512, 1024]
    assert slots(1, 182, 1) == 192


def test_ids_equal_recomputation(pair):
    """Without a cache, the whole text read anew for every token."""
    _, ours = pair
    prompt = _prompts()[0]
    read = jax.jit(lambda w, t, v: ours.apply(w, None, t, None, v)[0])
    text = list(prompt)
    for _ in range(NEW):
        tokens = np.zeros((1, len(prompt) + NEW), np.int32)
        tokens[0, : len(text)] = text
        logits = read(ours.weights, tokens, np.arange(tokens.shape[1])[None] < len(text))
        text.append(int(jnp.argmax(logits[0, len(text) - 1])))
    assert _ours(ours, [prompt])[0] == (text[len(prompt) :], False)


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


def _programs(model, sampling=decode.GREEDY):
    return decode._programs(dataclasses.replace(model, weights=None, folder=None), sampling, 0)


def _admitted(model, prompt, rows, row, company, width=32):
    """A batch with ``prompt`` in ``row``, beside seven random prompts drawn from ``company``."""
    rng = np.random.default_rng(company)
    tokens = rng.integers(1, VOCAB, (8, width)).astype(np.int32)
    length = rng.integers(2, width, 8).astype(np.int32)
    at = company % 8
    tokens[at, : len(prompt)], length[at] = prompt, len(prompt)
    target = rng.permutation(np.delete(np.arange(rows), row))[:8].astype(np.int32)
    target[at] = row
    zero = np.zeros(8, np.int32)
    program = _programs(model)
    size = np.int32(NEW)
    read = program.prefill(model.weights, None, (), tokens, length, zero, zero, np.int32(0), size)
    return program.admit(program.empty(rows, 64, jnp.dtype("float32"), ()), *read, target)


def test_logits_are_the_same_bits_in_any_company_and_row(pair):
    _, ours = pair
    prompt = _prompts()[4]

    @jax.jit
    def next_logits(weights, rows):
        bound, first = ours.bind(weights, None), rows.cache.next[:, None]
        x, _ = bound.hidden(Inputs.of(rows.last[:, None], first=first), rows.cache)
        return bound.logits(x[:, 0])

    def bits(row, company):
        rows = _admitted(ours, prompt, 9, row, company)
        assert int(rows.cache.length[row]) == len(prompt) - 1
        return np.asarray(next_logits(ours.weights, rows))[row].tobytes()

    first = bits(0, 1)
    assert np.isfinite(np.frombuffer(first, np.float32)).all()
    for row, company in ((3, 2), (8, 13), (5, 4), (0, 6)):
        assert bits(row, company) == first


def test_ended_and_idle_rows_stand_still(small):
    prompt = _prompts(11)[0]
    free = _ours(small, [prompt])[0][0]
    program = _programs(small)
    rows = _admitted(small, prompt, 9, 2, 1)
    rows = rows._replace(left=jnp.where(jnp.arange(9) == 2, NEW, 0))
    before = np.asarray(rows.cache.length)
    eos = np.asarray([free[3]], np.int32)
    unstacked = program.unstack(small.weights, None)
    keys = rows.cache.layers[0][0].x
    rows, out = program.extend(small.weights, None, unstacked, rows, eos)
    assert keys.is_deleted()  # donated: the cache was written in place
    stop = free.index(free[3])
    assert out[2].tolist() == free[: stop + 1] + [-1] * (decode.CHUNK - stop - 1)
    assert (np.delete(out, 2, axis=0) == -1).all()
    assert (rows.left == 0).all()
    moved = np.asarray(rows.cache.length) - before
    assert moved.tolist() == [0, 0, stop + 1, 0, 0, 0, 0, 0, 0]


def test_programs_are_few(small):
    decode._programs.cache_clear()
    prompts = [p for seed in range(4) for p in _prompts(seed)]
    _ours(small, prompts)
    program = _programs(small)
    assert program.prefill._cache_size() == len({schedule.prompt_bucket(len(p)) for p in prompts}) == 3
    assert program.extend._cache_size() == 1
    other = models.load(small.folder, dtype="float32")  # equal graph: nothing is built anew
    _ours(other, prompts[:3])
    assert program is _programs(other)
    assert program.prefill._cache_size() == 3 and program.extend._cache_size() == 1


def _moved(adapter, seed):
    draw = jax.random.key(seed)
    return jax.tree.map(lambda x: x + 0.3 * jax.random.normal(draw, x.shape), adapter)


def test_several_adapters_of_one_base(small):
    """Rows with adapters of other ranks and targets in one batch get what each adapter alone gives."""
    from panacea_jax.models import lora

    key = jax.random.key(0)
    adapters = [
        _moved(lora.init(small, 2, 4, ("q", "v"), key=key), 1),
        _moved(lora.init(small, 3, 2, ("v", "down", "o"), key=key), 2),
        lora.init(small, 1, 1, ("gate",), key=key),  # B is zero: the bare base
    ]
    prompts = _prompts(1)
    which = [0, 1, 2, 1, 0, 1]
    got = _ours(small, prompts, params=lora.side_by_side(adapters), adapters=which)
    alone = [_ours(small, prompts, params=adapter) for adapter in adapters]
    assert got == {i: alone[a][i] for i, a in enumerate(which)}
    assert alone[2] == _ours(small, prompts)
    assert all(alone[0][i] != alone[1][i] != alone[2][i] for i in range(len(prompts)))


def test_int8_cache_is_close_but_not_exact(small):
    """The first tokens' logits move by little; most first tokens stay."""
    prompts = [p for seed in range(6) for p in _prompts(seed)]
    full, int8 = (_ours(small, prompts, cache_dtype=d, max_new_tokens=4) for d in (None, "int8"))
    same = np.mean([full[i][0] == int8[i][0] for i in range(len(prompts))])
    assert same >= 0.8

    def logits(dtype):
        rows = _admitted(small, prompts[0], 9, 2, 1)
        empty = init_cache(small.config, 9, 64, 16, dtype)
        layers = rows.cache.layers
        cache = insert(empty, layers, rows.cache.length, jnp.arange(9))
        bound, first = small.bind(small.weights, None), cache.next[:, None]
        x, _ = bound.hidden(Inputs.of(rows.last[:, None], first=first), cache)
        return np.asarray(bound.logits(x[:, 0])[2])

    exact, rounded = logits("float32"), logits("int8")
    error = np.abs(exact - rounded).max() / np.abs(exact).max()
    assert 1e-5 < error < 0.05


def test_quantised_entries_are_within_half_a_step():
    x = np.random.default_rng(0).normal(size=(2, 3, 5, 16)).astype(np.float32)
    x[0, 0, 0] = 0
    got = quantise_tokens(jnp.asarray(x))
    step = np.abs(x).max(-1) / 127
    np.testing.assert_allclose(got.scale, step, rtol=1e-6)
    assert np.abs(np.asarray(got.x)).max() == 127 and not np.asarray(got.x)[0, 0, 0].any()
    back = np.asarray(got.x, np.float32) * np.asarray(got.scale)[..., None]
    assert (np.abs(back - x) <= 0.5001 * step[..., None]).all()


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


def test_draws_depend_on_seed_and_prompt_alone(small):
    prompts = _prompts(2)
    how = {"sampling": Sampling(1.0, 0.9), "seed": 5}
    got = _ours(small, prompts, **how)
    assert got == _ours(small, prompts, batch_size=1, **how)
    turned = _ours(small, prompts[::-1], indices=range(len(prompts))[::-1], batch_size=2, **how)
    assert {len(prompts) - 1 - i: text for i, text in turned.items()} == got
    some = _ours(small, prompts[2:4], indices=[2, 3], **how)
    assert some == {0: got[2], 1: got[3]}
    assert _ours(small, prompts, **how | {"seed": 6}) != got != _ours(small, prompts)
    twice = _ours(small, [prompts[0]] * 2, **how)
    assert twice[0] == got[0] and twice[1] != twice[0]


@pytest.mark.parametrize(
    ("length", "want"), [(1, 16), (16, 16), (17, 24), (25, 32), (64, 64), (65, 96), (97, 128)]
)
def test_bucket(length, want):
    assert schedule.prompt_bucket(length) == want


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([[1], []], {}, "prompt 1 has no tokens"),
        ([[1, VOCAB]], {}, "prompts: record 1 has token id 96, outside the model's vocabulary of 96"),
        ([[1]], {"batch_size": 0}, "batch_size = 0"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens = 0"),
    ],
)
def test_bad_input(small, prompts, settings, message):
    with pytest.raises(InputError, match=message):
        _ours(small, prompts, **settings)


def test_ids_on_a_mesh(tmp_path):
    """Rows and heads over devices, with a shared beginning and a cache that grows: the same ids everywhere, those of transformers."""
    theirs = build("llama3.1", seed=5)
    folder = save(theirs, tmp_path / "llama3.1")
    found = on_devices("tests.generate.sharded", folder)
    assert found.pop("devices") == 8
    want = _theirs(theirs, found.pop("prompts"))
    assert len(found) == 4 and all(ids == want for ids in found.values())
