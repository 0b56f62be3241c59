"""What the packages of requirements.txt are: their licences, and what advisories say of the versions.

    python -m tests.supply                      # make licences: a table of them
    python -m tests.supply build/audit.json     # make audit: what pip-audit found; exit code 1 if anything
"""

import importlib.metadata
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "requirements.txt"
# Licences under which anything may be built upon a package and sold, by any of the names that packages give them.
FREE = {
    "0BSD", "AFL-2.1", "Apache 2.0 License", "Apache License 2.0", "Apache Software License", "Apache-2.0", "BSD License",
    "3-Clause BSD License", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0", "CNRI-Python", "ISC", "LLVM-exception", "MIT",
    "MIT License", "MIT-CMU", "PSF-2.0", "Python Software Foundation License", "Unlicense", "Zlib",
}  # fmt: skip
# Others, looked at one by one: the licence and why it may be.
LISTED = {"tqdm": ("MPL-2.0", "binds changes of its own files")}
_OTHER_NAMES = {"Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0", "ISC License (ISCL)": "ISC"}


class Package(NamedTuple):
    """A locked package, as it is installed here.

    Attributes:
        name, version: of the installation.
        licences: each that binds, or may be chosen.
    """

    name: str
    version: str
    licences: tuple[str, ...]

    def unlisted(self) -> list[str]:
        """Licences that nobody has said may be."""
        listed = LISTED.get(self.name.lower(), ("",))[0]
        return [one for one in self.licences or ("none named",) if one not in FREE | {listed}]


def locked() -> dict[str, str]:
    """Version by name, as requirements.txt has them."""
    return dict(re.findall(r"^([a-z0-9.-]+)==(\S+)", LOCK.read_text("utf-8"), re.MULTILINE))


def installed(names: Iterable[str]) -> list[Package]:
    """Those of the packages that are installed; a marker may leave some out."""
    found = []
    for name in names:
        try:
            about = importlib.metadata.metadata(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        found.append(Package(about["Name"], about["Version"], _licences(about)))
    return found


def _licences(about: "importlib.metadata.PackageMetadata") -> tuple[str, ...]:
    """From the expression, else the classifiers, else the free text, of which the first line has to say it."""
    said = [about["License-Expression"]] if "License-Expression" in about else []
    said = said or [c.rpartition(" :: ")[2] for c in about.get_all("Classifier", []) if c.startswith("License :: OSI Approved :: ")]
    said = said or (about.get("License") or "").strip().splitlines()[:1]
    parts = (part.strip() for text in said for part in re.split(r"\s+(?:AND|OR|WITH)\s+|[()]", _OTHER_NAMES.get(text, text)))
    return tuple(dict.fromkeys(part for part in parts if part))


def table(packages: Iterable[Package]) -> str:
    """Markdown, a line a package."""
    lines = [f"| {p.name} | {p.version} | {', '.join(p.licences)} | {LISTED.get(p.name.lower(), ('', ''))[1]} |" for p in packages]
    return "\n".join(["| package | version | licence | |", "|---|---|---|---|", *lines])


def audited(report: Path) -> tuple[int, list[str]]:
    """How many packages a report of pip-audit has an answer for, and what it found."""
    if not report.is_file():  # it got no answer at all
        return 0, []
    packages = json.loads(report.read_text("utf-8"))["dependencies"]
    known = [p for p in packages if "skip_reason" not in p]
    return len(known), [
        f"{p['name']} {p['version']}: {v['id']}, fixed in {', '.join(v['fix_versions']) or 'no version'}" for p in known for v in p["vulns"]
    ]


def main(report: str = "") -> int:
    """Print the table, or what an audit found; returns the exit code."""
    if not report:
        print(table(installed(locked())), flush=True)
        return 0
    of, (known, found) = len(locked()), audited(Path(report))
    print(*found, sep="\n", end="\n" if found else "")
    print(f"audit: {known} of {of} packages looked up, {len(found)} advisories" if known else "audit: NOT DONE, no advisories within reach")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
