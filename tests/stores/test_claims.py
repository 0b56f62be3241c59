"""Of all that ask for a work directory one has it, until it lets go or gives no sign of life."""

import json
import threading
import time

import pytest

from panacea_jax.errors import InputError, StoreFailed
from panacea_jax.stores import claims
from panacea_jax.stores.claims import Claim
from panacea_jax.stores.objects import Objects


@pytest.fixture
def objects(store, monkeypatch):
    monkeypatch.setattr(claims, "BEAT", 0.05)
    monkeypatch.setattr(claims, "SILENCE", 1.0)
    return Objects(f"{store.root}/run")


def test_a_second_one_waits_and_is_told_so_at_once(objects, monkeypatch, caplog):
    held = Claim(objects)
    monkeypatch.setattr(claims, "PATIENCE", 1.5)  # longer than the silence, but there is none
    with pytest.raises(InputError, match=f"{objects.address}: another run is at work there; wait for its end"):
        Claim(objects)
    assert [r.getMessage() for r in caplog.records] == [
        f"{objects.address}: another run is at work there, or was killed; waiting for it, up to 2 s"
    ]
    held.check()
    held.close()
    begun = time.monotonic()
    following = Claim(objects)
    assert time.monotonic() - begun < 1
    assert objects.numbers(claims.PREFIX) == [2]  # one number is one owner, for ever
    following.close()


def silent(objects, **owner):
    """What is left of an owner that was killed, or whose machine hangs."""
    claim = Claim(objects)
    claim._ended.set()
    claim._thread.join()
    objects.write(f"{claims.PREFIX}{claim._number}", json.dumps({**owner, "free": False}).encode())
    return claim


def test_one_that_gives_no_sign_of_life_is_followed_and_writes_nothing_more(objects):
    dead, begun = silent(objects, machine="elsewhere", process=1), time.monotonic()
    following = Claim(objects)
    assert 1.0 <= time.monotonic() - begun < 4
    following.check()
    with pytest.raises(StoreFailed, match="another run took over"):
        dead.check()
    following.close()


def test_one_that_slept_through_two_others_writes_nothing_more(objects):
    """The number after its own is gone again by then."""
    asleep = silent(objects, machine="elsewhere", process=1)
    for _ in range(2):
        Claim(objects).close()
    assert objects.numbers(claims.PREFIX) == [3]
    with pytest.raises(StoreFailed, match="another run took over"):
        asleep.check()


def test_a_process_that_died_on_this_machine_is_not_waited_for(objects):
    silent(objects, machine=claims._machine(), process=2**22 + 1)
    begun = time.monotonic()
    Claim(objects).close()
    assert time.monotonic() - begun < 0.9


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b'{"free": 1'])
def test_a_claim_that_nobody_can_read_counts_as_held_until_it_is_silent(text, objects):
    objects.write(f"{claims.PREFIX}7", text)
    Claim(objects).close()
    assert objects.numbers(claims.PREFIX) == [8]


def test_of_many_that_ask_at_once_one_has_it_at_a_time(objects):
    inside, most, errors = [], [], []

    def work():
        try:
            claim = Claim(objects)
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.05)
            claim.check()
            inside.pop()
            claim.close()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and most == [1] * 4 and objects.numbers(claims.PREFIX) == [4]
