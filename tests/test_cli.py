"""The command line: help, parsing, exit codes."""

import io
import logging
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import absl.logging
import pytest

from panacea_jax import cli, config
from panacea_jax.cli.dispatch import _computes, _folders, _written
from panacea_jax.cli.huge_pages import TUNABLES
from panacea_jax.cli.keys import key_table
from panacea_jax.cli.parsing import parse_command
from panacea_jax.errors import GateNotMet, InputError
from panacea_jax.train.signals import Diverged, Preempted
from tests.runs import panacea

RECIPE = """
from panacea_jax.config import get_config as defaults

def get_config(variant="small"):
    config = defaults()
    config.lora.rank = {"small": 2, "large": 64}[variant]
    return config
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.py"
    path.write_text(RECIPE)
    return path


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["help"]])
def test_help_lists_every_command(arguments, capsys):
    assert panacea(*arguments) == 0
    out = capsys.readouterr().out
    commands = "quickstart align finetune heal generate judge run convert doctor layers"
    for name in commands.split():
        assert f"\n  {name} " in out and cli.COMMANDS[name].summary in out


def test_no_command_shows_the_help_and_fails(capsys):
    assert panacea() == 2
    assert "usage: panacea <command>" in capsys.readouterr().out


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_help_of_a_command_shows_its_flags(name, capsys):
    assert panacea(name, "--config.nonsense=1", "--help") == 0
    out = capsys.readouterr().out
    assert out.startswith(f"panacea {name}: {cli.COMMANDS[name].summary}")
    for flag in cli.COMMANDS[name].flags:
        assert f"  --{flag}=" in out


def keys_in(help_text):
    return re.findall(r"^  ([a-z0-9_., ]+) = ", help_text, re.M)


def test_help_of_a_command_explains_the_keys_that_it_reads(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert panacea("judge", "--help") == 0
    out = capsys.readouterr().out
    assert keys_in(out) == [
        "watch.stall", "watch.on_stall", "eval.tasks", "judge.name", "judge.path", "judge.adapter", "judge.batch_size",
        "judge.template",
    ]  # fmt: skip
    [line] = [line for line in out.splitlines() if line.startswith("  judge.name")]
    assert line.startswith('  judge.name = "refusal"  ') and '  word lists, "refusal_sentences", or a model' in line
    assert line.endswith(" …") and len(line) <= 100
    assert panacea("convert", "--help") == 0
    assert "mesh.fsdp" in keys_in(capsys.readouterr().out)
    assert panacea("defences", "--help") == 0
    assert not keys_in(capsys.readouterr().out)


def test_the_whole_help_explains_every_key_in_all_words(capsys):
    rows = [", ".join(key.names) for key in key_table()]
    for arguments in (["judge", "--helpfull"], ["--helpfull"]):
        assert panacea(*arguments) == 0
        out = capsys.readouterr().out
        assert sorted(keys_in(out)) == sorted(rows)
        said = " ".join(out.split())
        for key in key_table():
            assert f"{', '.join(key.names)} = {key.default} {' '.join(key.meaning.split())}" in said
    assert "](" not in out and "`" not in out


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_what_a_command_reads_are_keys(name):
    known = list(config.keys(config.get_config()))
    for section in cli.COMMANDS[name].reads:
        assert any(key == section or key.startswith(f"{section}.") for key in known), section


def test_version(capsys):
    assert panacea("--version") == 0
    assert capsys.readouterr().out == f"panacea_jax {metadata.version('panacea_jax')}\n"


def test_a_recipe_its_variant_and_overrides(recipe):
    def parsed(*arguments):
        return parse_command("finetune", arguments)

    values, made = parsed("--workdir=w", "--config.seed=3")
    assert (values.workdir, made.seed, made.lora.rank) == ("w", 3, 32)
    assert parsed(f"--config={recipe}")[1].lora.rank == 2
    assert parsed(f"--config={recipe}:large")[1].lora.rank == 64
    assert parsed("--config.lora.alpha=8", "--config", f"{recipe}:large")[1].lora.alpha == 8.0
    assert parsed(f"--config={recipe}", "--config.lora.rank=5")[1].lora.rank == 5
    made = parsed(
        "--noconfig.data.shuffle", "--config.defence.name=random_perturbation", "--config.defence.rho=2",
        "--config.defence.sigma=0.5", "--config.lora.targets=('q', 'o')",
        "--config.eval.tasks=pairs@x.jsonl", "--config.eval.tasks=pairs@y.jsonl", "--config.model.path", "some/folder",
    )[1]  # fmt: skip
    assert (made.data.shuffle, made.defence.rho, made.defence.sigma) == (False, 2.0, 0.5)
    assert made.lora.targets == ("q", "o") and made.model.path == "some/folder"
    assert made.eval.tasks == ("pairs@x.jsonl", "pairs@y.jsonl")
    assert made.is_locked


def test_parsing_leaves_no_trace(recipe):
    """One process may run several commands, as the quickstart does."""
    before = list(sys.argv)
    parse_command("finetune", [f"--config={recipe}:large", "--config.seed=4"])
    assert parse_command("finetune", [])[1].to_dict() == config.get_config().to_dict()
    assert sys.argv == before


def replace(monkeypatch, name, run):
    monkeypatch.setitem(cli.COMMANDS, name, cli.COMMANDS[name]._replace(run=run))


def test_a_command_ends_with_the_path_it_wrote(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    replace(
        monkeypatch,
        "finetune",
        lambda values, config: Path(values.workdir) / "finetune" / "adapter",
    )
    assert panacea("finetune", f"--workdir={tmp_path / 'w'}") == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("w/finetune/adapter\n", "")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (Preempted("stopped by SIGTERM after step 7; saved"), 75),
        (Diverged("step 7: the task loss is nan; nothing was saved after it"), 1),
        (InputError("config.x = 1:\n  no"), 2),
        (InputError("record 3: \x1b[2J\u202e"), 2),
        (GateNotMet("gate not met: 1 of 2 (w/verdict.json)"), 3),
        (KeyboardInterrupt(), 130),
    ],
    ids=["preempted", "diverged", "bad_input", "hostile_input", "gate", "interrupted"],
)
def test_exit_codes(error, code, monkeypatch, capsys):
    def fail(values, config):
        raise error

    replace(monkeypatch, "run", fail)
    assert panacea("run", "--workdir=w") == code
    captured = capsys.readouterr()
    assert (
        captured.out == ""
        and captured.err.startswith("panacea: ")
        and captured.err.count("\n") == 1
        and captured.err[:-1].isprintable()
    )
    if code in (75, 1):
        assert "step 7" in captured.err


def test_a_warning_is_a_line_that_begins_with_its_level(monkeypatch):
    """Without absl's date, thread and file."""
    said = io.StringIO()
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")

    def warn(values, config):
        handler = absl.logging.get_absl_handler()
        monkeypatch.setattr(handler.python_handler, "stream", said)
        logging.getLogger("panacea_jax.data").warning("%d records", 3)
        absl.logging.warning("the head is float32")
        absl.logging.warning("%s holds \x1b[2J and %s", "a.json", "hf_secretsecret")
        absl.logging.info("not said")

    replace(monkeypatch, "doctor", warn)
    assert panacea("doctor") == 0
    assert said.getvalue() == "WARNING: 3 records\nWARNING: the head is float32\nWARNING: a.json holds \\x1b[2J and …\n"


def test_a_defect_of_ours_keeps_its_traceback(monkeypatch):
    def fail(values, config):
        raise ZeroDivisionError

    replace(monkeypatch, "run", fail)
    with pytest.raises(ZeroDivisionError):
        panacea("run", "--workdir=w")


def test_main_ends_the_process_with_the_exit_code():
    with pytest.raises(SystemExit) as ended:
        cli.main(["frobnicate"])
    assert ended.value.code == 2


def test_mistakes_are_answered_without_loading_the_models():
    """A fresh process: no transformers, orbax or datasets is imported to refuse a flag."""
    code = (
        "import sys; from panacea_jax import cli; "
        "assert cli.run(['run', '--config.lora.rank=0']) == 2; print(sorted({'transformers', 'datasets', 'torch'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    assert done.stdout.splitlines()[-1] == "[]"


INTERRUPTED = """
import os, signal, sys, time
from panacea_jax.cli import commands, main
def hang(values, config):
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
    finally:  # as a save that does not end
        if sys.argv[1] == "twice":
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
commands.COMMANDS["doctor"] = commands.COMMANDS["doctor"]._replace(run=hang)
main(["doctor"])
"""


@pytest.mark.parametrize("times", ["once", "twice"])
def test_a_second_interrupt_leaves_at_once(times):
    done = subprocess.run([sys.executable, "-c", INTERRUPTED, times], capture_output=True, text=True, timeout=50)
    assert done.returncode == 130 and "Traceback" not in done.stderr
    assert ("interrupted; the same command goes on" in done.stderr) == (times == "once")


def test_a_reader_that_leaves_is_no_error_to_trace():
    """As in `panacea run --help | head -1`."""
    reads, writes = os.pipe()
    os.close(reads)
    done = subprocess.run(
        [sys.executable, "-c", "from panacea_jax import cli; cli.main(['run', '--help'])"], stdout=writes, stderr=subprocess.PIPE, text=True
    )
    os.close(writes)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize("own", [None, "", "glibc.malloc.check=0"])
def test_commands_that_compute_start_with_large_pages(own):
    """Once, as the same process with the same arguments; what the user has set stays."""
    code = "import os, sys; from panacea_jax.cli.huge_pages import in_huge_pages; before = os.environ.get('GLIBC_TUNABLES');"
    code += " print(os.getpid(), flush=True); in_huge_pages(); print(before, sys.argv[1:])"
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"} | ({} if own is None else {"GLIBC_TUNABLES": own})
    done = subprocess.run([sys.executable, "-c", code, "a b", "--c"], capture_output=True, text=True, env=environment, check=True)
    *starts, last = done.stdout.splitlines()
    known = TUNABLES if own is None and "CS_GNU_LIBC_VERSION" in os.confstr_names else own
    assert last == f"{known} ['a b', '--c']"
    assert len(starts) == (2 if known == TUNABLES else 1) and len(set(starts)) == 1


def test_which_commands_compute():
    chosen = {name for name in cli.COMMANDS if _computes(name)}
    assert {"quickstart", "run", "sweep", "finetune", "generate", "perplexity"} <= chosen
    assert not chosen & {"doctor", "plan", "convert", "verify", "report", "launch"}


def test_where_a_command_writes_is_known_however_it_is_said():
    """What a full or lost disk is told by."""
    assert _written(["--workdir", "runs/x", "--out=y", "--config.seed=1"]) == ["--workdir=runs/x", "--out=y"]
    assert _folders(["-workdir", "runs/x"]) == ["runs/x"]
