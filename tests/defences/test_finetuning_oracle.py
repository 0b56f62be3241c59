"""Five steps of each regularised fine-tuning equal PyTorch + peft + transformers, from the same base, adapter and batches."""

import numpy as np
import pytest
import torch

from panacea_jax.data.batches import Stream
from panacea_jax.defences import Bds, Ewc, Kl, Ldifs, Lisa, SafeGrad, Vlguard
from panacea_jax.export import epsilon_tensors
from panacea_jax.models.full import full_parameters
from panacea_jax.models.peft import adapter_tensors
from panacea_jax.train.loop import finetune
from panacea_jax.train.optimizer import make_optimizer
from tests import torch_oracle as oracle
from tests.defences.oracles import bds, ewc, kl, ldifs, lisa, safegrad, vlguard
from tests.train import test_oracle

STEPS = 5
LR = 1e-3

setting = (
    test_oracle.setting
)  # a model, its adapter, their folders, a tolerance; in float32 and in float64


def streams():
    """Alignment batches are smaller, and the last of the set is not full."""
    buckets = (32,)
    return {
        "user": Stream("user", test_oracle.examples(1), 4, 0, False, buckets),
        "alignment": Stream("alignment", test_oracle.examples(2, 8), 3, 0, False, buckets, True),
    }


def torch_run(setting, full, rule, **hyper):
    """Trained by the oracle's gradients, clip and AdamW; by PEFT name."""
    model, _, (base, folder), _ = setting
    dtype = getattr(torch, str(model.dtype))
    theirs = oracle.load_full(base, dtype) if full else oracle.load(base, folder, dtype)
    params = oracle.trainable(theirs)
    optimizer = torch.optim.AdamW(params.values(), lr=LR, weight_decay=0.1)
    given = streams()
    for grads in rule(theirs, given["user"], given["alignment"], STEPS, **hyper):
        for p, g in zip(params.values(), grads):
            p.grad = g
        torch.nn.utils.clip_grad_norm_(params.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return oracle.by_peft_name(params)


def our_run(setting, full, defence):
    model, params, _, _ = setting
    if full:
        model, params = full_parameters(model)
    return finetune(
        model, params, defence, streams(), optimizer=make_optimizer(LR), steps=STEPS, log_every=1
    )


def names(params, full):
    return epsilon_tensors(params) if full else adapter_tensors(params)


def largest(ours, theirs):
    assert ours.keys() == theirs.keys()
    return max(float(np.linalg.norm(ours[n] - x) / np.linalg.norm(x)) for n, x in theirs.items())


def compare(setting, full, defence, rule, **hyper):
    """Every tensor agrees, and is not what plain fine-tuning gives."""
    *_, tolerance = setting
    ours = our_run(setting, full, defence)
    moved = names(ours.params, full)
    theirs = torch_run(setting, full, rule, **hyper)
    error = largest(moved, theirs)
    print(f"{type(defence).__name__} {tolerance:.0e} full={full}: {error:.1e}")
    assert error < tolerance
    plain = torch_run(setting, full, vlguard.gradients, lam=0)
    assert largest(moved, plain) > max(1e-3, 10 * tolerance)
    return ours


both = pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])


@both
def test_lisa(setting, full):
    """Alignment, user, user, alignment, user; the term begins in the middle of a turn."""
    defence = Lisa(rho=20.0, alignment_steps=1, finetune_steps=2, warmup_steps=2)
    compare(setting, full, defence, lisa.gradients, rho=20.0, k1=1, k2=2, warmup=2)


@both
def test_ldifs_as_in_the_public_code(setting, full):
    """The gate opens for all layers at first, and shuts for some."""
    counted: list[int] = []
    rho = 0.01 if full else 0.5  # all weights drift further at the same rate
    defence = Ldifs(rho=rho, gate=0.1)
    compare(setting, full, defence, ldifs.gradients, rho=rho, gate=0.1, counted=counted)
    assert counted[0] == 3 and any(0 < n < 3 for n in counted), counted


def test_ldifs_without_a_gate(setting):
    compare(setting, False, Ldifs(rho=500.0, gate=0), ldifs.gradients, rho=500.0)


@both
def test_ewc(setting, full):
    ours = compare(setting, full, Ewc(lam=1e4), ewc.gradients, lam=1e4)
    model, _, (base, folder), tolerance = setting
    dtype = getattr(torch, str(model.dtype))
    theirs = oracle.load_full(base, dtype) if full else oracle.load(base, folder, dtype)
    fisher = dict(zip(oracle.trainable(theirs), ewc.fisher(theirs, streams()["alignment"])))
    assert largest(names(ours.state.fisher, full), oracle.by_peft_name(fisher)) < 10 * tolerance


@both
def test_kl(setting, full):
    compare(setting, full, Kl(lam=20.0), kl.gradients, lam=20.0)


@both
def test_vlguard_sum(setting, full):
    compare(setting, full, Vlguard(mode="sum", lam=0.7), vlguard.gradients, lam=0.7)


@both
def test_safegrad(setting, full):
    """The first step, at w₀, has nothing to project; later ones have."""
    conflicts: list[bool] = []
    compare(setting, full, SafeGrad(rho=3.0), safegrad.gradients, rho=3.0, conflicts=conflicts)
    assert any(conflicts) and not all(conflicts), conflicts


@both
@pytest.mark.parametrize("weighting", ["softmax", "sigmoid"])
def test_bds(setting, full, weighting):
    """The weights too, of which some fall and by softmax others rise."""
    learnt: list[np.ndarray] = []
    sigmoid = weighting == "sigmoid"
    defence = Bds(logit_rate=0.1, weighting=weighting)
    ours = compare(setting, full, defence, bds.gradients, rate=0.1, sigmoid=sigmoid, learnt=learnt)
    assert learnt[-1].min() < -0.1 and (learnt[-1].max() > 0.1) is not sigmoid
    assert np.linalg.norm(ours.state.logits - learnt[-1]) < setting[3] * np.linalg.norm(learnt[-1])
