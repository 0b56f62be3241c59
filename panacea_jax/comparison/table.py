"""The table of a comparison: on the terminal, as CSV and as Markdown, from the content of compare.json."""

from collections.abc import Iterable, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from panacea_jax.comparison.results import AS_ATTACKED, FIGURES
from panacea_jax.defences.protocol import STAGES
from panacea_jax.progress import table_console
from panacea_jax.reporting.outcomes import TITLES
from panacea_jax.spreadsheet import as_csv_text

_Json = dict[str, Any]
FIGURE_TITLES = {name: TITLES[name] for name in FIGURES}
HEADS = ("method", "p", *FIGURE_TITLES.values(), "HS to SFT", "passes (align, finetune, heal)", "passes / SFT", "time / SFT",
         "step MiB (align, finetune, heal)", "extra data")  # fmt: skip
PERPLEXITY = "perplexity"
ATTACKED = AS_ATTACKED["hs"]
ATTACKED_TITLE = TITLES[ATTACKED]
WORST_HEADS = ("method", "p", "worst HS", "at", "FA there", "worst so far, setting by setting")


def heads_of(result: _Json) -> list[str]:
    """The columns, with one for the settings where some were varied, and what was measured of some rows alone last: HS as the attacker
    asks, and the perplexity of ordinary answers."""
    setting = ["setting"] if "worst" in result else []
    attacked, perplexity = [ATTACKED_TITLE] if _has_attacked(result) else [], [PERPLEXITY] if _has_perplexity(result) else []
    return [*HEADS[:2], *setting, *HEADS[2:], *attacked, *perplexity]


def _has_perplexity(result: _Json) -> bool:
    return any(PERPLEXITY in row for row in result["rows"])


def _has_attacked(result: _Json) -> bool:
    return any(ATTACKED in row["figures"] for row in result["rows"])


def cells_of(row: _Json, settings: bool = False, attacked: bool = False) -> list[str]:
    """One line of the table as text; ``settings``: some were varied; ``attacked``: some were asked as an attacker asks."""
    figures = [figure_text(row["figures"].get(name)) for name in FIGURE_TITLES]
    passes = ", ".join(_passes(row, stage) for stage in STAGES)
    memory = ", ".join(f"{n / 2**20:.0f}" if (n := row["step_bytes"].get(s)) else "–" for s in STAGES)  # fmt: skip
    setting = [row.get("setting", "–")] if settings else []
    return [
        row["method"], "–" if row["ratio"] is None else f"{row['ratio']:g}", *setting, *figures, _test(row["against_sft"]), passes,
        _number(row["passes_to_sft"]), _number(row["time_to_sft"]), memory,
        ", ".join(row["extra_data"]) or "none", *([figure_text(row["figures"].get(ATTACKED))] if attacked else []),
        *([_number(row[PERPLEXITY])] if PERPLEXITY in row else []),
    ]  # fmt: skip


def _lines(result: _Json) -> list[list[str]]:
    settings, attacked = "worst" in result, _has_attacked(result)
    return [cells_of(row, settings, attacked) for row in result["rows"]]


def figure_text(found: _Json | None) -> str:
    """A mean with its interval."""
    if found is None:
        return "–"
    low, high = found["ci95"]
    return f"{found['mean']:.1f} [{low:.1f}, {high:.1f}]"


def _passes(row: _Json, stage: str) -> str:
    """Passes a step, and what looks at whole sets cost on top."""
    steps = [f"{row['passes'][stage]:.3g}"] if row["steps"].get(stage) else []
    once = row["whole_passes"].get(stage, 0)
    return " + ".join(steps + [f"{once:.4g} once"] * (once > 0)) or "–"


def _test(tests: _Json | None) -> str:
    if tests is None or "hs" not in tests:
        return "–"
    difference, p = tests["hs"]["difference"], tests["hs"]["p"]
    return f"{difference:+.1f} ({'p = ' + format(p, '.3f') if p >= 0.001 else 'p < 0.001'})"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def notes(result: _Json) -> list[str]:
    """What has to be known to read the table, a line each."""
    seeds = len(result["seeds"])
    lines = [
        f"Judge {result['judge']}. Figures are percentages, means over {seeds} seed{'s' * (seeds > 1)}; lower is better for HS and HS+. "
        "Empty: harmful prompts that got no answer at all, which HS counts as harmless. "
        + ("Intervals: 95 %, bootstrap over seeds." if seeds > 1 else "Intervals: 95 %, Wilson, over prompts."),
        "HS to SFT: difference on the same prompts, " + (
            f"mean over seeds, with the exact sign-flip test over seeds, two-sided; with {seeds} seeds p is at least {2 / 2**seeds:.4g}. "
            if seeds > 1 else "with exact McNemar over the prompts of the one model. "
        )
        + "Passes: forward + backward a step, as the methods' facts say, and \"once\" those over a whole set, in batches of as many "
        "records as a step's; a one-shot method has no steps. Time: of the steps alone, without compilation and without what is computed "
        "once below an adapter. "
        f"Memory: {result['memory']}.",
        "Every method starts fine-tuning from what its own alignment left, with the same records but for those that it sets apart to "
        "choose by; extra data is what it was given besides what plain SFT reads, alignment records in alignment and the user's in "
        "fine-tuning.",
    ]  # fmt: skip
    if _has_attacked(result):
        lines.append(f"{ATTACKED_TITLE}: the same prompts behind the attack's own words, if it has some; the worst case is of both.")
    if "fa_loss" in result:
        lines.append(
            f"The worst case is of attacks that leave FA within {result['fa_loss']:g} points of the method's own fine-tuning without any "
            "attack; – where none does."
        )
    if result["grid"]:
        count = len(result["grid"][0]["candidates"])
        chosen = ", ".join(found["chosen"] for found in result["grid"])
        seeds_of_choice = _list(result["development"])
        lines.append(
            f"Chosen among {count} candidates each on development seeds {seeds_of_choice}: {chosen}. Rule: {result['rule']}"
        )
        given = [m for m in result["methods"] if m != "sft" and m not in {f["chosen"] for f in result["grid"]}]  # fmt: skip
        if given:
            lines.append(f"As given, not chosen: {', '.join(given)}.")
    lines += result.get("notes", ())
    if failing := [seed for seed, passed in result["guard"].items() if not passed]:
        kind = "Worlds" if result["world"] else "Seeds"
        lines.append(
            f"{kind} that FAIL the alignment guard ({result['bounds']}): {_list(failing)}; their figures are in the means all the same."
        )
    elif result["guard"]:
        lines.append(f"Before any fine-tuning the alignment guard holds ({result['bounds']}).")
    return lines


def _list(values: Sequence[object]) -> str:
    return ", ".join(map(str, values))


def show(result: _Json) -> None:
    """Print the table and its notes."""
    console = table_console(260)
    table = Table(title="comparison", title_justify="left")
    for head in heads_of(result):
        table.add_column(head, overflow="fold", justify="left" if head in ("method", "setting", "extra data") else "right")  # fmt: skip
    for cells in _lines(result):
        table.add_row(*map(escape, cells))
    console.print(table)
    if "worst" in result:
        worst = Table(title="worst case over the settings", title_justify="left")
        for head in WORST_HEADS:
            worst.add_column(head, overflow="fold")
        for cells in _worst_rows(result):
            worst.add_row(*map(escape, cells))
        console.print(worst)
    for line in notes(result):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def markdown(result: _Json) -> str:
    """The table and its notes as Markdown."""
    lines = _markdown_table(heads_of(result), _lines(result))
    if "worst" in result:
        lines += ["", *_markdown_table(WORST_HEADS, _worst_rows(result))]
    return "\n".join([*lines, "", *(f"* {line}" for line in notes(result))]) + "\n"


def _markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [heads, ["---"] * len(heads), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in lines]


def _worst_rows(result: _Json) -> list[list[str]]:
    """The lines of the table of worst cases; none without a harmful set."""
    lines = []
    for row in result["worst"]:
        if found := row.get("hs"):
            fa = _percent(found["fa"])
            so_far = ", ".join(map(_percent, found["cumulative"]))
            lines.append([row["method"], f"{row['ratio']:g}", _percent(found["worst"]), found["setting"] or "–", fa, so_far])
    return lines


def as_csv(result: _Json) -> str:
    """A line a method and ratio, numbers unrounded; an empty cell is not known."""
    parts = ("mean", "low", "high", "worst")
    names = [*FIGURE_TITLES, *([ATTACKED] if _has_attacked(result) else [])]
    heads = [f"{name}_{part}" for name in names for part in parts]
    tests = [f"{name}_{part}" for name in FIGURE_TITLES for part in ("to_sft", "p")]
    by_stage = [(what, stage) for what in ("steps", "passes", "whole_passes", "step_bytes") for stage in STAGES]  # fmt: skip
    stages = [f"{what}_{stage}" for what, stage in by_stage]
    optional = [name for name, there in (("setting", "worst" in result), (PERPLEXITY, _has_perplexity(result))) if there]
    last = ["passes_to_sft", "time_to_sft", "extra_data", *optional]
    lines = [["method", "ratio", "seeds", *heads, *tests, *stages, *last]]
    for row in result["rows"]:
        figures: list[Any] = []
        for name in names:
            found = row["figures"].get(name)
            figures += [found["mean"], *found["ci95"], found["worst"]] if found else [""] * 4
        tested = [(row["against_sft"] or {}).get(name, {}).get(key) for name in FIGURE_TITLES for key in ("difference", "p")]  # fmt: skip
        counts = [row[what].get(stage) for what, stage in by_stage]
        lines.append([row["method"], row["ratio"], " ".join(map(str, row["seeds"])), *figures, *tested, *counts, row["passes_to_sft"],
                      row["time_to_sft"], ", ".join(row["extra_data"]), *(row.get(name) for name in optional)])  # fmt: skip
    return as_csv_text(lines)
