"""What an exported adapter carries: the base's tokenizer, and a card that says what it is, from what, and how it scored."""

import hashlib
import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from transformers import AutoTokenizer

from panacea_jax.models.peft import read_notes
from panacea_jax.stages.card import CARD, write_card, write_scores
from panacea_jax.sums import sha256_model
from panacea_jax.workdir import read_manifest
from tests import runs
from tests.runs import rewrite_manifest


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return runs.finished_run(tmp_path_factory)


def card(folder):
    return (folder / CARD).read_text("utf-8")


def rows(text):
    """Cells of every table's lines, by the first two."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return {tuple(line[:2]): line[2] for line in lines}


@pytest.mark.parametrize("stage", ["align", "finetune", "heal"])
def test_an_adapter_carries_the_tokenizer_of_its_base(finished, stage):
    place, workdir = finished
    ours, theirs = (AutoTokenizer.from_pretrained(f) for f in (workdir / stage / "adapter", place.base))
    text = "w1 w2  sure"
    assert ours(text)["input_ids"] == theirs(text)["input_ids"] and len(ours) == len(theirs)
    assert ours.chat_template == theirs.chat_template and ours.chat_template
    assert not (workdir / stage / "adapter" / "config.json").exists()


def test_the_card_says_what_the_adapter_is(finished):
    _, workdir = finished
    text = card(workdir / "finetune" / "adapter")
    assert "# base, finetune with Panacea" in text
    assert "A LoRA adapter (r 2, α 4, on q_proj, v_proj, down_proj) for `base`" in text
    assert f"{runs.STEPS} steps, defence panacea (rho {runs.RHO}, lam 0.3" in text
    assert "**ε is applied**" in text and read_notes(workdir / "finetune" / "adapter")["epsilon"] == "applied"
    assert "ε" not in card(workdir / "align" / "adapter").partition("## Made from")[0]


def test_the_card_names_its_inputs_by_hash_and_without_folders(finished):
    place, workdir = finished
    text = card(workdir / "finetune" / "adapter")
    found = rows(text)
    for name in ("user", "attack", "harmful"):
        digest = hashlib.sha256((place.root / f"{name}.jsonl").read_bytes()).hexdigest()
        assert found[f"{name} records", f"`pairs@{name}.jsonl`"] == f"`{digest}`"
    assert found["base", "`base`"] == f"`{sha256_model(place.base)}`"
    assert found["adapter that it went on from", "`adapter`"] == f"`{sha256_model(workdir / 'align' / 'adapter')}`"
    assert str(place.root) not in text and str(workdir) not in text


def test_the_hub_can_read_the_card(finished, tmp_path):
    _, workdir = finished
    data = ModelCard.load(workdir / "finetune" / "adapter" / CARD).data
    assert (data.library_name, data.tags, data.base_model, data.license) == ("peft", ["panacea_jax"], None, None)
    manifest = read_manifest(workdir / "finetune")
    write_card(tmp_path, "finetune", manifest["config"], manifest["inputs"], manifest["outcome"] | {"base": "owner/name"})
    data = ModelCard.load(tmp_path / CARD).data
    assert data.base_model == "owner/name" and data.library_name == "transformers"  # no adapter there: all weights


def test_the_scores_are_in_the_card_of_the_weights_that_answered(finished):
    _, workdir = finished
    scores = json.loads((workdir / "scores.json").read_text())
    found = rows(card(workdir / "heal" / "adapter"))
    low, high = scores["ci95"]["hs"]
    assert found["HS, harmful answers to harmful requests (lower is better)", f"{scores['hs']:.1f}"] == f"{low:.1f} to {high:.1f}"
    low, high = scores["ci95"]["fa"]["pairs"]
    assert found["FA, right answers to `pairs`", f"{scores['fa']['pairs']:.1f}"] == f"{low:.1f} to {high:.1f}"
    assert "`advbench` (5), `pairs` (6), `xstest` (5)" in card(workdir / "heal" / "adapter")
    assert "Not measured yet." in card(workdir / "finetune" / "adapter")


@pytest.fixture
def scored(finished, tmp_path):
    """A work directory whose answers are by a copy of the adapter; the copy's folder, and the scores."""
    _, workdir = finished
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for file in (workdir / "finetune" / "adapter").iterdir():
        (adapter / file.name).write_bytes(file.read_bytes())
    manifest = read_manifest(workdir / "generations")
    manifest["config"]["adapter"] = str(adapter)
    manifest["inputs"][str(adapter)] = sha256_model(adapter)
    (tmp_path / "generations").mkdir()
    (tmp_path / "generations" / "manifest.json").write_text(json.dumps(manifest))
    rewrite_manifest(tmp_path / "generations")
    return tmp_path, adapter, json.loads((workdir / "scores.json").read_text())


def test_words_of_the_users_stay_when_scores_come(scored):
    workdir, adapter, scores = scored
    file = adapter / CARD
    file.write_text("license: mit\n" + file.read_text("utf-8") + "My own words.\n", encoding="utf-8")
    before = file.read_text("utf-8")
    write_scores(workdir, scores)
    after = file.read_text("utf-8")
    assert after != before and after.startswith("license: mit\n") and after.endswith("My own words.\n")
    write_scores(workdir, scores | {"hs": 12.5})
    again = file.read_text("utf-8")
    assert "| 12.5 |" in again and again.count("| percent |") == 1
    assert [s.partition("<!-- scores -->")[0] for s in (before, after, again)].count(before.partition("<!-- scores -->")[0]) == 3


@pytest.mark.parametrize("change", ["weights", "card", "marks"])
def test_scores_of_other_weights_or_in_other_cards_are_left_out(scored, change):
    workdir, adapter, scores = scored
    if change == "weights":
        (adapter / "adapter_config.json").write_text("{}")
    elif change == "card":
        (adapter / CARD).unlink()
    else:
        (adapter / CARD).write_text("A card of somebody else's.\n")
    before = sorted((p.name, p.read_bytes()) for p in Path(adapter).iterdir())
    write_scores(workdir, scores)
    assert before == sorted((p.name, p.read_bytes()) for p in Path(adapter).iterdir())


def test_w_alone_says_so(finished, tmp_path):
    _, workdir = finished
    manifest = read_manifest(workdir / "finetune")
    (tmp_path / "adapter_config.json").write_bytes((workdir / "finetune" / "adapter" / "adapter_config.json").read_bytes())
    write_card(tmp_path, "finetune", manifest["config"], manifest["inputs"], manifest["outcome"], "left out")
    assert "**ε is left out. Do not deploy this**: w alone can be MORE harmful than plain fine-tuning" in card(tmp_path)
