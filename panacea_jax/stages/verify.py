"""The command ``verify``: whether a model is the one that was made and judged, and keeps its bounds, for people and for the pipelines that
deploy it."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from panacea_jax.errors import GateNotMet, InputError
from panacea_jax.evaluate.gate import MET, NOT_MEASURED, Finding, Gate, hold, parse_gate
from panacea_jax.evaluate.scores import Judged
from panacea_jax.records.judged import load_judged
from panacea_jax.signatures import signed_by
from panacea_jax.stages.trust import DIFFERS, Check, check_workdir
from panacea_jax.terminal import safe_text
from panacea_jax.untrusted import parsing, read_json_value, read_object
from panacea_jax.workdir import manifest_if_any, plain, write_json


def verify_stage(
    config: ConfigDict, workdir: Path, file: Path | None, others: Mapping[str, Path], key: Path | None = None
) -> Path:
    """Look whether a work directory is what it says (``trust.check_workdir``), and hold its figures to a gate if there is one; writes
    ``WORKDIR/verdict.json``, prints a line a check and a bound, and returns the file.

    Figures come from the verdicts themselves, not from scores.json.

    Args:
        config: its ``gate``, unless ``file`` is given, and ``model.path``, the base that the models are to be of, if it is set.
        workdir: the work directory.
        file: JSON with the keys of ``config.gate``.
        others: work directories of the models that bounds name, by ``gate.REFERENCES``.
        key: public key of minisign by which all stages are to be signed; None: nobody asks.

    Raises:
        InputError: nothing to check and no gate, two gates, one that cannot be read, no verdicts, work directories that cannot be
            compared, or no such key.
        GateNotMet: a bound is not met, or a check does not hold; the file is written.
    """
    gate = _read_gate(config, file)
    checks = check_workdir(workdir, config.model.path, signed_by(key) if key else None)
    if key and not checks:
        raise InputError(f"--signed_by={key}: {workdir} holds no stage of ours that could be signed")
    if gate is None and not checks:
        raise InputError(
            f"--gate is not set, and {workdir} holds no stage of ours to check: name a JSON file with bounds, or set config.gate.bounds"
        )
    for line in _check_lines(checks):
        print(safe_text(line))
    wrong = sum(check.outcome == DIFFERS for check in checks)
    verdict: dict[str, Any] = {"met": not wrong, "checks": [check._asdict() for check in checks]}
    missed, of = 0, 0
    if gate is not None:
        held = _hold_gate(gate, workdir, others)
        missed, of = sum(finding["outcome"] != MET for finding in held["findings"]), len(held["findings"])
        verdict |= held | {"met": not (wrong or missed)}
    out = workdir / "verdict.json"
    write_json(out, verdict)
    if wrong or missed:
        said = [f"gate not met: {missed} of {of}"] if missed else []
        said += [f"{wrong} of {len(checks)} checks do not hold"] if wrong else []
        raise GateNotMet(f"{'; '.join(said)} ({out})")
    return out


def _hold_gate(gate: Gate, workdir: Path, others: Mapping[str, Path]) -> dict[str, Any]:
    """What becomes of the bounds of a gate; prints a line for each."""
    name = gate.judge or _judge_of_scores(workdir)
    loaded = {flag: _judged(path, name) for flag, path in (("workdir", workdir), *others.items())}
    for flag, path in others.items():
        if path.resolve() == workdir.resolve():
            raise InputError(f"--{flag}={path}: cannot be compared with itself")
    ours = loaded.pop("workdir")
    findings = hold(gate, ours, loaded)
    for line in _lines(findings):
        print(safe_text(line))
    return {
        "findings": [dataclasses.asdict(finding) for finding in findings],
        "gate": {**dataclasses.asdict(gate), "bounds": [bound.text for bound in gate.bounds]},
        "judge": ours.judge,
        "template": ours.template,
        "models": plain({"workdir": workdir, **others}),
        "answers": _answers_of(workdir),
    }


def _read_gate(config: ConfigDict, file: Path | None) -> Gate | None:
    if file is None:
        return parse_gate(config.gate.to_dict(), "config.gate") if config.gate.bounds else None
    if config.gate.bounds:
        raise InputError(f"--gate={file}: config.gate.bounds is set too; give one of them")
    try:
        content = read_json_value(file, "not JSON", strict=True)
    except InputError as error:
        raise InputError(f"--gate={error}") from error
    return parse_gate(content, f"--gate={file}")


def _judge_of_scores(workdir: Path) -> str:
    path = workdir / "scores.json"
    try:
        with parsing(path, "no scores of ours"):
            return str(read_object(path, "no scores of ours")["judge"]["name"])
    except InputError as error:
        raise InputError(f"{error}; run `panacea judge` or `panacea score`, or name a judge in the gate") from error


def _judged(workdir: Path, judge: str) -> Judged:
    """What one judge found in a work directory, all sets of it.

    Raises:
        InputError: the judge has not seen it, or not all of it.
    """
    found = load_judged(workdir)
    if judge not in found:
        raise InputError(f"{workdir}: no verdicts of judge {judge}, but of {', '.join(found)}")
    sets = {path.stem for path in (workdir / "generations").glob("*.jsonl")}
    if unseen := sorted(sets - {s.name for s in found[judge].sets}):
        raise InputError(f"{workdir}: judge {judge} has not seen {', '.join(unseen)}; run `panacea judge`")
    return found[judge]


def _answers_of(workdir: Path) -> dict[str, Any] | None:
    """Which weights gave the answers, with their hashes and those of the sets; None where no manifest says so."""
    manifest = manifest_if_any(workdir / "generations")
    if not manifest:
        return None
    asked = manifest["config"]
    return {"model": asked.get("model"), "adapter": asked.get("adapter"), "inputs": manifest["inputs"]}


def _check_lines(checks: Sequence[Check]) -> list[str]:
    """A line a check: outcome, what was looked at, what was found."""
    wide = max((len(check.what) for check in checks), default=0)
    return [f"{c.outcome:<{len(NOT_MEASURED)}}  {c.what:<{wide}}  {c.why}" for c in checks]


def _lines(findings: Sequence[Finding]) -> list[str]:
    """A line a finding: outcome, bound, set, figure."""
    wide = max(len(finding.bound) for finding in findings)
    return [
        f"{f.outcome:<{len(NOT_MEASURED)}}  {f.bound:<{wide}}  {'  '.join(filter(None, (f.set, _figure(f), f.why)))}"
        for f in findings
    ]


def _figure(f: Finding) -> str:
    """Value, other model's value, difference and interval, as far as they are there."""
    if f.value is None:
        return ""
    other = "" if f.reference is None else f" against {f.reference:.1f}: {f.difference:+.1f}"
    interval = "" if f.ci95 is None else f" [{f.ci95[0]:.1f}, {f.ci95[1]:.1f}]"
    return f"{f.value:.1f}{other}{interval}, n = {f.n}"
