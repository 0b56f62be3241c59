"""Append-only files: exact bytes, torn ends, foreign files, a real kill."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from panacea_jax.errors import InputError
from panacea_jax.evaluate.lines import digest
from panacea_jax.records.jsonl import Writer, read_lines, resume

PROMPTS = ["wug?", "blick é\u2028?", 'quo"te\n?', "wug?", "zup?"]


def line(i: int) -> dict[str, str]:
    return {"prompt": PROMPTS[i], "response": f"answer {i}"}


def write_all(path: Path) -> bytes:
    with Writer(path, PROMPTS) as writer:
        for i in range(writer.done, len(PROMPTS)):
            writer.append(line(i))
    return path.read_bytes()


def test_round_trip_and_one_line_each(tmp_path: Path) -> None:
    path = tmp_path / "new" / "set.jsonl"
    assert resume(path, PROMPTS) == 0
    data = write_all(path)
    assert data.count(b"\n") == len(PROMPTS)
    assert "é".encode() in data  # readable, not escaped
    assert read_lines(path) == [line(i) for i in range(len(PROMPTS))]
    assert resume(path, PROMPTS) == len(PROMPTS)
    assert write_all(path) == data  # nothing to do, nothing changed


def test_every_torn_end_resumes_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # hundreds of files
    whole = write_all(tmp_path / "whole.jsonl")
    path = tmp_path / "torn.jsonl"
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        assert resume(path, PROMPTS) == whole[:cut].count(b"\n")
        assert path.read_bytes() == whole[:cut]  # looking changes nothing
        assert write_all(path) == whole


def test_blocks_never_written_are_a_torn_end(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    whole = write_all(path)
    first = whole[: whole.index(b"\n") + 1]
    for tail in (b"\0" * 40, b'{"pro\0\0\0\n'):
        path.write_bytes(first + tail)
        assert resume(path, PROMPTS) == 1
        assert write_all(path) == whole


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": "other", "response": "x"}\n', ":1: 'prompt' differs"),
        (b'{"prompt": "wug?", "response": "x"}\n{"prompt": "other"}\n', ":2: 'prompt' differs"),
        (b'{"hs": 1}', "not a record of this run"),  # whole, foreign, without a newline
        (b"my notes", "not a record of this run"),
        (b'[{"prompt": "wug?"}]', "not a record of this run"),
        (b'{"prompt": "wug?"}\nrubbish\n{"prompt": "blick"}\n', ":2: damaged line"),
        (b'{"prompt": "wug?"}\n\xff\xfe\n{"prompt": "x"}\n', ":2: damaged line"),
        (b"[1]\n", ":1: expected a JSON object"),
        (b'{"prompt": "wug?"}\n' * 6, "6 records, more than the 5"),
    ],
)
def test_foreign_or_damaged_files_are_refused_and_untouched(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "set.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        resume(path, PROMPTS)
    with pytest.raises(InputError, match=message):
        Writer(path, PROMPTS)
    assert path.read_bytes() == content


def test_append_checks_its_place(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    with Writer(path, PROMPTS) as writer:
        writer.append(line(0))
        with pytest.raises(ValueError, match="expected there"):
            writer.append(line(2))
        writer.append(line(1), line(2))
        assert writer.done == 3
    assert resume(path, PROMPTS) == 3


def test_append_is_on_disk_at_once_and_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "set.jsonl"
    sizes = []
    real = os.fsync

    def spy(fd: int) -> None:
        sizes.append(os.fstat(fd).st_size)
        real(fd)

    monkeypatch.setattr(os, "fsync", spy)
    with Writer(path, PROMPTS) as writer:
        writer.append(line(0))
        assert read_lines(path) == [line(0)]
        assert sizes == [path.stat().st_size]


def test_put_takes_any_order(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    with Writer(path, PROMPTS) as writer:
        for i, done in ((2, 0), (1, 0), (0, 3), (4, 3), (3, 5)):
            writer.put(i, line(i))
            assert writer.done == done
        with pytest.raises(ValueError, match="there already"):
            writer.put(2, line(2))
    assert path.read_bytes() == write_all(tmp_path / "whole.jsonl")


def test_another_key(tmp_path: Path) -> None:
    path = tmp_path / "set.refusal.jsonl"
    keys = [digest("p", "a"), digest("p", "b")]
    with Writer(path, keys, key="digest") as writer:
        writer.append({"flagged": True, "digest": keys[0]})
    assert resume(path, keys, key="digest") == 1
    with pytest.raises(InputError, match="'digest' differs"):
        resume(path, keys[::-1], key="digest")


def test_digest_tells_prompt_from_response() -> None:
    assert digest("ab", "c") != digest("a", "bc")
    assert len(digest("\ud800", "é")) == 16


def test_a_lone_surrogate_is_escaped(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    with Writer(path, ["p"]) as writer:
        writer.append({"prompt": "p", "response": "\ud83d"})
    assert read_lines(path) == [{"prompt": "p", "response": "\ud83d"}]


def test_unwritable_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot be written"):
        Writer(tmp_path / "file" / "set.jsonl", PROMPTS)


CHILD = """
import sys, time
from pathlib import Path
from panacea_jax.records.jsonl import Writer
prompts = [f"wug {i}?" for i in range(40)]
with Writer(Path(sys.argv[1]), prompts) as writer:
    for i in range(writer.done, 40):
        writer.append({"prompt": prompts[i], "response": "blick " * 50})
        print(i, flush=True)
        if len(sys.argv) > 2:
            time.sleep(0.01)
"""


def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    """SIGKILL after the 5th record of each attempt; no record is lost or doubled."""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}

    def child(*args: str) -> list[str]:
        return [sys.executable, "-c", CHILD, *args]

    subprocess.run(child(str(tmp_path / "whole")), env=env, check=True, capture_output=True)
    for _ in range(2):
        with subprocess.Popen(
            child(str(tmp_path / "killed"), "slow"), env=env, stdout=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            for _ in range(5):
                process.stdout.readline()
            process.send_signal(signal.SIGKILL)
    done = resume(tmp_path / "killed", [f"wug {i}?" for i in range(40)])
    assert 10 <= done < 40
    subprocess.run(child(str(tmp_path / "killed")), env=env, check=True, capture_output=True)
    assert (tmp_path / "killed").read_bytes() == (tmp_path / "whole").read_bytes()
    assert json.loads((tmp_path / "killed").read_text().splitlines()[39])["prompt"] == "wug 39?"
