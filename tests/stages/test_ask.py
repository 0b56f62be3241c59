"""The command `try`: what two models answer to lines of stdin."""

import io
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from panacea_jax.data.tokenizer import load_tokenizer
from panacea_jax.stages import ask
from tests import runs

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def place_and_run(tmp_path_factory):
    return runs.finished_run(tmp_path_factory)


def tried(monkeypatch, capsys, text: str, *arguments: object) -> tuple[list[list[str]], str, str]:
    """Rows of answers in the tables that come out, their heads, and what stderr says."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode()), "utf-8"))
    capsys.readouterr()
    assert runs.panacea("try", *arguments) == 0
    said = capsys.readouterr()
    rows = [line.strip("│").split("│") for line in said.out.splitlines() if line.startswith("│")]
    heads = "".join(line for line in said.out.splitlines() if line.startswith("┃"))
    return [[cell.strip() for cell in row] for row in rows], heads, said.err


def test_the_answers_are_those_of_generate(place_and_run, tmp_path, monkeypatch, capsys, caplog):
    """Beside each other, the bare base and what the work directory deploys; prompts that are piped in, no file written."""
    place, workdir = place_and_run
    assert runs.panacea("generate", *place.flags(), "--config.generate.adapter=none", f"--workdir={tmp_path}") == 0
    before = sorted(workdir.rglob("*"))
    sets = [folder / "generations" / "pairs.jsonl" for folder in (tmp_path, workdir)]
    base, healed = ([json.loads(line) for line in file.read_text().splitlines()] for file in sets)
    assert any(a["response"] != b["response"] for a, b in zip(base, healed))
    prompts = "\n\n  ".join(line["instruction"] for line in base)
    answers, _, said = tried(monkeypatch, capsys, prompts, *place.flags(), f"--workdir={workdir}")
    assert len(answers) == len(base)
    assert "Ctrl-D" in said and "trained with" not in caplog.text
    for pair, a, b in zip(answers, base, healed):
        wanted = [(x["response"] or "(empty)") + ("" if x["finished"] else " … (cut at 4 tokens)") for x in (a, b)]
        assert pair == wanted
    assert sorted(workdir.rglob("*")) == before


def test_two_adapters_and_text_that_acts(place_and_run, monkeypatch, capsys, caplog):
    place, workdir = place_and_run
    monkeypatch.setattr(ask, "open_vocabulary", _hostile(ask.open_vocabulary))
    monkeypatch.chdir(workdir)
    adapters = ["--adapter=heal/adapter", "--against=finetune/adapter"]
    [answers], heads, _ = tried(
        monkeypatch, capsys, "w1 w2 \x1b[2J\u202e[red]\n", *place.flags("--config.data.template=alpaca"), *adapters
    )
    assert heads.split() == ["┃", "finetune/adapter", "┃", "heal/adapter", "┃"]
    assert all(cell.startswith(r"\x1b[2J\u202e[bold]:smile:") for cell in answers)
    assert caplog.text.count("trained with the template chat-") == 2 and "asked with alpaca-1" in caplog.text


def _hostile(opened):
    """A tokenizer that decodes every answer to what terminals and Rich act on."""

    def hostile(base):
        info, _, size = opened(base)
        tokenizer = load_tokenizer(base)
        tokenizer.decode = lambda *_, **__: "\x1b[2J\u202e[bold]:smile:"
        return info, tokenizer, size

    return hostile


def test_bad_input_is_one_line(place_and_run, tmp_path, monkeypatch, capsys):
    place, workdir = place_and_run

    def error(*arguments: object, stdin: bytes = b"w1\n") -> str:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), "utf-8"))
        capsys.readouterr()
        assert runs.panacea("try", *arguments) == 2
        return str(capsys.readouterr().err.splitlines()[-1])

    assert "--adapter is not set" in error(*place.flags())
    assert "no adapter or model to try there" in error(*place.flags(), f"--workdir={tmp_path}")
    assert "config.model.path is not set" in error("--config.data.template=chat", f"--adapter={workdir / 'heal' / 'adapter'}")
    assert f"{tmp_path / 'none'}: no such folder" in error(*place.flags(), f"--adapter={tmp_path / 'none'}")
    assert "--against=" in error(*place.flags(), f"--workdir={workdir}", f"--against={tmp_path}")
    assert "stdin: not text" in error(*place.flags(), f"--workdir={workdir}", stdin=b"w1 \xff\n")


def test_a_person_gets_a_mark_where_to_type():
    """On a terminal; the mark stands there before anything is typed, and Ctrl-D ends."""
    leader, follower = pty.openpty()
    code = "import sys; from panacea_jax.stages import ask; print(list(ask._prompts()))"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=follower, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, "TERM": "dumb"},
    ) as child:  # fmt: skip
        os.close(follower)
        os.write(leader, b"w1\n\n w2 \n\x04")
        out = child.communicate(timeout=120)[0]
    os.close(leader)
    assert child.returncode == 0 and "> " in out and out.rstrip().endswith("['w1', 'w2']")
