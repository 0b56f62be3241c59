"""What a run says and leaves: no text of a record but where answers are kept, and no token anywhere."""

import json
import shutil

import pytest

from tests import runs
from tests.runs import panacea

MARKER, TOKEN = "zyxmarkerword", "hf_zyxtokenzyxtokenzyx"
# The answers, which hold their prompts: that is what they are for.
ANSWERS = "generations/"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Sources that hold a marker in every record."""
    place = runs.make_place(tmp_path_factory.mktemp("private"))
    for path in place.root.glob("*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        marked = [{k: f"{v} {MARKER}" if k in ("instruction", "output", "goal", "prompt") else v for k, v in row.items()} for row in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in marked))
    return place


def test_a_run_keeps_records_and_tokens_to_itself(place, tmp_path, monkeypatch, capfd):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, TOKEN)
    workdir = tmp_path / "run"
    flags = place.flags("--config.train.steps=2", "--config.data.template=alpaca", "--config.data.max_length=128")
    assert panacea("run", *flags, f"--workdir={workdir}") == 0
    assert panacea("report", f"--workdir={workdir}") == 0
    said = "".join(capfd.readouterr())
    assert MARKER not in said and TOKEN not in said
    holding = set()
    for path in (p for p in workdir.rglob("*") if p.is_file()):
        data = path.read_bytes()
        assert TOKEN.encode() not in data, path
        if MARKER.encode() in data:
            holding.add(path.relative_to(workdir).as_posix())
    assert holding and all(name.startswith(ANSWERS) for name in holding), holding

    shutil.rmtree(workdir / "report")
    assert panacea("report", f"--workdir={workdir}", "--show_records") == 0
    assert MARKER in (workdir / "report" / "index.html").read_text()
    (workdir / "summary.json").unlink()
    capfd.readouterr()
    assert panacea("run", *flags, f"--workdir={workdir}", "--show_records") == 0
    assert MARKER in capfd.readouterr().out


BAD = {
    "a field that is none": ("pairs", {"instruction": "w1", MARKER: "w2"}),
    "a row that is a list": ("pairs", [MARKER]),
    "a row that is text": ("pairs", MARKER),
    "a label that is none": ("sst2", {"sentence": "w1", "label": MARKER}),
    "no label": ("ag_news", {"text": "w1", MARKER: 1}),
    "a category that is none": ("beavertails", {"prompt": "w1", "response": "w2", "category": {MARKER: "yes"}}),
    "a cell that is no list": ("beavertails", {"prompt": "w1", "response": "w2", "category": f"['{MARKER}"}),
    "a role that is none": ("chat", {"messages": [{"role": MARKER, "content": "w1"}]}),
    "a turn that is text": ("chat", {"messages": [MARKER]}),
    "turns that are text": ("chat", {"messages": MARKER}),
    "a part that is no text": ("chat", {"messages": [{"role": "user", "content": [{"type": MARKER}]}]}),
    "content that is none": ("chat", {"messages": [{"role": "user", "content": {"x": MARKER}}]}),
    "no conversation": ("chat", {MARKER: [], "id": 3}),
}


@pytest.mark.parametrize("name", BAD)
def test_an_error_names_the_record_and_shows_it_only_when_asked(name, place, tmp_path, capfd):
    task, row = BAD[name]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    flags = place.flags(f"--config.data.user={task}@{path}")
    assert panacea("finetune", *flags, f"--workdir={tmp_path / 'run'}") == 2
    said = capfd.readouterr().err
    assert MARKER not in said and f"{path}:1: record 1" in said and "(text " in said and "--show_records" in said
    assert panacea("finetune", *flags, f"--workdir={tmp_path / 'run'}", "--show_records") == 2
    assert MARKER in (said := capfd.readouterr().err) and said.count("\n") == 1


def test_a_key_of_the_environment_is_never_said(monkeypatch, capfd, tmp_path):
    monkeypatch.setenv("SOME_TOKEN", TOKEN)
    assert panacea("convert", f"--config.model.path={tmp_path / TOKEN}", "--out=new") == 2
    said = capfd.readouterr().err
    assert TOKEN not in said and "no such model folder" in said


def test_answers_made_elsewhere(place, tmp_path, capfd):
    path = tmp_path / "pairs_x.json"
    path.write_text(json.dumps([{"prompt": f"{MARKER} never asked", "response": "w1"}]))
    source = f"--config.eval.tasks={place.spec('test')}"
    assert panacea("score", f"--generations={path}", source, f"--workdir={tmp_path / 'run'}") == 2
    assert MARKER not in (said := capfd.readouterr().err) and "record 1" in said
