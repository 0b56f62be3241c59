"""Streams as a defence asks for them: several batches a step, and records in pairs."""

import dataclasses
import json

import numpy as np
import pytest

from panacea_jax.config import get_config
from panacea_jax.data.tokenizer import load_tokenizer
from panacea_jax.defences import Booster, RepNoise, Tar
from panacea_jax.errors import InputError
from panacea_jax.stages.rendering import make_template
from panacea_jax.stages.streams import make_streams, stage_records
from tests.tiny import write_model

ROWS = 9


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("streams") / "base")


@pytest.fixture
def config(base, tmp_path):
    """Pairs: record i of both files has the prompt w{i}, and answers that tell them apart."""
    for name, answer in (("harmful", "sure"), ("alignment", "no")):
        rows = [{"instruction": f"w{i}", "output": f"{answer} w{i}"} for i in range(ROWS)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    config = get_config()
    config.model.path = str(base)
    config.data.harmful = f"pairs@{tmp_path / 'harmful.jsonl'}"
    config.data.alignment = f"pairs@{tmp_path / 'alignment.jsonl'}"
    config.data.num_harmful = config.data.num_alignment = 0
    config.data.max_length = 96
    config.train.batch_size = config.train.harmful_batch_size = 4
    return config


def made(config, defence, tokenizer, rows):
    """The streams of the alignment stage."""
    streams, held_out = make_streams(config, "align", defence, make_template(config, tokenizer), len(tokenizer), rows)
    assert held_out == []
    return streams


def prompts(stream, step):
    """The prompt of each row, as token ids."""
    batch = stream.batch(step)
    return [
        tuple(row[valid & ~mask])
        for row, valid, mask in zip(batch.tokens, batch.valid, batch.loss_mask)
    ]


def test_pairs_share_the_prompt_in_every_row_of_every_epoch(config, base):
    tokenizer = load_tokenizer(base)
    paired = made(config, RepNoise(), tokenizer, 1)
    own = made(config, RepNoise(paired=False), tokenizer, 1)
    same = []
    for step in range(8):
        assert prompts(paired["user"], step) == prompts(paired["harmful"], step)
        same.append(prompts(own["user"], step) == prompts(own["harmful"], step))
    assert not any(same)
    orders = {tuple(prompts(paired["user"], step)) for step in range(8)}
    assert len(orders) == 8  # shuffled, anew in every epoch


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("data.num_harmful", 5, ("config.data.num_harmful", "config.data.num_alignment")),
        (
            "train.harmful_batch_size",
            3,
            ("config.train.harmful_batch_size", "config.train.batch_size"),
        ),
    ],
)
def test_what_cannot_be_paired_names_the_keys(config, key, value, named):
    config.update_from_flattened_dict({key: value})
    with pytest.raises(InputError) as error:
        stage_records(config, "align", RepNoise())
    assert all(name in str(error.value) for name in (*named, "config.defence.paired=False"))
    stage_records(config, "align", RepNoise(paired=False))
    stage_records(config, "align", Booster())


def test_records_with_other_prompts_are_no_pairs(config, tmp_path):
    path = tmp_path / "harmful.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], lines[3], lines[2], *lines[4:]]))
    with pytest.raises(InputError, match=r"config\.data\.harmful: record 3 has another prompt"):
        stage_records(config, "align", RepNoise())


def test_tar_gets_its_batches_one_after_the_other(config, base):
    """Whatever the number of rows that a mesh asks for, batch k of step t is batch 4 t + k of the plain stream."""
    tokenizer = load_tokenizer(base)
    config.train.harmful_batch_size = 3
    defence = Tar(inner_steps=3, inner_every=1)
    plain = made(config, Booster(), tokenizer, 2)["harmful"]
    several = made(config, defence, tokenizer, 2)["harmful"]
    assert made(config, defence, tokenizer, 2)["user"].repeats == 1
    for step in range(3):
        batch = several.batch(step)
        assert batch.tokens.shape == (4 * plain.rows, plain.batch(0).tokens.shape[1])
        for k in range(4):
            for woven, one in zip(batch[:3], plain.batch(4 * step + k)):
                np.testing.assert_array_equal(woven[k::4], one)


def test_without_repeats_a_batch_is_what_it_was(config, base):
    tokenizer = load_tokenizer(base)
    stream = made(config, Booster(), tokenizer, 1)["harmful"]
    assert (stream.repeats, stream.order) == (1, "")
    twice = dataclasses.replace(stream, repeats=2)
    for woven, one in zip(twice.batch(0)[:3], stream.batch(1)):
        np.testing.assert_array_equal(woven[1::2], one)
