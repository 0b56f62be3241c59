"""The command ``generate``: what a kill leaves, several adapters, sampling, and the manifest."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from panacea_jax.data.template import Template
from panacea_jax.errors import InputError
from panacea_jax.generate.ends import eos_ids
from panacea_jax.records.journal import Answers
from tests.runs import finished_run, make_place, panacea, rewrite_manifest

SETS = ("advbench", "pairs", "xstest")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return finished_run(tmp_path_factory)


def generate(run, workdir, *flags, stage="heal"):
    """``panacea generate`` with the adapter of a stage; the bytes of every set."""
    chosen = [f"--config.generate.adapter={run[1] / stage / 'adapter'}"] if stage else []
    assert panacea("generate", *run[0].flags(*chosen, *flags), f"--workdir={workdir}") == 0
    return answers(workdir)


def answers(workdir):
    folder = workdir / "generations"
    assert {p.name for p in folder.iterdir()} == {"manifest.json", *(f"{s}.jsonl" for s in SETS)}
    return {name: (folder / f"{name}.jsonl").read_bytes() for name in SETS}


def decoding(workdir):
    manifest = json.loads((workdir / "generations" / "manifest.json").read_text())
    return manifest["config"]["decoding"]


def lines(content):
    return [json.loads(line) for line in content.decode().splitlines()]


SAMPLED = ("--config.generate.temperature=1", "--config.generate.top_p=0.9")


def test_tokens_count_the_end_token(run, tmp_path):
    """Words of the answer, its end token, and special tokens, which are not in the text."""
    found = generate(run, tmp_path, *SAMPLED, "--config.generate.max_new_tokens=40")
    rows = [row for content in found.values() for row in lines(content)]
    assert {row["finished"] for row in rows} == {True, False}
    for row in rows:
        assert len(row["response"].split()) + row["finished"] <= row["tokens"] <= 40
        assert row["finished"] or row["tokens"] == 40
    assert any(
        r["finished"] and r["response"] and r["tokens"] == len(r["response"].split()) + 1
        for r in rows
    )


def test_killed_again_and_again(run, tmp_path, monkeypatch):
    """Sampled with two rows, killed after every second answer: the same bytes as in one go."""
    flags = (*SAMPLED, "--config.generate.batch_size=2", "--config.generate.max_new_tokens=20")
    whole = generate(run, tmp_path / "whole", *flags)
    put, left = Answers.put, [0]

    def put_or_die(self, i, line):
        left[0] -= 1
        if left[0] < 0:
            raise SystemExit
        put(self, i, line)

    monkeypatch.setattr(Answers, "put", put_or_die)
    found, kills = None, 0
    while found is None:
        left[0] = 2
        try:
            found = generate(run, tmp_path / "killed", *flags)
        except SystemExit:
            kills += 1
    assert found == whole and kills >= 7


def test_draws_follow_the_seed(run, tmp_path):
    flags = (*SAMPLED, "--config.generate.max_new_tokens=9")
    first = generate(run, tmp_path / "a", *flags)
    assert generate(run, tmp_path / "b", "--config.generate.seed=0", *flags) == first  # config.seed
    assert generate(run, tmp_path / "c", "--config.generate.seed=1", *flags) != first
    assert decoding(tmp_path / "c") == {
        "max_new_tokens": 9, "cache_dtype": "auto", "merge": False,
        "temperature": 1.0, "top_p": 0.9, "seed": 1,
    }  # fmt: skip


def test_several_adapters_in_one_go(run, tmp_path):
    folders = {name: run[1] / name / "adapter" for name in ("align", "finetune", "heal")}
    named = tuple(f"{name}={folder}" for name, folder in folders.items())
    flags = [f"--config.generate.adapters={named}", "--config.generate.max_new_tokens=12"]
    assert panacea("generate", *run[0].flags(*flags), f"--workdir={tmp_path / 'all'}") == 0
    alone = {}
    for name in folders:
        alone[name] = generate(run, tmp_path / name, flags[1], stage=name)
        assert answers(tmp_path / "all" / name) == alone[name]
    assert alone["align"] != alone["heal"]
    assert panacea("judge", *run[0].flags(), f"--workdir={tmp_path / 'all' / 'heal'}") == 0
    # One that is missing is made without the others.
    folder = tmp_path / "all" / "finetune" / "generations"
    rewrite_manifest(folder, status="running")
    (folder / "pairs.jsonl").unlink()
    assert panacea("generate", *run[0].flags(*flags), f"--workdir={tmp_path / 'all'}") == 0
    assert answers(tmp_path / "all" / "finetune") == alone["finetune"]


def test_merged_or_applied_on_the_fly(run, tmp_path):
    merged = generate(run, tmp_path / "merged", "--config.generate.merge=True")
    assert merged == generate(run, tmp_path / "applied")
    assert decoding(tmp_path / "merged")["merge"] is True
    assert merged != generate(run, tmp_path / "base", "--config.generate.adapter=none", stage=None)


def test_int8_cache(run, tmp_path):
    exact = generate(run, tmp_path / "exact")
    rounded = generate(run, tmp_path / "int8", "--config.generate.cache_dtype=int8")
    pairs = [(a, b) for s in SETS for a, b in zip(lines(exact[s]), lines(rounded[s]))]
    assert sum(a["response"] == b["response"] for a, b in pairs) >= 0.8 * len(pairs)
    assert decoding(tmp_path / "int8")["cache_dtype"] == "int8"


def test_a_base_in_other_numbers_does_not_go_on_with_the_answers(run, tmp_path, capsys):
    """A quantised base answers otherwise: what is there is neither skipped as done nor added to."""
    before = generate(run, tmp_path)
    manifest = json.loads((tmp_path / "generations" / "manifest.json").read_text())
    assert manifest["config"]["model"].keys() == {"path", "dtype"}  # as ever where it is not quantised
    given = run[0].flags(f"--config.generate.adapter={run[1] / 'heal' / 'adapter'}", "--config.model.quantization=nf4")
    for status in ("done", "running"):
        rewrite_manifest(tmp_path / "generations", status=status)
        assert panacea("generate", *given, f"--workdir={tmp_path}") == 2
        assert "model.quantization: None there, 'nf4' now" in capsys.readouterr().err
    assert answers(tmp_path) == before


def test_what_is_not_done_is_not_answered_for(run, tmp_path, capsys):
    """Neither its start nor what it had exported; and it is not healed."""
    for name in ("align", "finetune"):
        shutil.copytree(run[1] / name, tmp_path / name)
    rewrite_manifest(tmp_path / "finetune", status="running")
    for exported in (True, False):
        if not exported:
            shutil.rmtree(tmp_path / "finetune" / "adapter")
        for command in (["generate"], ["perplexity"], ["heal", "--config.defence.name=random_perturbation"]):
            assert panacea(command[0], *run[0].flags(*command[1:]), f"--workdir={tmp_path}") == 2
            assert f"{tmp_path / 'finetune'}: not finished yet; run `panacea finetune` again" in capsys.readouterr().err
    assert {p.name for p in tmp_path.iterdir()} == {"align", "finetune"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("adapters=('a=x', 'a=y')",), "the name is there twice"),
        (("adapters=('a',)",), "write NAME=FOLDER"),
        (("adapters=('../a=x',)",), "write NAME=FOLDER"),
        (("adapters=('a=x',)", "adapter=x"), "generate.adapters is set too"),
        (("adapters=('a=x',)", "merge=True"), "cannot be merged"),
        (("adapters=('a=nowhere',)",), "a=nowhere: no such folder"),
    ],
)
def test_bad_adapters(run, tmp_path, capsys, flags, message):
    given = run[0].flags(*(f"--config.generate.{flag}" for flag in flags))
    assert panacea("generate", *given, f"--workdir={tmp_path / 'new'}") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------- where an answer ends


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({"config.json": {"eos_token_id": 5}}, [1, 5]),
        ({"config.json": {"eos_token_id": [1, 7, 5]}}, [1, 5, 7]),
        ({"config.json": {"eos_token_id": None}}, [1]),
        ({"config.json": {}}, [1]),
        ({"config.json": {"text_config": {"eos_token_id": [1, 106]}}}, [1, 106]),
        ({"config.json": {"eos_token_id": [8]}, "generation_config.json": {"eos_token_id": 9}}, [1, 9]),
        ({"config.json": {"eos_token_id": 8}, "generation_config.json": {}}, [1]),
        ({"config.json": {"eos_token_id": "</s>"}}, "config.json: eos_token_id = '</s>': must be an id"),
        ({"config.json": {"eos_token_id": [1, None]}}, "config.json: eos_token_id = "),
        ({"config.json": {}, "generation_config.json": {"eos_token_id": True}}, "generation_config.json: eos_token_id"),
        ({"config.json": {}, "generation_config.json": [2]}, "generation_config.json: not a JSON object"),
    ],
)  # fmt: skip
def test_end_ids_as_they_are_found(files, wanted, tmp_path):
    """generation_config.json decides if there is one, else config.json; the tokenizer's is always among them."""
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    template = Template("alpaca", SimpleNamespace(eos_token_id=1, added_tokens_decoder={}))
    if isinstance(wanted, list):
        assert eos_ids(template, tmp_path) == wanted
    else:
        with pytest.raises(InputError, match=wanted):
            eos_ids(template, tmp_path)


@pytest.mark.parametrize("listed", [False, True])
def test_answers_end_where_transformers_ends_them(listed, tmp_path):
    """The end id stands in config.json alone."""
    place = make_place(tmp_path / "place")
    (place.base / "generation_config.json").unlink()
    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(place.base), AutoTokenizer.from_pretrained(place.base)  # fmt: skip
    record = json.loads((place.root / "test.jsonl").read_text().splitlines()[0])
    turns = [{"role": "user", "content": record["instruction"]}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt").input_ids

    def continued(model):
        out = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0, attention_mask=torch.ones_like(ids))  # fmt: skip
        return out[0, ids.shape[1] :].tolist()

    free = continued(theirs)
    end = next(i for i in free[1:] if i != free[0])  # one that it says, not as its first word
    path = place.base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [1, end] if listed else end}))  # fmt: skip
    wanted = continued(AutoModelForCausalLM.from_pretrained(place.base))
    assert wanted[-1] == end and len(wanted) < 8
    flags = place.flags(f"--config.eval.tasks=pairs@{place.root}/test.jsonl", "--config.generate.max_new_tokens=8")  # fmt: skip
    assert panacea("generate", *flags, f"--workdir={tmp_path / 'w'}") == 0
    line = lines((tmp_path / "w" / "generations" / "pairs.jsonl").read_bytes())[0]
    assert line["finished"] and line["tokens"] == len(wanted)
    assert line["response"] == tokenizer.decode(wanted[:-1])
