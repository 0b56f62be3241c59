"""What is waited for is said at once, and again after growing intervals."""

import time

from panacea_jax import waiting as module
from panacea_jax.waiting import waiting


def test_at_once_and_again(monkeypatch, capfd):
    monkeypatch.setattr(module, "AGAIN", 0.1)
    holders = iter(("wug", "blick", "dax", "fep", "zorp"))
    with waiting(lambda: f"the lock of {next(holders)}", 7):
        assert capfd.readouterr().err == "waiting for the lock of wug; 7 s at most\n"
        time.sleep(0.55)
    said = capfd.readouterr().err.splitlines()
    assert said[0] == "waiting for the lock of blick; 7 s at most, 0 s by now"
    assert len(said) == 2  # after 0.1 and 0.3 s, and not yet after 0.7
    time.sleep(0.3)
    assert capfd.readouterr().err == ""


def test_nothing_in_it_acts_on_a_terminal(capfd):
    with waiting(lambda: "\x1b[31mwug", 1):
        pass
    assert "\x1b" not in capfd.readouterr().err
