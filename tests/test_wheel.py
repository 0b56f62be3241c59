"""The wheel, in an environment where there is no clone: recipes by name, scripts, types and licence."""

import os
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Without what would show the clone to pip as an installation.
CLEAN = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", f"--wheel-dir={out}", str(ROOT)],
        check=True, capture_output=True, env=CLEAN,
    )  # fmt: skip
    [found] = out.glob("panacea_jax-*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """(python, folder to work in): a fresh environment that sees this one's dependencies, but not the clone."""
    root = tmp_path_factory.mktemp("env")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", root / "env"], check=True)
    python = root / "env" / "bin" / "python"
    [site] = (root / "env" / "lib").glob("python3.*/site-packages")
    # Behind the environment's own packages; files in it that name further folders, as of editable installations, are not read.
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel], check=True, env=CLEAN,
    )  # fmt: skip
    work = root / "elsewhere"
    work.mkdir()
    return python, work


def call(installed, *arguments, code=0):
    python, work = installed
    done = subprocess.run(
        [python, *arguments], cwd=work, capture_output=True, text=True, check=False, env={"PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu"}
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def test_what_it_holds(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    folders = {p.parent.relative_to(ROOT).as_posix() for p in (ROOT / "panacea_jax").rglob("*.py")}
    for file in (ROOT / "panacea_jax").rglob("*.py"):
        assert file.relative_to(ROOT).as_posix() in names
    assert {f"panacea_jax/recipes/{p.name}" for p in (ROOT / "configs").glob("*.py")} <= names
    assert "panacea_jax/recipes/architectures/qwen3_8b/config.json" in names
    scripts = [p.relative_to(ROOT / "launch") for p in (ROOT / "launch").rglob("*") if p.is_file()]
    assert {f"panacea_jax/launch/{p.as_posix()}" for p in scripts} <= names
    page = ("page.html", "page.css", "page.js", "published.json")
    assert {f"panacea_jax/reporting/{name}" for name in page} <= names
    assert "panacea_jax/py.typed" in names and any(n.endswith("licenses/LICENSE") for n in names)
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["packages"]
    extra = {"panacea_jax.recipes", "panacea_jax.launch", "panacea_jax.docs"}
    assert {name.replace(".", "/") for name in set(listed) - extra} == folders


def test_it_is_not_the_clone(installed):
    where = call(installed, "-c", "import panacea_jax; print(panacea_jax.__file__)")
    assert str(ROOT) not in where


def test_a_recipe_by_name(installed):
    said = call(installed, "-m", "panacea_jax.cli", "doctor", "--config=llama2_7b:gsm8k")
    assert "meta-llama/Llama-2-7b-hf" in said and "not looked at" in said
    said = call(installed, "-m", "panacea_jax.cli", "doctor", "--config=llama9", code=2)
    assert "no recipe of that name" in said and "llama2_7b" in said


def test_help_explains_the_keys(installed):
    assert "\n  seed = 0 " in call(installed, "-m", "panacea_jax.cli", "run", "--help")


def test_launch_scripts(installed):
    assert "slurm.sbatch" in call(installed, "-m", "panacea_jax.cli", "launch")
    printed = call(installed, "-m", "panacea_jax.cli", "launch", "--print=slurm")
    assert printed == (ROOT / "launch" / "slurm.sbatch").read_text("utf-8")
    assert "no one script" in call(installed, "-m", "panacea_jax.cli", "launch", "--print=sweep", code=2)


def test_the_lock_names_no_host_and_covers_the_dependencies():
    text = (ROOT / "requirements.txt").read_text("utf-8")
    assert "://" not in text
    locked = {line.partition("==")[0].lower() for line in text.splitlines() if "==" in line and not line.startswith(" ")}
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["dependencies"]
    names = {d.replace(">", "=").replace("<", "=").partition("=")[0].partition("[")[0].strip().lower() for d in asked}
    assert names <= locked
    entries = [line for line in text.splitlines() if line and not line.startswith((" ", "#"))]
    assert text.count("--hash=sha256:") >= len(entries) > 30
