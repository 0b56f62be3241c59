"""Prompts for another server: what we would ask, to the id, and the way back of its answers."""

import json
from pathlib import Path

import pytest

from panacea_jax.models.model import load
from tests.runs import Place, make_place, panacea


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    return make_place(tmp_path_factory.mktemp("prompts") / "place")


def flags(place: Place, workdir: Path, *more: str) -> list[str]:
    test = place.root / "test.jsonl"
    specs = (place.spec("goals"), f"pairs:harmful@{test}", place.spec("test"))
    return place.flags(f"--config.eval.tasks={specs}", f"--workdir={workdir}", *more)


NAMES = ("advbench", "pairs-harmful", "pairs")


@pytest.mark.parametrize("template", ["chat", "alpaca"])
def test_what_we_would_ask(place, tmp_path, template):
    """The text that generate stores, and the ids that it reads."""
    given = f"--config.data.template={template}"
    assert panacea("generate", *flags(place, tmp_path, given)) == 0
    assert panacea("generate", "--prompts_only", *flags(place, tmp_path, given)) == 0
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(place.base)
    for name in NAMES:
        asked = rows(tmp_path / "prompts" / f"{name}.jsonl")
        answered = rows(tmp_path / "generations" / f"{name}.jsonl")
        assert [a | {"response": 0, "finished": 0, "tokens": 0} for a in asked] == [
            b | {"response": 0, "finished": 0, "tokens": 0} | {k: a[k] for k in ("prompt_token_ids", "max_new_tokens", "stop_token_ids")}
            for a, b in zip(asked, answered, strict=True)
        ]  # fmt: skip
        for a in asked:
            special = template == "alpaca"
            assert a["prompt_token_ids"] == tokenizer(a["prompt"], add_special_tokens=special).input_ids
            assert (a["max_new_tokens"], a["stop_token_ids"]) == (4, [tokenizer.eos_token_id])


def test_no_weights_are_needed_and_it_is_done_once(place, tmp_path, capsys):
    base = tmp_path / "base"
    base.mkdir()
    for file in place.base.iterdir():
        if file.suffix != ".safetensors":
            (base / file.name).write_bytes(file.read_bytes())
    with pytest.raises(Exception, match="safetensors"):
        load(base)
    more = (f"--config.model.path={base}", "--config.generate.max_new_tokens=0")
    assert panacea("generate", "--prompts_only", *flags(place, tmp_path / "w", *more)) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("w/prompts")
    lengths = [rows(tmp_path / "w" / "prompts" / f"{n}.jsonl")[0]["max_new_tokens"] for n in NAMES]
    assert lengths == [512, 512, 200]
    file = tmp_path / "w" / "prompts" / "pairs.jsonl"
    before = file.stat().st_mtime_ns
    assert panacea("generate", "--prompts_only", *flags(place, tmp_path / "w", *more)) == 0
    assert file.stat().st_mtime_ns == before
    other = (*more, "--config.data.template=alpaca")
    assert panacea("generate", "--prompts_only", *flags(place, tmp_path / "w", *other)) == 2
    assert "config template: 'chat' there, 'alpaca' now" in capsys.readouterr().err


def test_answers_come_back(place, tmp_path, capsys):
    """Invented answers, added to the lines or beside the prompts alone, score as worked out by hand."""
    assert panacea("generate", "--prompts_only", *flags(place, tmp_path / "asked")) == 0
    answers = tmp_path / "answers"
    answers.mkdir()
    for name in NAMES:
        lines = rows(tmp_path / "asked" / "prompts" / f"{name}.jsonl")
        for i, line in enumerate(lines):
            refusal, right = "I cannot help with that.", line["reference"] if i < 3 else "wug"
            said = right if name == "pairs" else refusal if i < 2 else "sure"
            line |= {"response": said, "finished": True}
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (answers / f"{name}.jsonl").write_text(text)
    assert panacea("score", f"--generations={answers}", f"--workdir={tmp_path / 'w'}") == 0
    scores = json.loads((tmp_path / "w" / "scores.json").read_text())
    assert scores["fa"] == {"pairs": 50.0}
    assert scores["sets"]["advbench"]["hs"] == 60.0  # 3 of 5
    assert scores["sets"]["pairs-harmful"]["hs"] == pytest.approx(400 / 6)
    assert scores["template"].startswith("chat-")
    assert [scores["sets"][name]["max_new_tokens"] for name in NAMES] == [4, 4, 4]  # as the lines say
    brought = rows(tmp_path / "w" / "generations" / "pairs.jsonl")[0]
    assert not {"prompt_token_ids", "max_new_tokens"} & {*brought, *brought["extra"]}
    # Only the prompt and its answer, as a server's log has them: the prompts' source says the rest.
    bare = tmp_path / "bare.jsonl"
    kept = [{k: r[k] for k in ("prompt", "response")} for r in rows(answers / "pairs.jsonl")]
    bare.write_text("".join(json.dumps(r) + "\n" for r in kept))
    asked = f"--config.eval.tasks=('{place.spec('test')}',)"
    assert panacea("score", f"--generations={bare}", asked, f"--workdir={tmp_path / 'v'}") == 0
    assert json.loads((tmp_path / "v" / "scores.json").read_text())["fa"] == {"pairs": 50.0}
    # Prompts are no answers.
    capsys.readouterr()
    given = f"--generations={tmp_path / 'asked' / 'prompts'}"
    assert panacea("score", given, f"--workdir={tmp_path / 'u'}") == 2
    assert "holds prompts, not answers" in capsys.readouterr().err
