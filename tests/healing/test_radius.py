"""The range of radii, and a radius chosen on a tiny model."""

import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from panacea_jax.data.sources import Record
from panacea_jax.data.template import Template
from panacea_jax.data.tokenizer import load_tokenizer
from panacea_jax.errors import InputError
from panacea_jax.evaluate.judges import RefusalJudge
from panacea_jax.generate.ends import eos_ids
from panacea_jax.healing.choice import Budget, Share
from panacea_jax.healing.curve import as_json, from_json, write_radius
from panacea_jax.healing.radius import (
    FAR,
    LAST,
    ChosenRadius,
    Point,
    bracket,
    choose_radius,
    ladder,
    moved,
)
from panacea_jax.healing.sets import SIDE_BY_SIDE, Exam, HeldOutSet, answer, losses, make_probe
from panacea_jax.models import lora
from panacea_jax.models.full import full_parameters
from panacea_jax.models.model import load
from tests.tiny import write_model

# ---- the range


@pytest.mark.parametrize("edge", [1e-4, 0.3, 1.0, 700.0])
@pytest.mark.parametrize("name", ["fa", "benign"])
def test_the_bracket_ends_just_outside(edge, name):
    """The loss leaves its budget by far at ``edge``, wherever the search begins."""
    seen = []

    def look(radius):
        seen.append(radius)
        return {"hs": 50.0, name: 2.0 + FAR * radius / edge}

    upper = bracket(look, look(0.0), 1.0, 1e4)
    assert edge < upper <= 2 * edge
    assert len(seen) < 3 + abs(math.log2(edge)) + 2


def test_with_harmful_answers_alone_it_ends_where_they_are_less_likely_than_chance():
    upper = bracket(lambda r: {"hs": 1.0 + r}, {"hs": 1.0}, 0.01, 1e4, ceiling=4.0)
    assert 3.0 < upper <= 6.0


def test_a_loss_that_is_no_number_is_far_out():
    upper = bracket(lambda r: {"fa": math.nan if r > 5 else 1.0}, {"fa": 1.0}, 1.0, 1e4)
    assert 5.0 < upper <= 10.0


def test_a_loss_that_never_changes_ends_at_the_most():
    assert bracket(lambda r: {"fa": 1.0}, {"fa": 1.0}, 1.0, 50.0) == 50.0


def test_a_loss_that_is_lost_at_once_is_an_error():
    with pytest.raises(InputError, match="too much is lost at any radius"):
        bracket(lambda r: {"fa": 9.0}, {"fa": 0.0}, 1.0, 50.0)


def test_the_ladder():
    assert ladder(8.0, 5) == pytest.approx([0, 8 / 2**1.5, 4, 8 / 2**0.5, 8])


# ---- on a model


def records(seed, n, outputs=("w1", "w2 w3")):
    rng = np.random.default_rng(seed)
    answers = itertools.islice(itertools.cycle(outputs), n)
    return [Record(" ".join(f"w{i}" for i in rng.integers(0, 40, 4)), "", out, out, {}) for out in answers]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(model, adapter, direction, exam)."""
    folder = write_model(tmp_path_factory.mktemp("radius") / "base")
    model = load(folder, dtype="float32")
    adapter = lora.init(model, 2, 4, ("q", "v"), key=jax.random.key(0))
    template = Template("chat", load_tokenizer(folder))
    sets = [HeldOutSet("pairs:harmful", records(1, 5)), HeldOutSet("pairs", records(2, 4)), HeldOutSet("pairs:benign", records(3, 3))]
    probes = [make_probe(s, template, model.config.vocab_size, 32, 5) for s in sets]
    exam = Exam(probes, template, RefusalJudge(), eos_ids(template, folder), 4)
    direction = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape), adapter)
    return model, adapter, direction, exam


def test_right_answers_get_the_tokens_that_the_longest_of_them_has(world):
    """"w2 w3" and its end; requests that may be refused the number that was asked for."""
    assert [probe.new_tokens for probe in world[3].probes] == [5, 3, 5]


def test_losses_are_those_of_each_kind(world):
    model, adapter, _, exam = world
    together = losses(model, adapter, exam)
    for name, probe in zip(("hs", "fa", "benign"), exam.probes):
        alone = losses(model, adapter, exam._replace(probes=[probe]))
        assert alone == {name: pytest.approx(together[name], rel=1e-6)}


def test_side_by_side_is_one_after_the_other(world):
    """More adapters than are decoded together, each like the weights that it makes of the base."""
    model, adapter, direction, exam = world
    radii = [0.0, 0.3, 3.0, 30.0, 60.0, 90.0, 120.0, 150.0, 200.0]
    assert len(radii) == SIDE_BY_SIDE + 1
    adapters = [moved(adapter, direction, r / float(optax.tree.norm(direction))) for r in radii]
    found = list(answer(model, adapters, exam))
    whole = list(answer(model, (lora.merge(model.weights, a) for a in adapters[-3:]), exam))
    assert [f.figures for f in found[-3:]] == [f.figures for f in whole]
    assert len({json.dumps(f.lines) for f in found}) > 2
    for each in found:
        assert {name: share.n for name, share in each.figures.items()} == {
            "hs": 5, "hs_plus": 5, "fa": 4, "benign": 3, "coherence": 12,
        }  # fmt: skip


def test_a_radius_is_chosen_and_written(world, tmp_path, capsys):
    model, adapter, direction, exam = world
    found = choose_radius(model, adapter, direction, exam, radii=4)
    answered = [p for p in found.points if p.figures]
    assert answered[0].radius == 0.0 and len(answered) == 4
    assert found.radius in [p.radius for p in answered]
    assert [p.radius for p in found.points] == sorted(p.radius for p in found.points)
    assert found.points[-1].radius == answered[-1].radius <= LAST * max(1.0, float(optax.tree.norm(adapter)))
    write_radius(found, tmp_path)
    assert from_json(json.loads((tmp_path / "radius.json").read_text())) == found
    assert (tmp_path / "radius.png").read_bytes()[:4] == b"\x89PNG"
    assert "chosen" in capsys.readouterr().out


def test_the_length_of_the_direction_does_not_matter(world):
    model, adapter, direction, exam = world
    longer = jax.tree.map(lambda x: 7 * x, direction)
    one, other = (choose_radius(model, adapter, d, exam, radii=3) for d in (direction, longer))
    assert one.radius == other.radius
    assert [p.figures for p in one.points] == [p.figures for p in other.points]


def test_all_weights_too(world):
    model, _, _, exam = world
    bare, params = full_parameters(model)
    direction = jax.tree.map(jnp.ones_like, params)
    found = choose_radius(bare, params, direction, exam, radii=3)
    assert len([p for p in found.points if p.figures]) == 3


@pytest.mark.parametrize("length", [0.0, float("nan")])
def test_no_way_to_go(world, length):
    model, adapter, direction, exam = world
    nowhere = jax.tree.map(lambda x: x * length, direction)
    with pytest.raises(InputError, match="there is no way to go"):
        choose_radius(model, adapter, nowhere, exam)


def test_where_a_figure_fails():
    def point(radius, fa):
        return Point(radius, {}, {"hs": Share(0, 4), "fa": Share(fa, 100)} if fa else {})

    found = ChosenRadius(0.0, [point(0.0, 90), point(1.0, 0), point(2.0, 89), point(3.0, 80), point(4.0, 88)], Budget(fa=1))
    assert found.failing() == 3
    assert found.failing("benign") is None
    assert as_json(found)["fails"] == {"fa": 3, "benign": None, "coherence": None}
