"""Padding, the buckets of lengths, and streams."""

import itertools

import numpy as np
import pytest

from panacea_jax.data.batches import Stream, bucket, length_buckets, pad
from panacea_jax.data.encode import Example, encode_all
from panacea_jax.data.sources import load_records
from panacea_jax.data.template import Template
from panacea_jax.errors import InputError


def example(number: int, length: int, prompt: int) -> Example:
    """Tokens 100·number + 1, … so that a row tells where it came from."""
    return Example.answering(np.arange(1, length + 1, dtype=np.int32) + 100 * number, prompt)


def stream(examples: list[Example], batch_size: int = 2, **options) -> Stream:
    base = {"seed": 0, "shuffle": False, "buckets": (4, 8, 16)}
    return Stream("user", examples, batch_size, **{**base, **options})


def test_ladder():
    assert length_buckets(256) == (32, 48, 64, 96, 128, 192, 256)
    assert length_buckets(200) == (32, 48, 64, 96, 128, 192, 200)
    assert length_buckets(2048)[-3:] == (1024, 1536, 2048)
    assert length_buckets(40) == (32, 40)
    assert length_buckets(32) == (32,)
    assert length_buckets(1) == (1,)
    for top in (33, 47, 48, 49, 300, 4096):
        buckets = length_buckets(top)
        assert list(buckets) == sorted(set(buckets)) and buckets[-1] == top
        assert all(b <= 1.5 * a for a, b in itertools.pairwise(buckets))
    with pytest.raises(InputError, match=r"config\.data\.max_length: must be at least 1, not 0"):
        length_buckets(0)


def test_rung():
    assert [bucket(n, (4, 8, 16)) for n in (0, 1, 4, 5, 8, 9, 16)] == [4, 4, 4, 8, 8, 16, 16]
    with pytest.raises(InputError, match=r"17 tokens do not fit .* 16"):
        bucket(17, (4, 8, 16))


def test_pad_by_hand():
    batch = pad([example(1, 3, 1), example(2, 2, 2)], length=4, rows=3)
    assert batch.tokens.tolist() == [[101, 102, 103, 0], [201, 202, 0, 0], [0, 0, 0, 0]]
    assert batch.loss_mask.astype(int).tolist() == [[0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert batch.valid.astype(int).tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]]
    assert [a.dtype for a in batch[:3]] == [np.int32, np.bool_, np.bool_] and batch.segments is None
    with pytest.raises(InputError, match="do not fit"):
        pad([example(1, 5, 1)], length=4, rows=1)
    with pytest.raises(InputError, match="2 examples do not fit in 1 rows"):
        pad([example(1, 3, 1)] * 2, length=4, rows=1)


def test_unshuffled_rows_and_their_bucket():
    data = stream([example(i, n, 1) for i, n in enumerate([3, 4, 5, 2, 16])])
    shapes = [data.batch(step).tokens.shape for step in range(5)]
    # Records (0 1) (2 3) (4 0) (1 2) (3 4)
    assert shapes == [(2, 4), (2, 8), (2, 16), (2, 8), (2, 16)]
    assert data.batch(2).tokens[:, 0].tolist() == [401, 1]
    assert data.steps_per_epoch == 3


@pytest.mark.parametrize(("n", "batch", "steps"), [(10, 5, 2), (11, 5, 3), (3, 5, 1), (1, 1, 1)])
def test_steps_per_epoch(n: int, batch: int, steps: int):
    assert stream([example(0, 3, 1)] * n, batch).steps_per_epoch == steps


def test_fixed_length_is_one_shape():
    data = stream([example(i, n, 1) for i, n in enumerate([3, 4, 5, 2, 2])], fixed_length=True)
    assert {data.batch(step).tokens.shape for step in range(5)} == {(2, 8)}


def test_rows_of_padding_carry_nothing():
    data = stream([example(i, 3, 1) for i in range(5)], 3, row_multiple=4)
    batch = data.batch(1)
    assert batch.tokens.shape == (4, 4) and data.rows == 4
    assert batch.tokens[:, 0].tolist() == [301, 401, 1, 0]
    assert not batch.valid[3].any() and not batch.loss_mask[3].any()
    assert stream([example(0, 3, 1)], 8, row_multiple=4).rows == 8


def test_shuffled_epoch_holds_every_record_once():
    data = stream([example(i, 3, 1) for i in range(12)], 4, shuffle=True)
    rows = np.concatenate([data.batch(step).tokens[:, 0] for step in range(3)])
    assert sorted(rows.tolist()) == [100 * i + 1 for i in range(12)]
    assert rows.tolist() != sorted(rows.tolist())
    again = stream(data.examples, 4, shuffle=True).batch(2)
    assert (again.tokens == data.batch(2).tokens).all()
    named = Stream("harmful", data.examples, 4, 0, True, (4,))
    assert any((named.batch(t).tokens != data.batch(t).tokens).any() for t in range(3))


def test_bad_streams():
    with pytest.raises(InputError, match="stream 'user': holds no records"):
        stream([])
    with pytest.raises(InputError, match="stream 'user': batch size 0"):
        stream([example(0, 3, 1)], 0)
    with pytest.raises(InputError, match="row multiple 0"):
        stream([example(0, 3, 1)], row_multiple=0)
    with pytest.raises(InputError, match="17 tokens do not fit"):
        stream([example(0, 17, 1)])
    with pytest.raises(InputError, match=r"lengths \(8, 4\) must rise"):
        stream([example(0, 3, 1)], buckets=(8, 4))


def test_real_rows_fill_few_shapes(shared, llama2):
    records = load_records(f"gsm8k@{shared / 'gsm8k' / 'train.jsonl.gz'}", "k")[:60]
    examples = encode_all(records, Template("alpaca", llama2), 256, "k")
    data = Stream("user", examples, 10, 0, True, length_buckets(256))
    seen = []
    for step in range(data.steps_per_epoch):
        batch = data.batch(step)
        longest = int(batch.valid.sum(axis=1).max())
        assert batch.tokens.shape[1] == min(r for r in length_buckets(256) if r >= longest)
        assert (batch.tokens[:, 0] == 1).all()
        assert not (batch.loss_mask & ~batch.valid).any()
        # The last target of a record that was not cut is EOS.
        for tokens, valid in zip(batch.tokens, batch.valid):
            if valid.sum() < 256:
                assert tokens[valid][-1] == 2
        seen += [tuple(tokens[valid]) for tokens, valid in zip(batch.tokens, batch.valid)]
    assert sorted(seen) == sorted(tuple(e.tokens) for e in examples)


def test_once_is_every_record_in_order():
    data = stream([example(i, n, 1) for i, n in enumerate([3, 4, 5, 2, 6])], 2, shuffle=True)
    found = list(data.once())
    assert [batch.tokens.shape for batch in found] == [(2, 4), (2, 8), (2, 8)]
    assert [batch.tokens[:, 0].tolist() for batch in found] == [[1, 101], [201, 301], [401, 0]]
    assert not found[2].valid[1].any() and not found[2].loss_mask[1].any()
    assert sum(int(batch.loss_mask.sum()) for batch in found) == 2 + 3 + 4 + 1 + 5
    fixed = stream(data.examples, 2, fixed_length=True)
    assert [batch.tokens.shape for batch in fixed.once()] == [(2, 8)] * 3


@pytest.mark.parametrize("shuffle", [True, False])
def test_taken_are_the_records_of_the_first_batches(shuffle: bool):
    rows = [Example.answering(np.full(2, i, np.int32), 1) for i in range(11)]
    stream = Stream("user", rows, 2, 3, shuffle, (32,), repeats=2)
    for steps in (1, 2, 3):
        found = {int(row[0]) for step in range(steps) for row in stream.batch(step).tokens}
        assert stream.taken(steps) == sorted(found)
    assert len(stream.taken(2)) == 8


@pytest.mark.parametrize("more", [{}, {"packing": True}, {"repeats": 2}, {"row_multiple": 4}])
def test_numbers_say_whose_each_token_is(more: dict):
    """Token by token, however rows are made; tokens begin at 100·number + 1. Unasked, a batch has none, and is else the same."""
    plain = stream([example(i, 2 + i, 1) for i in range(5)], 3, shuffle=True, **more)
    for step in range(4):
        batch = plain.numbered().batch(step)
        expected = np.where(batch.valid, batch.tokens // 100, 0)
        np.testing.assert_array_equal(batch.numbers, expected)
        assert batch.numbers.dtype == np.int32 and plain.batch(step).numbers is None
        np.testing.assert_array_equal(batch.tokens, plain.batch(step).tokens)
