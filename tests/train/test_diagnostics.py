"""Each warning is given when its signature shows, once, and not before."""

import json

import numpy as np
import pytest

from panacea_jax.train.diagnostics import WINDOW, Diagnostics

HEALTHY = {"loss": 1.0, "term_ratio": 0.3, "rho_displacement": 0.1, "cos_gh": 0.0, "epsilon_cosine": 0.8,
           "poison_estimate": 0.1, "clamped": 0.0}  # fmt: skip


def watch(metrics, steps=WINDOW):
    diagnostics, warnings = Diagnostics(0), []
    for step in range(steps):
        warnings += diagnostics.observe(step, metrics)
    return warnings


def test_a_steered_term_may_be_meant_to_be_inert():
    """By the poison λ goes to 0 without any, and with rho = auto there is none to raise."""
    inert = HEALTHY | {"term_ratio": 0.0}
    [plain], [steered] = watch(inert, WINDOW), watch(inert | {"lam": 0.0, "poison_mean": 0.0}, WINDOW)
    assert plain.endswith("the training term is inert (raise λ or ρ)")
    assert "inert (raise λ or ρ; where λ goes by the poison, as with defence.rho=auto, it is meant to be without any)" in steered


def test_a_healthy_run_is_silent():
    assert watch(HEALTHY, 3 * WINDOW) == []


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"term_ratio": 5e-3}, "inert"),
        ({"rho_displacement": 0.9}, "distance moved"),
        ({"cos_gh": 0.7}, "cos"),
        ({"epsilon_cosine": 0.05}, "turns"),
        ({"poison_estimate": 0.45}, "45%"),
    ],
)
def test_signatures(change, word):
    assert watch(HEALTHY | change, WINDOW - 1) == []  # one noisy step is no finding
    (warning,) = watch(HEALTHY | change, 3 * WINDOW)
    assert word in warning


def test_the_clamp_is_reported_at_once():
    (warning,) = watch(HEALTHY | {"clamped": 1.0}, 2)
    assert "clamp" in warning and warning.startswith("step 0")


def spikes(losses, threshold=8.0):
    diagnostics, found = Diagnostics(0, threshold), []
    for step, loss in enumerate(losses):
        if spike := diagnostics.spike({"loss": loss}):
            found.append((step, spike.told))
        diagnostics.observe(step, {"loss": loss})
    return found


def noisy(steps, seed=0):
    return [2 + 0.2 * x for x in np.random.default_rng(seed).standard_normal(steps)]


def test_a_loss_that_stands_out_is_a_spike():
    """Eight robust standard deviations of noise of 0.2 are 1.6; two of them before change neither median nor scatter much."""
    losses = noisy(100)
    assert spikes(losses) == []
    for at in (40, 60, 61):
        losses[at] = 6.0
    assert spikes(losses) == [(40, True), (60, True), (61, False)]
    assert spikes(losses, threshold=0.0) == []


def test_neither_few_losses_nor_small_ones_tell_a_spike():
    assert spikes([2.0] * 19 + [9.0]) == [] and spikes([2.0] * 20 + [9.0]) == [(20, True)]
    assert spikes([0.001] * 50 + [0.3]) == [] and spikes([0.001] * 50 + [0.45]) == [(50, True)]


def test_a_run_of_spikes_is_told_in_bounds():
    losses = [2.0, 2.0, 2.0, 9.0] * 30
    assert spikes([2.0] * 40 + losses)[-1] == (159, False)
    assert sum(told for _, told in spikes([2.0] * 40 + losses)) == 10


def test_rising_loss():
    diagnostics, warnings = Diagnostics(0), []
    for step in range(2 * WINDOW):
        warnings += diagnostics.observe(step, HEALTHY | {"loss": 1.0 + step / WINDOW})
    assert len(warnings) == 1 and "rose" in warnings[0]


def test_a_resumed_run_warns_as_the_whole_would_have():
    """Of a rise against the loss of the beginning, and of nothing a second time; through JSON, as a checkpoint keeps it."""
    losses = [HEALTHY | {"clamped": 1.0, "loss": 1.0 + step / WINDOW} for step in range(2 * WINDOW)]
    whole = Diagnostics(0)
    wanted = [line for step, metrics in enumerate(losses) for line in whole.observe(step, metrics)]
    assert len(wanted) == 2
    for stop in (1, WINDOW - 10, WINDOW + 1, 2 * WINDOW - 1):
        first, second, found = Diagnostics(0), Diagnostics(0), []
        for step, metrics in enumerate(losses):
            if step == stop:
                second.restore(json.loads(json.dumps(first.state())))
            found += (first if step < stop else second).observe(step, metrics)
        assert found == wanted


def test_nan_is_left_out_of_the_means():
    diagnostics, warnings = Diagnostics(0), []
    for step in range(2 * WINDOW):
        value = float("nan") if step % 2 else 0.7
        warnings += diagnostics.observe(step, HEALTHY | {"cos_gh": value})
    assert len(warnings) == 1


def test_rho_is_held_against_the_distance_in_the_second_half_only():
    diagnostics = Diagnostics(4 * WINDOW)
    steps = [
        step
        for step in range(4 * WINDOW)
        if diagnostics.observe(step, HEALTHY | {"rho_displacement": 0.9})
    ]
    assert steps == [2 * WINDOW]


def test_the_loss_of_alignment_turns_is_not_the_tasks():
    """Lisa: easy alignment batches first, then a harder task, is no rise; a task loss that rises between them is."""
    turns = [{"loss": 0.1, "alignment_state": 1.0}] * WINDOW

    def warnings(*losses):
        diagnostics = Diagnostics(0)
        steps = turns + [{"loss": x, "alignment_state": 0.0} for x in losses]
        return [w for t, m in enumerate(steps) for w in diagnostics.observe(t, m)]

    assert warnings(*[1.0] * WINDOW) == []
    [found] = warnings(*[1.0] * WINDOW, *[2.0] * WINDOW)
    assert "rose" in found
