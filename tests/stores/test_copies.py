"""Working copies and stand-ins against a real server: what is published is what the next one finds."""

from pathlib import Path

import pytest

from panacea_jax import disk
from panacea_jax.errors import InputError
from panacea_jax.stores import (
    by_address,
    copies,
    is_address,
    publish,
    refresh,
    session,
    stand_in,
    working_copy,
)
from panacea_jax.stores.objects import Objects, Stored


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def stored(store):
    objects = Objects(f"{store.root}/run")
    return {name: objects.read(name) for name in objects.listed() if not name.startswith(".")}


def keys(store, method):
    return [path.removeprefix(f"/{store.root.removeprefix('s3://')}/run/") for m, path in store.asked if m == method]


def test_a_path_that_is_no_address_stays_as_it_is(tmp_path):
    assert working_copy(tmp_path) == stand_in(tmp_path) == tmp_path
    publish(tmp_path)  # nothing to do, and nobody to ask
    assert by_address(tmp_path) == str(tmp_path) and not is_address("owner/name") and not is_address("/s3/x")


def test_files_and_folders_are_there_once_they_have_their_names(store):
    with session():
        folder = working_copy(f"{store.root}/run")
        assert by_address(f"see {folder}/a.json, {folder}") == f"see {store.root}/run/a.json, {store.root}/run"
        with disk.replacing_file(folder / "scores.json") as new:
            new.write_text("{}")
            assert stored(store) == {}
        assert stored(store) == {"scores.json": b"{}"}
        for size in (1, 2):
            with disk.replacing(folder / "adapter") as new:
                new.mkdir()
                for number in range(size):
                    (new / f"part{number}-of-{size}").write_text("x")
        assert sorted(stored(store)) == ["adapter/part0-of-2", "adapter/part1-of-2", "scores.json"]
        (folder / "late.txt").write_text("at the end of the session")
        found = contents(folder)
    assert stored(store) == found and "late.txt" in found


def test_another_machine_finds_what_was_published_and_this_one_only_asks(store, monkeypatch, tmp_path):
    with session():
        folder = working_copy(f"{store.root}/run")
        (folder / "a" / "b").mkdir(parents=True)
        (folder / "a" / "b" / "c.bin").write_bytes(bytes(range(256)))
        for name in ("gone", "gone too [1]*", "gone too 1x"):
            (folder / name).write_text("")
    store.asked.clear()
    with session():  # a killed process had written this, and published nothing of it
        (folder / "a" / "left").write_text("half")
        again = working_copy(f"{store.root}/run")
        assert again == folder and not (folder / "a" / "left").exists()
        assert "a/b/c.bin" not in keys(store, "GET")
        for name in ("gone", "gone too [1]*"):  # which is no pattern
            (folder / name).unlink()
    monkeypatch.setenv("PANACEA_CACHE", str(tmp_path / "elsewhere"))
    with session():
        there = working_copy(f"{store.root}/run")
        assert there != folder and contents(there) == {"a/b/c.bin": bytes(range(256)), "gone too 1x": b""} == stored(store)


def test_a_growing_file_goes_up_now_and_then_and_whole_at_the_end(store, monkeypatch):
    with session():
        file = working_copy(f"{store.root}/run") / "answers.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        for number in range(5):
            with file.open("a") as stream:
                stream.write(f"{number}\n")
            publish(file, growing=True)
        assert stored(store) == {"answers.jsonl": b"0\n"}
        monkeypatch.setattr(copies, "GROWING", 0.0)
        publish(file, growing=True)
        assert keys(store, "PUT").count("answers.jsonl") == 2
    assert stored(store) == {"answers.jsonl": b"0\n1\n2\n3\n4\n"}


def test_what_says_that_all_is_there_goes_up_last_and_away_first(store, monkeypatch):
    with session():
        folder = working_copy(f"{store.root}/run")
        for name in ("checkpoints/3/_CHECKPOINT_METADATA", "checkpoints/3/state/d/0", "manifest.json", "metrics.jsonl", "z"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(name)
        publish(folder)
        assert [name for name in keys(store, "PUT") if not name.startswith(".")][-2:] == [
            "checkpoints/3/_CHECKPOINT_METADATA", "manifest.json",
        ]  # fmt: skip
    Objects(f"{store.root}/run").delete(["checkpoints/3/_CHECKPOINT_METADATA"])  # as a kill in between leaves it
    with session():
        folder = working_copy(f"{store.root}/run")
        assert not (folder / "checkpoints").exists() and (folder / "metrics.jsonl").is_file()


def test_a_stand_in_has_the_files_that_were_asked_for(store, monkeypatch):
    Objects(f"{store.root}/run").write("config.json", b"{}")
    Objects(f"{store.root}/run").write("model.safetensors", b"weights")
    address = Path(f"{store.root}/run")  # of whose slashes pathlib takes one
    assert contents(stand_in(address, ["config.json"])) == {"config.json": b"{}"}
    assert contents(stand_in(address)) == {"config.json": b"{}", "model.safetensors": b"weights"}
    assert len(contents(stand_in(address, ["config.json"]))) == 2  # none of them is fetched twice, or taken away
    assert keys(store, "GET").count("model.safetensors") == keys(store, "GET").count("config.json") == 1
    file = stand_in(f"{store.root}/run/config.json")
    assert file.read_bytes() == b"{}" and file.name == "config.json"
    Objects(f"{store.root}/run").write("config.json", b"{ }")
    assert stand_in(f"{store.root}/run/config.json").read_bytes() == b"{ }"
    assert not stand_in(f"{store.root}/nothing").exists()


def test_what_is_below_a_working_copy_is_found_in_it(store):
    with session():
        folder = working_copy(f"{store.root}/run")
        assert stand_in(f"{store.root}/run/align/adapter") == folder / "align" / "adapter"
        assert not stand_in(f"{store.root}/run2").is_relative_to(folder)


def test_what_is_not_ours_to_publish_is_not_ours_to_delete(store):
    there = Objects(f"{store.root}/run")
    for name in (".hidden", "a/.hidden", "b/.claim.3", "theirs"):
        there.write(name, b"theirs")
    with session():
        folder = working_copy(f"{store.root}/run")
        (folder / "a" / ".passing").write_text("")
        inner = working_copy(f"{store.root}/run/b")  # the claim of which is no file of the outer one
        (inner / "c").write_text("c")
        publish(folder)
    assert {n for n in there.listed() if not n.startswith(".claim.")} == {".hidden", "a/.hidden", "b/.claim.4", "b/c", "theirs"}


def test_a_folder_that_cannot_be_fetched_is_free_again(store):
    Objects(f"{store.root}/run").write("a", b"a")
    Objects(f"{store.root}/run").write("a/b", b"which no folder can hold beside a")
    for _ in range(2):
        with session(), pytest.raises((InputError, OSError)):
            working_copy(f"{store.root}/run")


def test_a_process_that_follows_finds_what_was_published_and_publishes_nothing(store):
    assert not refresh()
    with session():
        folder = working_copy(f"{store.root}/run")
        first = copies._session.get().copies[f"{store.root}/run"]
        (folder / "a").write_text("a")
        publish(folder / "a")
        with session():  # as if of another process
            there = working_copy(f"{store.root}/run", 1)
            assert there != folder and contents(there) == {"a": b"a"}
            (folder / "a").unlink()
            (folder / "b").write_text("b")
            first.publish(folder)
            assert refresh() and contents(there) == {"b": b"b"}
            (there / "c").write_text("c")
            publish(there / "c")
        assert stored(store) == {"b": b"b"}


@pytest.mark.parametrize("name", ["../x", "a/../../x", "a//b", "./x"])
def test_a_name_that_leads_out_of_the_folder_is_refused(name, store, monkeypatch):
    objects = Objects(f"{store.root}/run")
    told = {f"{objects._root}/{name}": {"size": 1, "ETag": "x"}}
    monkeypatch.setattr(objects._files, "find", lambda *_, **__: told)
    with pytest.raises(InputError, match="a name that is none for a file"):
        objects.listed()


def test_a_note_that_is_damaged_is_no_note(store):
    with session():
        folder = working_copy(f"{store.root}/run")
        (folder / "a").parent.mkdir(parents=True, exist_ok=True)
        (folder / "a").write_text("a")
    note = next(folder.parents[3].rglob("index.json"))
    for text in ("", "[1]", '{"a": 3}', '{"a": [[1, "x", 2], [1]]}', "{"):
        note.write_text(text)
        (folder / "a").write_text("b")
        with session():
            assert contents(working_copy(f"{store.root}/run")) == {"a": b"a"}
    assert Objects(f"{store.root}/run").listed()["a"] == Stored(1, '"0cc175b9c0f1b6a831c399e269772661"')
