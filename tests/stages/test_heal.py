"""Several methods on one finished model, by the command line: table, export, what is held out, and going on after a kill."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from panacea_jax.config import get_config
from panacea_jax.defences import Ascent
from panacea_jax.healing import methods, table
from panacea_jax.models import lora
from panacea_jax.models.model import load
from panacea_jax.models.peft import save_adapter
from panacea_jax.stages import heal as stage
from panacea_jax.stages.held_out import asked_in, fingerprint_of, held_out_sets
from panacea_jax.stages.lineage import named
from panacea_jax.stages.streams import stage_inputs, stage_records
from tests.runs import ADAPTED, make_place, panacea
from tests.tiny import write_pairs

METHODS = ("ascent:rho=auto", "ascent:rho=0.5,steps=3,keep=('user',)", "realign:steps=2,benign_ratio=0.0", "realign", "safelora")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """(place, a finished adapter)."""
    place = make_place(tmp_path_factory.mktemp("place"))
    model = load(place.base, dtype="float32")
    fresh = lora.init(model, 2, 4, ADAPTED, key=jax.random.key(0))
    noise = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(jax.random.key(x.size), x.shape), fresh)
    save_adapter(noise, place.root / "adapter", str(place.base))
    return place, place.root / "adapter"


def flags(place, adapter, *more, methods=METHODS):
    return place.flags(
        f"--config.lora.init_from={adapter}", f"--config.heal.methods={methods!r}", "--config.data.attack=",
        "--config.defence.name=sft", "--config.heal.new_tokens=4", "--config.heal.held_out=0.4", *more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def healed(adapter, tmp_path_factory):
    """(flags, work directory)."""
    workdir = tmp_path_factory.mktemp("heal")
    given = flags(*adapter)
    assert panacea("heal", *given, f"--workdir={workdir}") == 0
    return given, workdir


def test_every_method_has_a_line(healed):
    _, workdir = healed
    found = json.loads((workdir / "heal" / "heal.json").read_text())
    rows = {row["method"]: row for row in found["rows"]}
    assert next(iter(rows)) == table.UNTREATED and set(METHODS) <= set(rows)
    assert rows["realign"]["left_out"] == "needs benign records"
    assert rows["safelora"]["left_out"] == "needs an unaligned base"
    assert found["records"] == {"pairs:harmful": 2, "pairs": 4}
    for name, row in rows.items():
        if not row["left_out"]:
            counted = {figure: share["n"] for figure, share in row["figures"].items()}
            assert counted == {"hs": 2, "hs_plus": 2, "fa": 4, "coherence": 6}, name
            assert name != table.UNTREATED or row["change"] == 0
    assert 0 < rows[METHODS[1]]["change"] <= 0.5 * (1 + 1e-5)
    assert found["best"] in rows
    text = (workdir / "heal" / "heal.md").read_text()
    assert all(f"| {name} |" in text for name in rows) and "left out: needs benign records" in text


def test_noise_of_the_ascents_norm_is_a_line_of_its_own(healed):
    rows = {row["method"]: row["change"] for row in json.loads((healed[1] / "heal" / "heal.json").read_text())["rows"]}
    first = next(change for name, change in rows.items() if name.startswith("ascent") and change > 0)
    [noise] = [change for name, change in rows.items() if name.startswith("random_perturbation")]
    assert noise == pytest.approx(first, rel=1e-4)


def test_what_is_exported_is_the_best(adapter, healed):
    _, workdir = healed
    best = json.loads((workdir / "heal" / "heal.json").read_text())["best"]
    source = adapter[1] if best == table.UNTREATED else workdir / "heal" / stage.slug(best) / "heal" / "adapter"
    ours, theirs = (load_file(f / "adapter_model.safetensors") for f in (workdir / "heal" / "adapter", source))
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        np.testing.assert_array_equal(x, theirs[name])


def test_nothing_that_is_held_out_is_given_to_a_method(healed):
    """Of 7 harmful records 2 are held out, of 12 of the user 4."""
    _, workdir = healed
    for name, counts in {
        METHODS[0]: {"harmful": 5}, METHODS[1]: {"harmful": 5, "user": 8},
    }.items():  # fmt: skip
        manifest = json.loads((workdir / "heal" / stage.slug(name) / "heal" / "manifest.json").read_text())
        assert manifest["outcome"]["records"] == counts
        assert "held-out records" in manifest["inputs"]
    answers = [json.loads(x) for x in (workdir / "heal" / stage.slug(METHODS[0]) / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 6 and all("response" in line for line in answers)


def test_the_radius_has_its_curve(healed):
    folder = healed[1] / "heal" / stage.slug(METHODS[0]) / "heal"
    curve = json.loads((folder / "radius.json").read_text())
    norm = json.loads((folder / "manifest.json").read_text())["outcome"]["report"]["norm_epsilon"]
    assert norm == pytest.approx(curve["radius"], rel=1e-5)
    assert (folder / "radius.png").is_file()


def test_again_does_nothing(healed, capsys):
    given, workdir = healed
    assert panacea("heal", *given, f"--workdir={workdir}") == 0
    assert "done already, skipped" in capsys.readouterr().err


def test_a_kill_before_the_table_costs_the_answers_alone(adapter, tmp_path, monkeypatch):
    few = ("ascent:rho=0.5", "random_prune")
    given = flags(*adapter, methods=few)
    with monkeypatch.context() as patch:
        patch.setattr(stage, "answer", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert panacea("heal", *given, f"--workdir={tmp_path}") == 130
    made = {f: f.stat().st_mtime_ns for f in (tmp_path / "heal").glob("*/heal/adapter/adapter_*")}
    assert len(made) == 6  # both, and the noise
    assert panacea("heal", *given, f"--workdir={tmp_path}") == 0
    assert made == {f: f.stat().st_mtime_ns for f in made}
    rows = json.loads((tmp_path / "heal" / "heal.json").read_text())["rows"]
    assert [row["method"] for row in rows] == [table.UNTREATED, *few, "random_perturbation:rho=0.5"]
    assert all(row["seconds"] is not None for row in rows[1:])


def test_one_method_alone_chooses_its_radius_too(adapter, tmp_path):
    given = flags(*adapter, "--config.defence.name=ascent", methods=())
    assert panacea("heal", *given, f"--workdir={tmp_path}") == 0
    assert (tmp_path / "heal" / "radius.json").is_file()
    assert (tmp_path / "heal" / "adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "heal" / "epsilon.safetensors").is_file()


def test_a_merged_folder(adapter, tmp_path):
    """All weights of a model, each method's in a folder of its own; the best is a model."""
    place, _ = adapter
    full = "--config.train.full_parameters=True"
    given = flags(place, "", full, "--config.heal.held_out=0.3", methods=("ascent:rho=0.2", "safelora:base=x"))
    assert panacea("heal", *given, f"--workdir={tmp_path}") == 0
    rows = {row["method"]: row for row in json.loads((tmp_path / "heal" / "heal.json").read_text())["rows"]}
    assert rows["ascent:rho=0.2"]["change"] == pytest.approx(0.2, rel=1e-3)
    assert "leaves none" in rows["safelora:base=x"]["left_out"]
    assert (tmp_path / "heal" / "model" / "config.json").is_file()


# ---- what is held out


def config(place, **values):
    made = get_config()
    made.update_from_flattened_dict({
        "data.harmful": place.spec("harmful"), "data.user": place.spec("user"), "data.alignment": place.spec("alignment"),
        "heal.held_out": 0.3, **{k.replace("__", "."): v for k, v in values.items()},
    })  # fmt: skip
    return made


def sets(made, start=None):
    return {s.task: len(s.records) for s in held_out_sets(made, start or named(made))}


def test_records_that_fine_tuning_learnt_are_not_held_out(tmp_path):
    place = make_place(tmp_path)
    made = config(place)
    assert sets(made) == {"pairs:harmful": 2, "pairs": 3}
    elsewhere = named(made)
    attacked = {"data__attack": place.spec("attack"), "data__poison_ratio": 0.25}
    assert sets(config(place, **attacked)) == {"pairs:harmful": 2, "pairs": 3}
    assert sets(made, elsewhere.__class__("base", "WORKDIR/finetune/adapter")) == {"pairs:harmful": 2}
    assert sets(config(place, **attacked, data__num_examples=8)) == {"pairs:harmful": 2, "pairs": 6}
    assert sets(config(place, **(attacked | {"data__poison_ratio": 0.0}))) == {"pairs:harmful": 2}
    assert sets(config(place, heal__num_held_out=1)) == {"pairs:harmful": 1, "pairs": 1}


def test_sets_that_are_named_take_the_place_of_all(tmp_path):
    place = make_place(tmp_path)
    made = config(place, heal__sets=(place.spec("goals"), place.spec("safe"), f"pairs@{tmp_path / 'test.jsonl'}"), heal__num_held_out=4)
    assert sets(made) == {"advbench": 4, "xstest": 4, "pairs": 4}


def test_a_right_answer_that_was_mended_makes_another_set(tmp_path):
    """FA and the range of radii come from it."""
    place, path = make_place(tmp_path), tmp_path / "test.jsonl"
    made = config(place, heal__sets=(place.spec("goals"), f"pairs@{path}"))
    before = fingerprint_of(held_out_sets(made, named(made)))
    assert fingerprint_of(held_out_sets(made, named(made))) == before
    first, *others = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps(json.loads(first) | {"output": "w1"}), *others]) + "\n")
    assert fingerprint_of(held_out_sets(made, named(made))) != before


def test_no_stream_asks_what_is_held_out(tmp_path):
    """Also where another set asks the same: refusals to held-out harmful prompts would teach the answers."""
    place = make_place(tmp_path)
    write_pairs(tmp_path / "alignment.jsonl", 7, seed=2)  # the harmful prompts
    made = config(place)
    apart = asked_in(held_out_sets(made, named(made)))
    assert len(apart) == 5
    method = Ascent(rho=1.0, keep=("user", "alignment"))
    found = stage_records(made, "heal", method, apart)
    assert {name: len(source.records) for name, source in found.items()} == {"harmful": 5, "user": 9, "alignment": 5}
    assert not {(r.instruction, r.input) for source in found.values() for r in source.records} & apart
    whole = stage_records(made, "heal", method)
    assert {name: len(source.records) for name, source in whole.items()} == {"harmful": 7, "user": 12, "alignment": 7}
    assert set(stage_inputs(made, "heal", method)) == {place.spec(name) for name in ("harmful", "user", "alignment")}


def test_what_the_data_allows():
    text = methods.allowed(["harmful"])
    assert "With harmful records there are ascent, random_perturbation, antidote" in text
    assert "realign needs refusals and benign records" in text and "safelora needs an unaligned base" in text
    assert "realign" in methods.allowed(["harmful", "alignment", "benign"]).partition(";")[0]
    assert methods.allowed([]).startswith("Without any data there are random_perturbation")


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("heal.methods=('panacea',)", "config.heal.methods = 'panacea': name one method of the stage heal"),
        ("heal.methods=('ascent:rho=car',)", "config.heal.methods: 'ascent:rho=car': config.defence.rho = 'car'"),
        ("heal.methods=('ascent+panacea',)", "config.heal.methods = 'ascent+panacea'"),
        ("heal.held_out=1.5", "config.heal.held_out = 1.5"),
        ("heal.new_tokens=0", "config.heal.new_tokens = 0"),
        ("budget.fa=-1.0", "config.budget.fa = -1.0"),
        ("data.harmful=", "config.data.harmful are not set: no harmful prompts are held out"),
        ("heal.sets=('sst2@no.jsonl',)", "config.heal.sets: "),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(adapter, tmp_path, capsys, flag, said):
    assert panacea("heal", *flags(*adapter, f"--config.{flag}"), f"--workdir={tmp_path / 'new'}") == 2
    [line] = [x for x in capsys.readouterr().err.splitlines() if x.startswith("panacea: ")]
    assert said in line
    assert not (tmp_path / "new").exists()


def test_seconds_and_norms_are_of_this_tree(adapter, healed):
    """The change of the multi-step ascent is the distance of the exported factors from those it began with."""
    _, workdir = healed
    ours = load_file(workdir / "heal" / stage.slug(METHODS[1]) / "heal" / "adapter" / "adapter_model.safetensors")
    before = load_file(adapter[1] / "adapter_model.safetensors")
    distance = np.sqrt(sum(np.sum((ours[n].astype(np.float64) - before[n]) ** 2) for n in ours))
    rows = {row["method"]: row for row in json.loads((workdir / "heal" / "heal.json").read_text())["rows"]}
    assert rows[METHODS[1]]["change"] == pytest.approx(distance, rel=1e-5)
    assert rows[METHODS[1]]["seconds"] > 0
