"""Stages of a work directory: what is skipped, what goes on, what is refused; hashes."""

import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from panacea_jax import workdir as workdirs
from panacea_jax.errors import InputError
from panacea_jax.records.jsonl import Writer
from panacea_jax.sums import sha256_folder, sha256_json
from panacea_jax.workdir import StageFolder, read_manifest, write_text

CONFIG = {"lora": {"rank": 2, "targets": ("q", "v")}, "seed": 0, "path": Path("base")}
INPUTS = {"pairs@a.jsonl": "12ab"}


def begun(*arguments):
    """A stage that was begun and left."""
    with StageFolder(*arguments) as stage:
        stage.begin()


def test_a_stage_goes_from_nothing_to_done(tmp_path):
    stage = StageFolder(tmp_path / "w", "finetune", CONFIG, INPUTS)
    assert not stage.done and not (tmp_path / "w").exists(), "looking changes nothing"
    with stage:
        stage.begin()
    assert read_manifest(stage.folder)["status"] == "running"
    again = StageFolder(tmp_path / "w", "finetune", CONFIG, INPUTS)
    assert not again.done
    again.begin()
    again.finish({"steps": 3, "adapter": Path("a")})
    manifest = read_manifest(stage.folder)
    assert manifest["status"] == "done" and manifest["outcome"] == {"steps": 3, "adapter": "a"}
    assert manifest["config"] == {
        "lora": {"rank": 2, "targets": ["q", "v"]},
        "seed": 0,
        "path": "base",
    }
    assert manifest["config_sha256"] == sha256_json(manifest["config"])
    assert manifest["inputs"] == INPUTS
    assert (
        set(manifest["versions"]) == set(workdirs.PACKAGES)
        and "absent" not in manifest["versions"].values()
    )
    assert StageFolder(tmp_path / "w", "finetune", CONFIG, INPUTS).done
    assert not StageFolder(tmp_path / "w", "heal", CONFIG, INPUTS).done


def test_beginning_again_leaves_the_manifest_as_it_is(tmp_path):
    begun(tmp_path, "s", CONFIG, INPUTS)
    stage = StageFolder(tmp_path, "s", CONFIG, INPUTS)
    stage.finish({})
    before = (tmp_path / "s" / "manifest.json").read_bytes()
    begun(tmp_path, "s", CONFIG, INPUTS)
    assert (tmp_path / "s" / "manifest.json").read_bytes() == before


@pytest.mark.parametrize(
    ("config", "inputs", "wanted"),
    [
        ({**CONFIG, "seed": 1}, INPUTS, "config seed: 0 there, 1 now"),
        (
            {**CONFIG, "lora": {"rank": 4, "targets": ("q", "v")}},
            INPUTS,
            "config lora.rank: 2 there, 4 now",
        ),
        ({**CONFIG, "new": 1}, INPUTS, "config new: None there, 1 now"),
        (
            {k: v for k, v in CONFIG.items() if k != "seed"},
            INPUTS,
            "config seed: 0 there, None now",
        ),
        (CONFIG, {"pairs@a.jsonl": "34cd"}, "input pairs@a.jsonl: '12ab' there, '34cd' now"),
        (CONFIG, {"pairs@b.jsonl": "12ab"}, "input pairs@a.jsonl: '12ab' there, None now"),
    ],
)
@pytest.mark.parametrize("done", [False, True])
def test_another_run_is_refused_with_the_first_difference(tmp_path, config, inputs, wanted, done):
    with StageFolder(tmp_path, "s", CONFIG, INPUTS) as stage:
        stage.begin()
        if done:
            stage.finish({})
    before = (tmp_path / "s" / "manifest.json").read_bytes()
    with pytest.raises(InputError) as error:
        StageFolder(tmp_path, "s", config, inputs)
    assert f"({wanted})" in str(error.value) and "choose another --workdir" in str(error.value)
    assert (tmp_path / "s" / "manifest.json").read_bytes() == before


def test_the_order_of_keys_and_the_kind_of_container_do_not_matter(tmp_path):
    begun(tmp_path, "s", CONFIG, INPUTS)
    StageFolder(
        tmp_path,
        "s",
        {"path": "base", "seed": 0, "lora": ConfigDict({"targets": ["q", "v"], "rank": 2})},
        INPUTS,
    )


def test_a_folder_that_is_not_ours_is_refused(tmp_path):
    (tmp_path / "s").mkdir()
    StageFolder(tmp_path, "s", CONFIG, INPUTS)  # an empty one is welcome
    (tmp_path / "s" / "thesis.tex").write_text("kept")
    with pytest.raises(InputError, match="not ours"):
        StageFolder(tmp_path, "s", CONFIG, INPUTS)
    for text in ("", "{", "3", '{"stage": "s"}'):
        (tmp_path / "s" / "manifest.json").write_text(text)
        with pytest.raises(InputError, match="manifest.json: not a manifest of ours"):
            StageFolder(tmp_path, "s", CONFIG, INPUTS)
    (tmp_path / "file").write_text("kept")
    for place in (tmp_path / "file", tmp_path / "file" / "deep" / "er"):
        with pytest.raises(
            InputError,
            match=f"--workdir={place}: cannot be written .{tmp_path / 'file'} is not a folder",
        ):
            StageFolder(place, "s", CONFIG, INPUTS)
    (tmp_path / "s").joinpath("manifest.json").unlink()
    (tmp_path / "t").write_text("a file where the stage's folder belongs")
    with pytest.raises(InputError, match="cannot be written"):
        StageFolder(tmp_path, "t", CONFIG, INPUTS)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(
        workdirs.os, "access", lambda path, mode: False
    )  # tests may run as root, who may write anywhere
    with pytest.raises(InputError, match=f"--workdir={tmp_path}: cannot be written .no permission"):
        StageFolder(tmp_path, "s", CONFIG, INPUTS)
    monkeypatch.undo()
    stage = StageFolder(tmp_path / "w", "s", CONFIG, INPUTS)
    (tmp_path / "w").write_text("came in between")
    with pytest.raises(InputError, match=f"--workdir={tmp_path / 'w'}: cannot be written"):
        stage.begin()


def test_write_text_is_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new \ud800")
    assert path.read_text() == "old"
    write_text(path, "new ρ")
    assert path.read_text("utf-8") == "new ρ"


def test_sha256_json():
    assert (
        sha256_json({"b": [1, 2], "a": None})
        == hashlib.sha256(b'{"a": null, "b": [1, 2]}').hexdigest()
    )


def test_sha256_folder_sees_names_and_contents(tmp_path):
    def write(**files):
        folder = tmp_path / json.dumps(files).encode().hex()[:200]
        folder.mkdir()
        for name, text in files.items():
            (folder / f"{name}.json").write_text(text)
        (folder / "notes.txt").write_text(str(folder))  # not looked at
        return sha256_folder(folder, ("*.json",))

    first = write(a="1", b="2")
    assert first == sha256_folder(next(tmp_path.iterdir()), ("*.json",))
    assert (
        len({first, write(a="1", b="3"), write(a="1"), write(a="1", c="2"), write(a="2", b="1")})
        == 5
    )


def test_sha256_folder_tells_large_files_apart_by_pieces(tmp_path):
    """A copy with another time is the same; another header, tensor or size is not."""
    path = tmp_path / "model.safetensors"
    seen = set()
    for place, size in ((0, 0), (10, 0), (40 * 2**20, 2**20), (0, 2**20)):
        with path.open("wb") as file:
            file.truncate(64 * 2**20 + size)  # sparse
            file.seek(place)
            file.write(b"\1" * min(place, 2**19))
        os.utime(path, ns=(len(seen), len(seen)))
        seen.add(sha256_folder(tmp_path, ("*",)))
        os.utime(path, ns=(99, 99))
        assert sha256_folder(tmp_path, ("*",)) in seen
    assert len(seen) == 4


ELSEWHERE = """
import sys
from pathlib import Path
from panacea_jax.records.jsonl import Writer
from panacea_jax.workdir import StageFolder
stage = StageFolder(Path(sys.argv[1]), "finetune", {}, {})
stage.begin()
writer = Writer(Path(sys.argv[1]) / "answers.jsonl", ["a"])
print("at work", flush=True)
sys.stdin.read()
"""


def test_two_runs_do_not_share_a_folder(tmp_path, monkeypatch):
    """A second process is refused until the first is gone, by whatever death."""
    monkeypatch.setattr(workdirs, "LOCK_PATIENCE", 0.2)
    other = subprocess.Popen(
        [sys.executable, "-c", ELSEWHERE, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )  # fmt: skip
    with other:
        assert other.stdout is not None and other.stdout.readline() == "at work\n"
        before = (tmp_path / "finetune" / "manifest.json").read_bytes()
        stage = StageFolder(tmp_path, "finetune", {}, {})
        with pytest.raises(InputError, match=r"finetune: another run is at work there"):
            stage.begin()
        with pytest.raises(InputError, match=r"answers\.jsonl: another run is at work there"):
            Writer(tmp_path / "answers.jsonl", ["a"])
        assert (tmp_path / "finetune" / "manifest.json").read_bytes() == before
        other.kill()
    stage.begin()
    stage.finish({})
    Writer(tmp_path / "answers.jsonl", ["a"]).close()


def test_what_another_run_did_between_look_and_begin(tmp_path):
    """Both find nothing there; the second one must not take the first one's folder for its own, nor do its work again."""
    first, same = StageFolder(tmp_path, "s", CONFIG, INPUTS), StageFolder(tmp_path, "s", CONFIG, INPUTS)
    other = StageFolder(tmp_path, "s", CONFIG | {"seed": 99}, INPUTS)
    with first:
        first.begin()
    manifest = (tmp_path / "s" / "manifest.json").read_bytes()
    with pytest.raises(InputError, match="made by another run"), other:
        other.begin()
    assert (tmp_path / "s" / "manifest.json").read_bytes() == manifest
    first.finish({})
    with pytest.raises(InputError, match="another run finished it meanwhile"), same:
        same.begin()


def test_a_lock_alone_is_an_empty_folder(tmp_path):
    """As a run leaves it that was killed before it wrote its manifest."""
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / workdirs.LOCK).touch()
    begun(tmp_path, "s", CONFIG, INPUTS)


def test_where_the_file_system_has_no_locks(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(workdirs.fcntl, "flock", refuse)
    begun(tmp_path, "s", CONFIG, INPUTS)
    assert "has no locks" in caplog.text


def test_the_lock_goes_with_the_stage(tmp_path):
    stage = StageFolder(tmp_path, "s", CONFIG, INPUTS)
    stage.begin()
    assert (stage.folder / workdirs.LOCK).exists()
    stage.finish({})
    assert [p.name for p in stage.folder.iterdir()] == ["manifest.json"]


def test_a_refused_command_lets_go(tmp_path):
    """Of the stage that it had begun; another run can go on there at once, in a folder with nothing new in it."""
    with pytest.raises(InputError), StageFolder(tmp_path, "a", CONFIG, INPUTS) as stage:
        stage.begin()
        raise InputError("found late")
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["manifest.json"]
    with StageFolder(tmp_path, "a", CONFIG, INPUTS) as stage:
        stage.begin()


def test_a_lock_that_its_holder_removed_is_no_lock(tmp_path, monkeypatch):
    """Who waited for the end of another run holds a file that is gone, and takes a new one."""
    taken = []

    def lock(file, what):
        taken.append(file)
        if len(taken) == 1:
            (what / workdirs.LOCK).unlink()

    monkeypatch.setattr(workdirs, "lock", lock)
    stage = StageFolder(tmp_path, "s", CONFIG, INPUTS)
    stage.begin()
    assert [file.closed for file in taken] == [True, False]
    stage.finish({})
