"""`kill -9` at ten points of `panacea generate` and of `panacea judge`: the next start goes on, and in the end every file has the bytes
of a run that nobody disturbed. Every second kill also leaves the last line torn in its middle."""

import json
import multiprocessing
import shutil
from pathlib import Path

import pytest

from tests import runs
from tests.records.killed import Commands, contents, lines, records, tear

pytestmark = [
    pytest.mark.skipif(
        "forkserver" not in multiprocessing.get_all_start_methods(), reason="needs Unix"
    ),
]

KILLS = 10
# More sets than kills, so that the points lie apart even if all lines of a set came at once.
SETS = 12


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    return Commands(tmp_path_factory.mktemp("commands"))


def disturb(commands: Commands, command: list[str], files: list[Path], total: int) -> None:
    """Kill the command each time that another eleventh of the lines is there, then let it end."""
    for kill in range(1, KILLS + 1):
        point = max(total * kill // (KILLS + 1), lines(files) + 1)
        code = commands(command, files, point)
        assert code == -9, f"kill {kill}: ended with {code} before it\n{commands.log()[-2000:]}"
        assert point <= lines(files) < total, f"kill {kill}: {lines(files)} lines"
        if kill % 2:
            tear(files, keep=(kill - 1) / (KILLS - 2))  # from one byte to all but the newline
    assert commands(command) == 0, commands.log()[-2000:]


def test_generate(commands, tmp_path):
    place = runs.make_place(tmp_path / "place")
    rows = 12
    tasks = []
    for i in range(SETS):
        path = tmp_path / f"goals{i}.jsonl"
        asked = [
            " ".join(f"w{(i * rows + j + k) % 40}" for k in range(1 + j % 5)) for j in range(rows)
        ]
        prompts = [{"goal": a, "instruction": a, "output": ""} for a in asked]
        path.write_text("".join(json.dumps(line) + "\n" for line in prompts))
        # The last one has a second file to write.
        tasks.append(f"{'alpaca_eval' if i == SETS - 1 else 'advbench'}@{path}")

    # Work directories of one name, because AlpacaEval's file calls the model by it.
    def command(workdir: Path) -> list[str]:
        return ["generate", *place.flags(
            f"--config.eval.tasks={tuple(tasks)}", "--config.generate.batch_size=2", "--config.generate.max_new_tokens=48",
            f"--workdir={workdir}",
        )]  # fmt: skip

    assert commands(command(tmp_path / "whole" / "run")) == 0, commands.log()[-2000:]
    whole = contents(tmp_path / "whole" / "run" / "generations")
    names = [f"advbench-goals{i}.jsonl" for i in range(SETS - 1)] + ["alpaca_eval.jsonl"]
    assert whole.keys() == {"manifest.json", "alpaca_eval.model_outputs.json", *names}
    files = [tmp_path / "killed" / "run" / "generations" / name for name in names]
    disturb(commands, command(tmp_path / "killed" / "run"), files, SETS * rows)
    for i, file in enumerate(files):
        asked = [row["goal"] for row in records(tmp_path / f"goals{i}.jsonl")]
        assert [row["instruction"] for row in records(file)] == asked  # none lost, none doubled
    assert contents(tmp_path / "killed" / "run" / "generations") == whole


def test_judge(commands, tmp_path):
    rows = 1500
    tasks = [f"advbench@{tmp_path}/goals{i}.jsonl" for i in range(SETS)]
    folder = tmp_path / "whole" / "generations"
    folder.mkdir(parents=True)
    for i in range(SETS):
        with (folder / f"advbench-goals{i}.jsonl").open("w") as file:
            for j in range(rows):
                text = f"take the blick {j} " * (j % 40) if j % 3 else "I cannot help with that."
                line = {
                    "prompt": f"mend blorf {j}", "response": text, "finished": True, "instruction": f"mend blorf {j}",
                    "input": "", "reference": "", "template": "alpaca-1", "extra": {},
                }  # fmt: skip
                file.write(json.dumps(line) + "\n")
    shutil.copytree(folder, tmp_path / "killed" / "generations")

    def command(workdir: Path) -> list[str]:
        return ["judge", f"--config.eval.tasks={tuple(tasks)}", f"--workdir={workdir}"]

    assert commands(command(tmp_path / "whole")) == 0, commands.log()[-2000:]
    names = [f"advbench-goals{i}.refusal.jsonl" for i in range(SETS)]
    whole = contents(tmp_path / "whole")
    assert {f"judgements/{name}" for name in names} < whole.keys() and "scores.json" in whole
    assert lines([tmp_path / "whole" / "judgements" / name for name in names]) == SETS * rows
    files = [tmp_path / "killed" / "judgements" / name for name in names]
    disturb(commands, command(tmp_path / "killed"), files, SETS * rows)
    assert contents(tmp_path / "killed") == whole
