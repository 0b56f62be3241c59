"""What the package stands on: locked by hash, in step with pyproject.toml, under licences that somebody has looked at."""

import json
import re
import subprocess
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.supply import FREE, LISTED, LOCK, ROOT, Package, audited, installed, locked, main

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def test_every_requirement_is_locked_by_hash_and_names_no_place():
    text = LOCK.read_text("utf-8")
    blocks = re.split(r"\n(?=\S)", text.strip())
    for block in (b for b in blocks if not b.startswith("#")):
        first = block.splitlines()[0]
        assert re.fullmatch(r"[a-z0-9.-]+==[\w.!+]+( ; [^\\]+)? \\", first), first
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", block), first
    assert not re.search(r"://|^\s*-(?!-hash)|\bfile:|@ ", text, re.MULTILINE)
    assert not {line.strip().split("=")[0] for line in text.splitlines() if line.lstrip().startswith("--")} - {"--hash"}


def test_the_lock_is_in_step_with_pyproject():
    """Each dependency is there in a version that is allowed, and none is there for a project that names it no more."""
    versions = locked()
    wanted = {canonicalize_name(r.name): r for r in map(Requirement, PROJECT["dependencies"])}
    assert not [str(r) for name, r in wanted.items() if not r.specifier.contains(versions.get(name, "0"), prereleases=True)]
    blocks = re.split(r"\n(?=\S)", LOCK.read_text("utf-8"))
    ours = {canonicalize_name(block.split("==")[0]) for block in blocks if "panacea_jax (pyproject.toml)" in block}
    assert ours and ours <= wanted.keys()


def test_every_licence_is_known():
    packages = installed(locked())
    assert len(packages) > 0.9 * len(locked())
    assert not {p.name: found for p in packages if (found := p.unlisted())}
    assert {p.name.lower() for p in packages} >= LISTED.keys(), "LISTED names what is not locked any more"


def test_a_licence_that_nobody_looked_at():
    assert Package("tqdm", "1", ("GPL-3.0-only", "MIT")).unlisted() == ["GPL-3.0-only"]
    assert Package("other", "1", ("MPL-2.0",)).unlisted() == ["MPL-2.0"]
    assert Package("other", "1", ()).unlisted() == ["none named"]
    assert not {name for name in FREE if re.search("GPL|Affero|MPL|Mozilla", name)}


@pytest.mark.parametrize(
    ("dependencies", "code", "said"),
    [
        ([{"name": "a", "version": "1", "vulns": []}, {"name": "b", "skip_reason": "not found"}], 0, "audit: 1 of "),
        ([{"name": "a", "version": "1", "vulns": [{"id": "CVE-1", "fix_versions": ["2"]}]}], 1, "a 1: CVE-1, fixed in 2\naudit: 1 of "),
        ([{"name": "a", "skip_reason": "not found"}], 0, "audit: NOT DONE"),  # pip-audit calls that "no known vulnerabilities"
        (None, 0, "audit: NOT DONE"),
    ],
)
def test_what_an_audit_says(tmp_path, capsys, dependencies, code, said):
    report = tmp_path / "audit.json"
    if dependencies is not None:
        report.write_text(json.dumps({"dependencies": dependencies, "fixes": []}))
    assert main(str(report)) == code and capsys.readouterr().out.startswith(said)
    assert audited(report)[1] == ([] if code == 0 else ["a 1: CVE-1, fixed in 2"])


def test_what_is_generated_is_not_kept():
    """It may name the hosts that packages came from."""
    done = subprocess.run(["git", "ls-files", "build"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert not done.stdout and "build/" in (ROOT / ".gitignore").read_text().splitlines()
