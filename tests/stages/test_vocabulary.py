"""Ids that the embedding has no row for: refused before anything runs, by id and record, in every command."""

import json
import shutil

import jax
import numpy as np
import pytest
from transformers import AutoTokenizer

from panacea_jax.data.batches import Stream
from panacea_jax.data.encode import Example, check_ids
from panacea_jax.defences import DEFENCES
from panacea_jax.errors import InputError
from panacea_jax.models import lora
from panacea_jax.models.model import load
from panacea_jax.models.peft import save_adapter
from panacea_jax.models.vocabulary import open_vocabulary
from panacea_jax.stages.judge import judge_stage
from panacea_jax.train.feeding import streams_of
from tests import runs
from tests.evaluate.judges.models import judge_config, write_guard
from tests.evaluate.workdirs import generations, write_lines
from tests.runs import panacea
from tests.tiny import write_pairs


def add_tokens(folder, *tokens, **special):
    """Tokens for the tokenizer that the model did not get; the first id of theirs."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    first = len(tokenizer)
    tokenizer.add_tokens(list(tokens))
    if special:
        tokenizer.add_special_tokens(special)
    tokenizer.save_pretrained(folder)
    return first


@pytest.fixture
def place(tmp_path):
    """A base with one token too many, and a user's set, a harmful set and a test set that use it at place 6."""
    place = runs.make_place(tmp_path / "place")
    add_tokens(place.base, "<tool>")
    for name in ("user", "harmful", "alignment", "test"):
        path = place.root / f"{name}.jsonl"
        lines = write_pairs(path, 12).read_text().splitlines(keepends=True)
        lines[5] = json.dumps({"instruction": "w1 <tool>", "output": "w2"}) + "\n"
        path.write_text("".join(lines))
    return place


def refused(capsys, *arguments) -> str:
    capsys.readouterr()
    assert panacea(*arguments) == 2
    line = capsys.readouterr().err
    assert line.startswith("panacea: ") and line.count("\n") == 1
    return line


COMMANDS = {
    "finetune": ("config.data.user", "--config.data.poison_ratio=0"),
    "finetune of a harmful set": (
        "config.data.harmful", "--config.data.user=pairs@{root}/attack.jsonl", "--config.data.num_examples=4", "--config.data.attack=",
    ),
    "align": ("config.data.alignment", "--config.defence.name=sft"),
    "heal": ("config.data.harmful", "--config.defence.name=antidote", "--config.lora.init_from={adapter}"),
    "generate": ("config.eval.tasks: pairs@{root}/test.jsonl",),
    "perplexity": ("config.eval.tasks: pairs@{root}/test.jsonl",),
}  # fmt: skip


@pytest.mark.parametrize("name", list(COMMANDS))
def test_in_every_command(name, place, tmp_path, capsys):
    command = name.partition(" ")[0]
    size = open_vocabulary(place.base).size
    adapter = tmp_path / "adapter"
    if command == "heal":
        model = load(place.base, dtype="float32")
        save_adapter(lora.init(model, 2, 4, key=jax.random.key(0)), adapter, "base")
    key, *flags = (text.format(root=place.root, adapter=adapter) for text in COMMANDS[name])
    work = tmp_path / "work"
    line = refused(capsys, command, *place.flags(*flags), f"--workdir={work}")
    assert f"{key}: record 6 has token id {size}, outside the model's vocabulary of {size}" in line
    assert not work.exists()


def test_doctor(place, capsys):
    size = open_vocabulary(place.base).size
    assert panacea("doctor", *place.flags("--config.data.attack=")) == 2
    said = capsys.readouterr()
    assert f"{size + 1} ({size} rows in the embedding)" in said.out
    for name in ("user", "harmful", "alignment", "test"):
        assert f"pairs@{place.root / name}.jsonl: record 6 has token id {size}" in " ".join(said.out.split())  # fmt: skip
    assert f"record 6 has token id {size}" in said.err


def test_tokens_of_the_template(place, tmp_path, capsys):
    """Every prompt has them: the first record is named."""
    path = place.base / "chat_template.jinja"
    path.write_text("<tool> " + path.read_text())
    line = refused(capsys, "generate", *place.flags(), f"--workdir={tmp_path / 'w'}")
    assert "record 1 has token id" in line


def test_the_end_token(place, tmp_path, capsys):
    """No record need end in it: it is named by itself, whatever the command."""
    first = add_tokens(place.base, eos_token="<end>")
    for command in ("finetune", "generate", "perplexity", "doctor"):
        work = [] if command == "doctor" else [f"--workdir={tmp_path / 'w'}"]
        assert panacea(command, *place.flags(), *work) == 2
        assert f"end token '<end>' has id {first}, outside the model's vocabulary" in capsys.readouterr().err  # fmt: skip


def test_padding_of_the_embedding_and_unused_tokens_are_no_problem(place, tmp_path, capsys):
    """More entries than rows, none of them in the data; more rows than entries."""
    write_pairs(place.root / "user.jsonl", 12)
    write_pairs(place.root / "test.jsonl", 6)
    tasks = f"--config.eval.tasks=pairs@{place.root}/test.jsonl"
    assert panacea("perplexity", *place.flags(tasks), f"--workdir={tmp_path / 'w'}") == 0


def test_from_python(place):
    """``finetune`` takes streams that were tokenised by anything."""
    model = load(place.base, dtype="float32")
    good, bad = (Example.answering(np.array([1, 2, last], np.int32), 1) for last in (3, model.config.vocab_size))  # fmt: skip
    stream = Stream("user", [good, good, bad], 2, 0, False, (4,))
    with pytest.raises(InputError, match="stream 'user': record 3 has token id"):
        streams_of(model, DEFENCES["sft"](), {"user": stream})


@pytest.mark.parametrize(("row", "wanted"), [([3, -1], "id -1"), (np.array([0, 8, 9]), "id 8")])
def test_the_first_wrong_id_is_named(row, wanted):
    check_ids([[0, 7], []], 8, "k")
    with pytest.raises(InputError, match=f"k: record 2 has token {wanted}, outside"):
        check_ids([[0, 7], row], 8, "k")


def test_a_guard(tmp_path):
    """Before the first verdict, whatever the order in which the guard reads."""
    write_guard(tmp_path / "guard")
    first = add_tokens(tmp_path / "guard", "<tool>")
    lines = generations(["a gandle", "take the <tool>", "no"])
    write_lines(tmp_path / "generations" / "advbench.jsonl", lines)
    config = judge_config("guard", tmp_path / "guard")
    config.eval.tasks = ("advbench@goals.jsonl",)
    with pytest.raises(InputError, match=f"guard: advbench: record 2 has token id {first}"):
        judge_stage(config, tmp_path)
    assert not (tmp_path / "judgements").exists()


@pytest.mark.parametrize("text", ["[1, 2]", "{", '"llama"'])
@pytest.mark.parametrize("command", ["finetune", "generate", "perplexity"])
def test_a_config_that_is_no_object_is_named(text, command, tmp_path, capsys):
    place = runs.make_place(tmp_path / "place")
    (place.base / "config.json").write_text(text)
    line = refused(capsys, command, *place.flags(), f"--workdir={tmp_path / 'w'}")
    assert f"{place.base / 'config.json'}: not" in line and "tokenizer" not in line


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_attention_heads", 0), ("hidden_size", -32), ("num_hidden_layers", 0), ("vocab_size", "42"),
     ("num_key_value_heads", 0), ("intermediate_size", 1.5), ("head_dim", 0)],
)  # fmt: skip
def test_impossible_sizes_are_named(key, value, tmp_path, capsys):
    place = runs.make_place(tmp_path / "place")
    path = place.base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    line = refused(capsys, "finetune", *place.flags(), f"--workdir={tmp_path / 'w'}")
    assert f"{path}: {key} = {value!r}: must be a positive integer" in line


def test_a_judge_with_a_broken_config(tmp_path):
    write_guard(tmp_path / "guard")
    (tmp_path / "guard" / "config.json").write_text("[]")
    write_lines(tmp_path / "generations" / "advbench.jsonl", generations(["a"]))
    config = judge_config("guard", tmp_path / "guard")
    config.eval.tasks = ("advbench@goals.jsonl",)
    with pytest.raises(InputError, match=r"config\.json: not a JSON object"):
        judge_stage(config, tmp_path)
    shutil.rmtree(tmp_path / "guard")
    with pytest.raises(InputError, match=r"config\.judge\.path: .*guard"):
        judge_stage(config, tmp_path)
