"""One run on a local folder and in a bucket: equal bytes, also where the machine that began it is gone."""

import fnmatch
import multiprocessing
import os
import shutil
import signal

import pytest

from panacea_jax.stores import claims
from panacea_jax.stores.objects import Objects
from tests.kills import EXPORTS
from tests.records.killed import Commands
from tests.runs import make_place, panacea


def flags(place, workdir):
    return [
        *place.flags("--config.align.defence.name=sft", "--config.align.train.steps=2", "--config.align.train.batch_size=4"),
        "--config.checkpoint.every=1", f"--workdir={workdir}",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def local_run(tmp_path_factory):
    """Its inputs, and the exports of a run in a folder."""
    place = make_place(tmp_path_factory.mktemp("place"))
    workdir = tmp_path_factory.mktemp("local") / "run"
    assert panacea("run", *flags(place, workdir)) == 0
    return place, exports({p.relative_to(workdir).as_posix(): p.read_bytes() for p in workdir.rglob("*") if p.is_file()}, workdir)


def stored(address):
    objects = Objects(address)
    return {name: objects.read(name) for name in objects.listed()}


def exports(files, workdir):
    """What a run leaves that does not depend on how long it took; the work directory is called by one name."""
    return {
        name: data.replace(str(workdir).encode(), b"WORKDIR")
        for name, data in files.items()
        if any(fnmatch.fnmatch(path, pattern) for pattern in EXPORTS for path in (name, f"./{name}"))
    }


def test_a_run_in_a_bucket_leaves_the_bytes_of_one_in_a_folder(local_run, store, capsys, tmp_path):
    place, wanted = local_run
    workdir = f"{store.root}/run"
    assert panacea("run", *flags(place, workdir)) == 0
    said = capsys.readouterr()
    found = stored(workdir)
    assert exports(found, workdir) == wanted and len(wanted) > 15
    # nowhere is the folder of this machine, but in a word that orbax leaves in its checkpoints, nor what opens the bucket
    texts = [data.decode("utf-8", "replace") for name, data in found.items() if not name.endswith("commit_success.txt")]
    everything = [*texts, said.out, said.err]
    assert not [text for text in everything if str(tmp_path) in text or os.environ["AWS_SECRET_ACCESS_KEY"] in text]
    assert said.out.splitlines()[-1] == workdir

    # done, also for a machine that has seen nothing of it; and as it was made
    shutil.rmtree(tmp_path / "cache")
    store.asked.clear()
    assert panacea("run", *flags(place, workdir)) == 0
    assert exports(stored(workdir), workdir) == wanted
    assert not [path for method, path in store.asked if method == "PUT" and "/checkpoints/" in path]
    capsys.readouterr()
    assert panacea("verify", f"--workdir={workdir}") == 0
    said = capsys.readouterr().out + stored(workdir)["verdict.json"].decode()
    assert "finetune: ε applied" in said and str(tmp_path) not in said


def test_model_and_data_may_be_in_a_bucket_too(local_run, store, tmp_path):
    place, wanted = local_run
    objects = Objects(f"{store.root}/place")
    objects.put({p.relative_to(place.root).as_posix(): p for p in place.root.rglob("*") if p.is_file()})
    there = [flag.replace(str(place.root), objects.address) for flag in flags(place, tmp_path / "run")]
    assert panacea("run", *there) == 0
    for name in ("finetune/adapter/adapter_model.safetensors", "generations/pairs.jsonl", "judgements/SHA256SUMS", "scores.json"):
        assert (tmp_path / "run" / name).read_bytes().replace(str(tmp_path / "run").encode(), b"WORKDIR") == wanted[name]
    said = (tmp_path / "run" / "finetune" / "adapter" / "adapter_config.json").read_text()
    assert f'"{objects.address}/base"' in said


@pytest.mark.parametrize("cuts", [(30, 60), (25, 45, 35, 18)], ids=["twice", "often"])
def test_a_run_that_is_cut_off_goes_on_elsewhere(cuts, local_run, store, monkeypatch, tmp_path):
    """Each time a later write is the last that the bucket sees, as when the machine dies; the next has an empty disk."""
    place, wanted = local_run
    workdir = f"{store.root}/run"
    monkeypatch.setattr(claims, "SILENCE", 0.0)
    for number, left in enumerate(cuts):
        monkeypatch.setenv("PANACEA_CACHE", str(tmp_path / f"machine{number}"))
        writes = iter(range(left))

        def cut(method, path, writes=writes):
            return 403 if method in ("PUT", "POST", "DELETE") and next(writes, None) is None else None

        with store.failing(cut):
            assert panacea("run", *flags(place, workdir)) in (1, 2)
    monkeypatch.setenv("PANACEA_CACHE", str(tmp_path / "last"))
    assert panacea("run", *flags(place, workdir)) == 0
    assert exports(stored(workdir), workdir) == wanted


@pytest.mark.skipif("forkserver" not in multiprocessing.get_all_start_methods(), reason="needs Unix")
def test_a_killed_run_goes_on_in_the_bucket(local_run, store, tmp_path):
    """SIGKILL in the middle of a write; the next process is of the same machine, and waits for nobody."""
    place, wanted = local_run
    workdir = f"{store.root}/run"
    commands = Commands(tmp_path, store.environment() | {"PANACEA_CACHE": os.environ["PANACEA_CACHE"]})
    for left in (20, 40, 30):
        writes = iter(range(left))

        def kill(method, path, writes=writes):
            if method == "PUT" and next(writes, None) is None:
                for child in multiprocessing.active_children():
                    os.kill(child.pid, signal.SIGKILL)
                return 500
            return None

        with store.failing(kill):
            assert commands(["run", *flags(place, workdir)]) == -signal.SIGKILL, commands.log()[-2000:]
    assert commands(["run", *flags(place, workdir)]) == 0, commands.log()[-2000:]
    assert exports(stored(workdir), workdir) == wanted
