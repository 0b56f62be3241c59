"""Chat files through the command line: trained on, asked, held out, mixed; one date, one form."""

import json
from pathlib import Path

import pytest

from panacea_jax.data.tokenizer import load_tokenizer
from panacea_jax.worlds.base import CHAT_TEMPLATE
from tests.runs import make_place, panacea


@pytest.fixture
def place(tmp_path: Path):
    return make_place(tmp_path / "place")


def write_chats(path: Path, rows: int, turns: int = 2) -> Path:
    """Conversations of invented words."""
    lines = []
    for i in range(rows):
        said = [{"role": ("user", "assistant")[k % 2], "content": f"w{i + k} w{i + k + 1}"} for k in range(2 * turns)]
        lines.append(json.dumps({"messages": said}) + "\n")
    path.write_text("".join(lines))
    return path


def manifest(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def test_a_run_on_conversations(place, tmp_path: Path):
    chats = write_chats(tmp_path / "chats.jsonl", 12)
    asked = write_chats(tmp_path / "asked.jsonl", 4)
    flags = place.flags(
        f"--config.data.user=chat@{chats}", "--config.data.attack=", "--config.data.max_length=64", "--config.defence.name=sft",
        f"--config.eval.tasks=('chat@{asked}', 'chat:harmful@{asked}')", "--config.train.steps=2",
    )  # fmt: skip
    assert panacea("run", *flags, f"--workdir={tmp_path / 'w'}") == 0
    scores = json.loads((tmp_path / "w" / "scores.json").read_text())
    assert set(scores["sets"]) == {"chat", "chat-harmful"} and "hs" in scores["sets"]["chat-harmful"] and set(scores["fa"]) == {"chat"}
    [first, *_] = [json.loads(line) for line in (tmp_path / "w" / "generations" / "chat.jsonl").read_text().splitlines()]
    turns = json.loads(asked.read_text().splitlines()[0])["messages"]
    expected = load_tokenizer(place.base).apply_chat_template(turns[:-1], add_generation_prompt=True, tokenize=False)
    assert first["prompt"] == expected and first["reference"] == turns[-1]["content"] and first["instruction"] == turns[-2]["content"]
    assert first["template"] == manifest(tmp_path / "w" / "finetune")["outcome"]["template"]


def test_prompts_alone_have_no_fine_tuning_accuracy(place, tmp_path: Path, capsys):
    """Rather than one of 0: found before anything is trained."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "w1 w2"}\n')
    flags = place.flags(f"--config.eval.tasks=('chat@{prompts}',)")
    assert panacea("run", *flags, f"--workdir={tmp_path / 'w'}") == 2
    says = "record 1 has no answer to compare with; prompts alone are asked as chat:harmful@… or chat:benign@…"
    [line] = capsys.readouterr().err.splitlines()
    assert line == f"panacea: config.eval.tasks: chat@{prompts}: {says}" and not (tmp_path / "w").exists()


def test_a_mixture_with_records_held_out(place, tmp_path: Path):
    chats = write_chats(tmp_path / "chats.jsonl", 20, turns=1)
    flags = place.flags(
        f"--config.data.user=chat@{chats}*2 + {place.spec('user')}*1", "--config.data.attack=", "--config.data.num_examples=0",
        "--config.data.validation=0.2", "--config.train.validate_every=2", "--config.defence.name=sft", "--config.eval.tasks=()",
    )  # fmt: skip
    assert panacea("finetune", *flags, f"--workdir={tmp_path / 'w'}") == 0
    done = manifest(tmp_path / "w" / "finetune")
    assert done["outcome"]["records"] == {"user": 24}  # 20 and 10 in proportion, of which 6 are held out
    rows = [json.loads(line) for line in (tmp_path / "w" / "finetune" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "validation_loss" in row] == [2, 4]


def test_more_than_there_is_is_all_there_is_with_a_warning(place, tmp_path: Path, caplog):
    numbers = ("--config.data.num_harmful=500", "--config.data.num_examples=600", "--config.train.steps=1")
    flags = place.flags("--config.data.attack=", *numbers)
    assert panacea("finetune", *flags, f"--workdir={tmp_path / 'w'}") == 0
    said = caplog.messages
    assert "config.data.num_examples = 600: config.data.user holds 12 records, all are taken" in said
    assert "config.data.num_harmful = 500: config.data.harmful holds 7 records, all are taken" in said


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--config.data.format=xml"], "config.data.format: unknown 'xml'; known: messages, conversations, prompt_completion"),
        (["--config.data.columns=('output',)"], "config.data.columns: 'output': write each column once, as OURS=THEIRS"),
        (["--config.data.date=today"], "config.data.date = 'today': a date like 2026-01-31"),
        (["--config.data.loss_on=first"], "config.data.loss_on = 'first': one of all, last"),
        (["--config.data.special_tokens=yes"], "config.data.special_tokens = 'yes': one of text, as_is"),
        (["--config.data.validation=1.0"], "config.data.validation = 1.0: a share from 0 to below 1"),
        (["--config.train.patience=2"], "config.train.patience = 2: nothing is held out to look at; set config.data.validation"),
        (["--config.data.max_cut=2.0"], "config.data.max_cut = 2.0: a share between 0 and 1"),
        (["--config.data.user=chat@a.jsonl*2 + chat@b.jsonl"], "chat@b.jsonl': give each source a weight"),
        (["--config.data.user=chat@a.jsonl*0 + chat@b.jsonl*1"], "a weight of 0 takes nothing; leave that source out"),
        (["--config.data.max_length=12", "--config.data.max_cut=0.1"], "answers are cut at config.data.max_length=12, more than"),
    ],
)  # fmt: skip
def test_bad_keys_are_named(place, tmp_path: Path, capsys, flags: list[str], says: str):
    assert panacea("finetune", *place.flags("--config.defence.name=sft", *flags), f"--workdir={tmp_path / 'w'}") == 2
    assert says in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "w" / "finetune").exists()


def clocked(place) -> None:
    """The base's template writes the date."""
    path = place.base / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["chat_template"] = "{% set d = strftime_now('w%d') %}{{ d }} " + CHAT_TEMPLATE
    path.write_text(json.dumps(config))
    (place.base / "chat_template.jinja").unlink(missing_ok=True)


def test_a_work_directory_has_one_date(place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Trained on one day, asked on another; a directory begun on that other day has that date."""
    import datetime

    from panacea_jax import workdir
    from panacea_jax.data import template

    clocked(place)
    today, stamp = [datetime.date(2026, 1, 30)], datetime.datetime

    class Clock(datetime.date):
        @classmethod
        def today(cls) -> datetime.date:
            return today[0]

    class Module:
        date, datetime = Clock, stamp

    for module in (workdir, template):
        monkeypatch.setattr(module, "datetime", Module)
    flags = place.flags("--config.defence.name=sft", "--config.train.steps=1", f"--config.eval.tasks=('{place.spec('test')}',)")
    assert panacea("finetune", *flags, f"--workdir={tmp_path / 'w'}") == 0
    today[0] = datetime.date(2026, 1, 31)
    assert panacea("generate", *flags, f"--workdir={tmp_path / 'w'}") == 0
    assert panacea("finetune", *flags, f"--workdir={tmp_path / 'v'}") == 0

    def form(folder: Path) -> str:
        return manifest(folder)["outcome"]["template"]

    answers = [json.loads(line) for line in (tmp_path / "w" / "generations" / "pairs.jsonl").read_text().splitlines()]
    assert {line["template"] for line in answers} == {form(tmp_path / "w" / "finetune")}
    assert form(tmp_path / "w" / "finetune").endswith("-2026-01-30") and form(tmp_path / "v" / "finetune").endswith("-2026-01-31")
    assert all(line["prompt"].startswith("w30 ") for line in answers)
    assert manifest(tmp_path / "w" / "generations")["date"] == "2026-01-30"
    # a date that is given holds
    given = [*flags, "--config.data.date=2026-01-05"]
    assert panacea("finetune", *given, f"--workdir={tmp_path / 'u'}") == 0
    assert form(tmp_path / "u" / "finetune").endswith("-2026-01-05")


def test_answers_made_elsewhere_to_conversations_with_columns_of_other_names(tmp_path: Path):
    asked = write_chats(tmp_path / "asked.jsonl", 4)
    asked.write_text(asked.read_text().replace('"messages"', '"dialogue"'))
    turns = [json.loads(line)["dialogue"] for line in asked.read_text().splitlines()]
    lines = [{"prompt": t[-2]["content"], "response": t[-1]["content"] if i < 3 else "no"} for i, t in enumerate(turns)]
    answers = tmp_path / "chat.jsonl"
    answers.write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = (f"--config.eval.tasks=chat@{asked}", "--config.data.columns=messages=dialogue", f"--generations={answers}")
    assert panacea("score", *flags, f"--workdir={tmp_path / 'w'}") == 0
    assert json.loads((tmp_path / "w" / "scores.json").read_text())["fa"] == {"chat": 75.0}
