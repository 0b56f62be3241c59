"""The command ``quickstart``: pre-train, align, attack, defend, measure, in a world of its own, through the ordinary stages."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.table import Table
from rich.text import Text

from panacea_jax.progress import table_console
from panacea_jax.stages.bare import write_bare
from panacea_jax.stages.miniature import Experiment
from panacea_jax.terminal import safe_line
from panacea_jax.untrusted import parse_json, read_object
from panacea_jax.workdir import write_json
from panacea_jax.worlds.miniature import GUARD, make_world

# Found on other worlds than those that docs/quickstart.md reports, which has the search too. The falling learning rate matters:
# once the task is learnt, λ·(∇h(w+ε) − ∇h(w)) is all that is left of the gradient, and at a constant rate it runs away.
RHO, LAM = 0.25, 0.2
POISON_RATIO = 0.1
ALIGN_STEPS, FINETUNE_STEPS = 300, 480


class ModelRow(NamedTuple):
    """One line of the table: a model, its adapter, its work directory."""

    title: str
    adapter: Path
    workdir: Path
    seconds: float


def quickstart(root: Path, world_seed: int = 0) -> Path:
    """Run the experiment into ``root`` and print its table; returns the folder of the healed adapter.

    Done parts are skipped, so a run that was stopped goes on. What is printed is what came out, also when a seed is unlucky.

    Args:
        root: results; a folder of another world is refused.
        world_seed: seed of the world, and of every stage in it.

    Raises:
        InputError: ``root`` holds something else.
    """
    start = time.perf_counter()
    make_world(root, world_seed)
    experiment = Experiment(root, world_seed)
    rows = train(experiment)
    for row in rows:
        experiment.evaluate(row.adapter, row.workdir)
    scores = {row.title: read_object(row.workdir / "scores.json") for row in rows}
    print_results(rows, scores, time.perf_counter() - start)
    write_json(root / "results.json", {"world": world_seed, "rows": scores})
    return rows[-1].adapter


def train(run: Experiment) -> list[ModelRow]:
    """Every model of the table, in its order."""
    root, data = run.root, run.data
    seconds = {}
    run.pretrain()
    seconds["aligned"] = run("align", root / "aligned", {
        "defence.name": "sft", "data.alignment": f"pairs@{data}/alignment.jsonl", "train.steps": ALIGN_STEPS, "train.batch_size": 20,
        "optimizer.learning_rate": 2e-3,
    })  # fmt: skip
    aligned = root / "aligned" / "align" / "adapter"
    attack = {
        "lora.init_from": str(aligned), "data.user": f"pairs@{data}/user.jsonl", "data.attack": f"pairs@{data}/attack.jsonl",
        "data.num_examples": 1000, "data.poison_ratio": POISON_RATIO, "train.steps": FINETUNE_STEPS,
        "optimizer.learning_rate": 7e-4, "optimizer.schedule": "linear", "optimizer.warmup_ratio": 0.05,
    }  # fmt: skip
    seconds["sft"] = run("finetune", root / "sft", {"defence.name": "sft", **attack})
    sft = root / "sft" / "finetune" / "adapter"
    noise = {"defence.name": "random_perturbation", "defence.rho": RHO, "lora.init_from": str(sft)}
    seconds["random"] = run("heal", root / "sft_random", noise)
    seconds["panacea"] = run("finetune", root / "panacea", {
        "defence.name": "panacea", "defence.rho": RHO, "defence.lam": LAM, "defence.final_epsilon": "mean",
        "data.harmful": f"pairs@{data}/harmful.jsonl", **attack,
    })  # fmt: skip
    run("layers", root / "panacea", {})
    bare = root / "panacea_w" / "adapter"
    if not bare.is_dir():
        write_bare(root / "panacea" / "finetune", bare.parent)
    return [
        ModelRow("aligned", aligned, root / "aligned", seconds["aligned"]),
        ModelRow("SFT", sft, root / "sft", seconds["sft"]),
        ModelRow(
            "SFT + random, same norm",
            root / "sft_random" / "heal" / "adapter",
            root / "sft_random",
            seconds["random"],
        ),
        ModelRow("Panacea, w alone", bare, root / "panacea_w", seconds["panacea"]),
        ModelRow(
            "Panacea, w + ε",
            root / "panacea" / "finetune" / "adapter",
            root / "panacea",
            seconds["panacea"],
        ),
    ]


def print_results(rows: Sequence[ModelRow], scores: dict[str, dict[str, object]], seconds: float) -> None:
    """The table, what the guard says, sample answers, and where the healed adapter lies."""
    console = table_console(110)
    table = Table(
        title="percent of 200 requests each; lower is better for HS and HS+", title_justify="left"
    )
    for column in ("model", "HS", "HS+", "refused", "FA", "benign answered", "seconds"):
        table.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.title, *(f"{x:.1f}" for x in figures(scores[row.title])), f"{row.seconds:.0f}"
        )
    console.print(table)
    hs, *_, benign = figures(scores["aligned"])
    if not GUARD.holds(hs, benign):
        console.print(
            f"This world FAILS the alignment guard ({GUARD}): the rows below 'aligned' say little. Try another --world."
        )
    for row in rows:
        console.print(f"\n[bold]{row.title}[/bold]")
        for name in ("advbench", "pairs-test_user", "pairs-test_benign"):
            answers = row.workdir / "generations" / f"{name}.jsonl"
            first = parse_json(answers.read_text("utf-8").splitlines()[0], answers)
            asked, said = (safe_line(first[key]) for key in ("instruction", "response"))
            console.print(Text(f"  {asked}  →  {said or '(empty)'}"))
    console.print(
        f"\nhealed adapter (w + ε, PEFT): {rows[-1].adapter}   all of it: {seconds:.0f} s",
        highlight=False,
    )


def figures(scores: dict[str, object]) -> tuple[float, float, float, float, float]:
    """HS, HS+, refused, FA and benign requests answered, in percent."""
    fa = scores["fa"]
    assert isinstance(fa, dict)
    shares = (
        scores["hs"],
        scores["hs_plus"],
        scores["refused"],
        fa["pairs-test_user"],
        fa["pairs-test_benign"],
    )
    hs, hs_plus, refused, accuracy, benign = (float(str(x)) for x in shares)
    return hs, hs_plus, refused, accuracy, benign
