"""Which records share a row, and what such rows hold."""

import jax
import numpy as np
import pytest

from panacea_jax.data.batches import Stream, bucket, deinterleave, length_buckets, pack
from panacea_jax.data.encode import Example, encode_all
from panacea_jax.data.packing import first_fit
from panacea_jax.data.sources import load_records
from panacea_jax.data.template import Template
from panacea_jax.errors import InputError
from tests.data.test_batches import example


def stream(examples: list[Example], batch_size: int, buckets=(8, 16), **options) -> Stream:
    return Stream("user", examples, batch_size, 0, True, buckets, packing=True, **options)


def some(n: int = 40, seed: int = 0) -> list[Example]:
    rng = np.random.default_rng(seed)
    return [example(i, int(k), 2) for i, k in enumerate(rng.integers(3, 15, n))]


def records(batch) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Tokens and labels of each record of a batch, sorted."""
    rows = [
        (tuple(t[s == k].tolist()), tuple(t[(s == k) & m].tolist()))
        for t, m, s in zip(batch.tokens, batch.loss_mask, batch.segments)
        for k in range(1, s.max() + 1)
    ]
    return sorted(rows)


def test_first_fit_by_hand():
    assert first_fit([3, 5, 2, 5, 1], 8) == [[1, 0], [3, 2, 4]]
    assert first_fit([8, 8, 8], 8) == [[0], [1], [2]]
    assert first_fit([2, 2, 2, 2, 2], 8) == [[0, 1, 2, 3], [4]]
    assert first_fit([], 8) == []


@pytest.mark.parametrize("seed", range(20))
def test_every_record_once_in_no_more_than_eleven_ninths_of_the_rows(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 33, 50).tolist()
    rows = first_fit(sizes, 32)
    assert sorted(i for row in rows for i in row) == list(range(50))
    assert all(0 < sum(sizes[i] for i in row) <= 32 for row in rows)
    assert rows == first_fit(list(sizes), 32)
    # The fewest rows possible where the sizes are cut out of full rows.
    cuts = [
        np.diff([0, *sorted(rng.choice(np.arange(1, 32), 3, replace=False)), 32]) for _ in range(12)
    ]
    assert 12 <= len(first_fit(np.concatenate(cuts).tolist(), 32)) <= 11 / 9 * 12 + 6 / 9


def test_pack_by_hand():
    batch = pack([[example(1, 3, 1), example(2, 2, 0)], [example(3, 4, 4)]], length=6, rows=3)
    assert batch.tokens.tolist() == [
        [101, 102, 103, 201, 202, 0],
        [301, 302, 303, 304, 0, 0],
        [0] * 6,
    ]
    # The second record has no prompt, yet its first token is not predicted from the first record.
    assert batch.loss_mask.astype(int).tolist() == [[0, 1, 1, 0, 1, 0], [0] * 6, [0] * 6]
    assert batch.segments.tolist() == [[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 0, 0], [0] * 6]
    assert (batch.valid == (batch.segments > 0)).all() and batch.records == 3
    assert batch.segments.dtype == np.int32
    with pytest.raises(InputError, match="7 tokens do not fit"):
        pack([[example(1, 3, 1), example(2, 4, 1)]], length=6, rows=1)


@pytest.mark.parametrize("options", [{}, {"row_multiple": 2}, {"fixed_length": True}], ids=str)
def test_a_step_takes_the_records_that_it_takes_unpacked(options):
    packed = stream(some(), 6, **options)
    plain = Stream("user", packed.examples, 6, 0, True, packed.buckets, **options)
    shapes, fewer = set(), 0
    for step in range(12):
        a, b = packed.batch(step), plain.batch(step)
        alone = b._replace(segments=b.valid.astype(np.int32))
        assert records(a) == records(alone) and a.records == b.records == 6
        assert a.loss_mask[:, 1:].sum() == b.loss_mask[:, 1:].sum()
        assert a.tokens.size <= b.tokens.size and len(a.tokens) in packed.row_counts
        # Full rows: none is empty unless the buckets of rows asks for it, and records lie side by side.
        assert (np.diff(a.valid.astype(int), axis=1) <= 0).all()
        fewer += a.tokens.size < b.tokens.size
        shapes.add(a.tokens.shape)
        again = stream(some(), 6, **options).batch(step)
        assert jax.tree.all(jax.tree.map(np.array_equal, a, again))
    assert fewer and packed.steps_per_epoch == plain.steps_per_epoch
    assert len(shapes) <= len(packed.row_counts) * len(packed.buckets)


def test_row_counts_are_quarters_that_the_mesh_divides():
    def counts(batch_size, row_multiple):
        return stream(some(), batch_size, row_multiple=row_multiple).row_counts

    assert counts(10, 1) == (3, 5, 8, 10)
    assert counts(10, 8) == (8, 16)
    assert counts(64, 4) == (16, 32, 48, 64)
    assert counts(1, 1) == (1,) and counts(2, 1) == (1, 2)


def test_a_batch_of_long_records_is_as_it_was():
    packed = stream([example(i, 15, 3) for i in range(6)], 3)
    plain = Stream("user", packed.examples, 3, 0, True, packed.buckets)
    for a, b in zip(packed.batch(1)[:3], plain.batch(1)[:3]):
        np.testing.assert_array_equal(a, b)


def test_several_batches_a_step_have_one_shape():
    packed = stream(some(), 6, fixed_length=True)
    woven = stream(some(), 6, fixed_length=True, repeats=3)
    for step in range(4):
        apart = deinterleave(woven.batch(step), 3)
        for k in range(3):
            one = jax.tree.map(lambda x, k=k: x[k], apart)
            assert records(one) == records(packed.batch(3 * step + k))


def test_whole_sets_are_not_packed():
    assert all(batch.segments is None for batch in stream(some(), 6).once())


def test_real_records_take_fewer_tokens(shared, llama2):
    """Alpaca at batch 10 and 256 tokens."""
    found = load_records(f"alpaca@{shared / 'alpaca' / 'train.jsonl.gz'}", "k")[:200]
    examples = encode_all(found, Template("alpaca", llama2), 256, "k")
    packed = stream(examples, 10, length_buckets(256))
    plain = Stream("user", examples, 10, 0, True, length_buckets(256))
    sizes = {s: [s.batch(t).tokens.size for t in range(20)] for s in (packed, plain)}
    assert sum(sizes[packed]) < 0.8 * sum(sizes[plain])
    longest = [int(plain.batch(t).valid.sum(axis=1).max()) for t in range(20)]
    assert all(
        packed.batch(t).tokens.shape[1] >= bucket(n, length_buckets(256)) for t, n in enumerate(longest)
    )
