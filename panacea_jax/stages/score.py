"""The command ``score``: figures from verdicts that are there, without a model.

Recomputes scores.json, shows how far judges agree, brings in answers made elsewhere, and sets
methods side by side.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from panacea_jax.data.sources import layout_of
from panacea_jax.errors import InputError
from panacea_jax.evaluate import agreement
from panacea_jax.evaluate.compare import compare, figures_table, paired_table, verdict
from panacea_jax.evaluate.results_table import results_csv
from panacea_jax.evaluate.scores import Json
from panacea_jax.progress import table_console
from panacea_jax.records.elsewhere import bring_in
from panacea_jax.records.judged import Judged, load_judged
from panacea_jax.stages.judge import judge_stage
from panacea_jax.stores import by_address
from panacea_jax.untrusted import read_object
from panacea_jax.workdir import write_json, write_text


def score_stage(
    config: ConfigDict,
    workdir: Path,
    *,
    generations: str = "",
    template: str = "",
    against: Sequence[Path] = (),
    undefended: Path | None = None,
    aligned: Path | None = None,
) -> Path:
    """Score a work directory; returns the last file written.

    Writes ``scores.<judge>.json`` for every judge, ``scores.json`` (of the judge it was of before,
    else of config.judge.name), ``results.csv`` (all figures of all judges), with two judges or more ``agreement.json`` and
    ``disagreements.csv``, and with other work directories ``comparison.json``. Repeating it changes
    nothing.

    Args:
        config: read for the judge and, with ``generations``, for eval.tasks and
            generate.max_new_tokens.
        workdir: the work directory.
        generations: answers made elsewhere, to be brought in and judged first (``bring_in``).
        template: id of the template that they were made with.
        against: work directories to compare with.
        undefended: work directory of the model attacked without a defence.
        aligned: work directory of the model before the attack.

    Raises:
        InputError: files that are missing, damaged or do not belong together, or results that
            cannot be compared.
    """
    if (undefended is None) != (aligned is None):
        raise InputError("--undefended and --aligned go together: the attack is measured by both")
    if template and not generations:
        raise InputError("--template says how --generations were made, which is not given")
    if generations:
        _judge_elsewhere(config, workdir, generations, template)
    console = table_console(160)
    judges = load_judged(workdir)
    results = {name: judged.scores() for name, judged in judges.items()}
    written = _write_scores(workdir, results, config.judge.name)
    write_text(workdir / "results.csv", results_csv({workdir.resolve().name: results}))
    console.print(figures_table(f"{by_address(workdir)}: figures [95 %], by judge", results))
    if len(judges) > 1:
        written = _write_agreement(workdir, judges, console)
    others = [*against, *(p for p in (undefended, aligned) if p is not None)]
    if others:
        written = _write_comparison(workdir, judges, others, undefended, aligned, console)
    return written


def _judge_elsewhere(config: ConfigDict, workdir: Path, generations: str, template: str) -> None:
    specs = bring_in(
        generations, workdir, sources=list(config.eval.tasks),
        template=template, max_new_tokens=config.generate.max_new_tokens, layout=layout_of(config.data),
    )  # fmt: skip
    judge_stage(config, workdir, specs)


def _write_scores(workdir: Path, results: Mapping[str, Json], preferred: str) -> Path:
    path = workdir / "scores.json"
    try:
        before = read_object(path)["judge"]["name"]
    except (InputError, KeyError, TypeError):  # none yet, or damaged: it is written anew
        before = preferred
    for name, result in results.items():
        write_json(workdir / f"scores.{name}.json", result)
    write_json(path, results.get(before) or results.get(preferred) or next(iter(results.values())))
    return path


def _write_agreement(workdir: Path, judges: Mapping[str, Judged], console: Console) -> Path:
    found = agreement.agreement(judges)
    write_json(workdir / "agreement.json", found)
    write_text(workdir / "disagreements.csv", agreement.disagreements(judges))
    table = Table(title="agreement of judges (flagged answers)", title_justify="left")
    for column in ("set", "first", "second", "n", "equal", "κ", "both", "only first", "only second", "neither"):  # fmt: skip
        table.add_column(column)
    for pair in found["pairs"]:
        kappa = "undefined: one constant verdict" if pair["kappa"] is None else f"{pair['kappa']:.3f}"  # fmt: skip
        counts = (str(pair[key]) for key in ("both", "only_first", "only_second", "neither"))
        table.add_row(
            pair["set"], *pair["judges"], str(pair["n"]), f"{pair['observed']:.3f}", kappa, *counts
        )
    console.print(table)
    return workdir / "agreement.json"


def _write_comparison(
    workdir: Path,
    judges: Mapping[str, Judged],
    others: Sequence[Path],
    undefended: Path | None,
    aligned: Path | None,
    console: Console,
) -> Path:
    """comparison.json: {judge: content of ``compare.compare``} for the judges that all have seen."""
    loaded = {by_address(workdir): dict(judges)}
    for other in others:
        if other.resolve() == workdir.resolve():
            raise InputError(f"{other} cannot be compared with itself")
        loaded[by_address(other)] = load_judged(other)
    common = [j for j in judges if all(j in found for found in loaded.values())]
    if not common:
        seen = "; ".join(f"{name}: {', '.join(found)}" for name, found in loaded.items())
        raise InputError(f"no judge has seen all of them ({seen})")
    comparisons: dict[str, Json] = {
        judge: compare(
            {name: found[judge] for name, found in loaded.items()},
            undefended=by_address(undefended) if undefended else None,
            aligned=by_address(aligned) if aligned else None,
        )
        for judge in common
    }
    write_json(workdir / "comparison.json", comparisons)
    for judge, comparison in comparisons.items():
        console.print(figures_table(f"judge {judge}: figures [95 %]", comparison["methods"]))
        console.print(paired_table(comparison["tests"]))
        for line in verdict(comparison):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    return workdir / "comparison.json"
