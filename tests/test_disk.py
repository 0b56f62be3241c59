"""Names that are taken by whole files and folders alone, and room that is asked for first."""

import errno
import shutil

import pytest

from panacea_jax.disk import check_room, growing, replacing, replacing_file
from panacea_jax.errors import no_space


def contents(folder):
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def test_a_folder_takes_the_place_of_the_one_before(tmp_path):
    target = tmp_path / "adapter"
    for text in ("first", "second"):
        with replacing(target) as new:
            new.mkdir()
            (new / text).write_text(text)
            assert target.exists() == (text == "second")
        assert contents(tmp_path) == {f"adapter/{text}": text}


def test_what_fails_leaves_the_one_before(tmp_path):
    with replacing(tmp_path / "adapter") as new:
        new.mkdir()
        (new / "x").write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "adapter") as new:
        new.mkdir()
        (new / "x").write_text("half")
        raise KeyboardInterrupt
    assert contents(tmp_path) == {"adapter/x": "old"}
    (tmp_path / ".next" / "adapter").mkdir(parents=True)  # as a kill leaves it
    with replacing(tmp_path / "adapter") as new:
        assert not new.exists()
        new.mkdir()
    assert contents(tmp_path) == {}


def test_a_file_is_whole_or_as_it_was(tmp_path):
    with pytest.raises(ValueError), replacing_file(tmp_path / "x") as new:
        new.write_text("half")
        raise ValueError
    assert contents(tmp_path) == {}
    for text in ("one", "two"):
        with replacing_file(tmp_path / "x") as new:
            new.write_text(text)
        assert contents(tmp_path) == {"x": text}


def test_what_a_killed_process_left_goes_and_what_a_living_one_writes_stays(tmp_path):
    target = tmp_path / "[out]"
    for name in (".[out].00.partial", ".o.00.partial", ".[out].00.other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text(name)
    (tmp_path / ".[out].01.partial").mkdir()  # made just now, perhaps
    with growing(target) as first:
        (first / "x").write_text("first")
        with growing(target) as second:
            (second / "x").write_text("second")
            second.rename(target)
        kept = {".o.00.partial/x", ".[out].00.other/x", "[out]/x"}
        assert contents(tmp_path).keys() == {*kept, f"{first.name}/x"} and contents(target) == {"x": "second"}
    assert contents(tmp_path).keys() == kept and (tmp_path / ".[out].01.partial").is_dir()


def test_no_room(tmp_path, monkeypatch):
    check_room(tmp_path / "not" / "there", 10)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2 * 10**9))
    check_room(tmp_path, 2 * 10**9)
    with pytest.raises(OSError) as error:
        check_room(tmp_path / "not" / "there", 5 * 10**9)
    assert error.value.errno == errno.ENOSPC
    told = (str(tmp_path / "not" / "there"), "No space left on device: 2,000.0 MB are left, 5,000.0 MB are needed")
    assert no_space(error.value) == told
