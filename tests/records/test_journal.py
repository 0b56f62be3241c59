"""Answers taken in any order, with a kill at any moment."""

import itertools
import json
import os

import pytest

from panacea_jax.errors import InputError
from panacea_jax.records.journal import Answers

PROMPTS = [f"p{i}" for i in range(5)]
ORDER = (3, 0, 4, 1, 2)


def line(i):
    return {"prompt": PROMPTS[i], "response": f"zürp\u2028 {i}\n"}


class Killed(BaseException):
    pass


def answer(path, order=ORDER, kill_after=None):
    """Put answers in this order; die after so many."""
    try:
        with Answers(path, PROMPTS) as answers:
            for n, i in enumerate(i for i in order if i in answers.missing):
                if n == kill_after:
                    raise Killed
                answers.put(i, line(i))
    except Killed:
        pass


@pytest.fixture
def whole(tmp_path):
    path = tmp_path / "whole.jsonl"
    answer(path)
    assert list(tmp_path.iterdir()) == [path]
    return path.read_bytes()


def test_the_file_is_in_the_order_of_the_prompts(whole):
    assert [json.loads(x) for x in whole.decode().split("\n")[:-1]] == [line(i) for i in range(5)]


@pytest.mark.parametrize("kills", list(itertools.product(range(5), range(3))))
def test_nothing_lost_or_doubled_after_kills(tmp_path, whole, kills):
    path = tmp_path / "set.jsonl"
    for kill in kills:
        answer(path, kill_after=kill)
    with pytest.raises(Killed), Answers(path, PROMPTS) as answers:
        assert len(answers.missing) == 5 - sum(kills) if sum(kills) < 5 else not answers.missing
        raise Killed
    answer(path, order=ORDER[::-1])
    assert path.read_bytes() == whole
    assert sorted(p.name for p in tmp_path.iterdir()) == ["set.jsonl", "whole.jsonl"]


def test_every_torn_tail_of_the_journal_is_dropped(tmp_path, whole):
    path, journal = tmp_path / "set.jsonl", tmp_path / "set.waiting.jsonl"
    answer(path, kill_after=3)  # 3 and 4 wait, 0 is in the file
    kept, done = journal.read_bytes(), path.read_bytes()
    assert kept.count(b"\n") == 2 and done.count(b"\n") == 1
    first = kept.index(b"\n") + 1
    for cut in range(len(kept)):
        journal.write_bytes(kept[:cut])
        path.write_bytes(done)
        with pytest.raises(Killed), Answers(path, PROMPTS) as answers:
            assert answers.missing == ([1, 2, 4] if cut >= first else [1, 2, 3, 4])
            raise Killed
        answer(path)
        assert path.read_bytes() == whole


def test_a_journal_of_other_prompts_is_refused_and_kept(tmp_path):
    path, journal = tmp_path / "set.jsonl", tmp_path / "set.waiting.jsonl"
    answer(path, kill_after=1)
    text = journal.read_text().replace("p3", "q3")
    journal.write_text(text)
    with pytest.raises(InputError, match=r"set\.waiting\.jsonl:1: not a record of this run"):
        Answers(path, PROMPTS)
    assert journal.read_text() == text
    journal.write_text("{}\n" + text)
    with pytest.raises(InputError, match=r"set\.waiting\.jsonl:1: damaged line"):
        Answers(path, PROMPTS)


def test_a_pipe_in_place_of_the_journal_is_refused(tmp_path):
    """On which reading would never end."""
    os.mkfifo(tmp_path / "set.waiting.jsonl")
    with pytest.raises(InputError, match="set.waiting.jsonl: cannot be read"):
        Answers(tmp_path / "set.jsonl", PROMPTS)
