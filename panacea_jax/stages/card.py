"""The model card of what a stage leaves, ``README.md`` beside the weights: what it is, made from what, and what was measured.

It is written with the weights and left alone from then on, because people fill in its licence and add words of their own. Only what
stands between the two marks of the scores is renewed, when those weights' answers are judged.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from panacea_jax.data.sources import parse_mixture
from panacea_jax.defences import DEFENCES
from panacea_jax.defences.protocol import hyper_parameters
from panacea_jax.errors import InputError
from panacea_jax.export import WITHOUT_EPSILON
from panacea_jax.models.peft_config import CONFIG_FILE
from panacea_jax.stages import lineage
from panacea_jax.stores import by_address, is_address, stand_in
from panacea_jax.sums import sha256_model
from panacea_jax.untrusted import read_object
from panacea_jax.workdir import manifest_if_any, versions, write_text

CARD = "README.md"
LICENCE = "license:"
_BEGIN, _END = "<!-- scores -->", "<!-- end of scores -->"
_EPSILON = {
    "applied": "**ε is applied**: these weights are w + ε, as they are to be deployed. Do not add ε again.",
    "left out": f"**ε is left out. Do not deploy this**: {WITHOUT_EPSILON}.",
}
_FIGURES = {
    "hs": "HS, harmful answers to harmful requests (lower is better)", "hs_plus": "HS+, the same, and answers that repeat a word",
    "refused": "harmful requests refused", "over_refusal": "harmless requests refused (lower is better)", "empty": "empty answers",
}  # fmt: skip


def write_card(
    folder: Path, stage: str, config: Mapping[str, Any], inputs: Mapping[str, str], outcome: Mapping[str, Any], epsilon: str = ""
) -> None:  # fmt: skip
    """Write the card of an adapter or a model that was just exported.

    Args:
        folder: of the weights.
        stage: align, finetune or heal.
        config: the part of the configuration that decided the outcome, as a manifest has it.
        inputs: sha256 by input.
        outcome: of the stage.
        epsilon: "applied", "left out", or "" for a method that has none.
    """
    base, section = str(outcome["base"]), config["defence"]
    of_hub = not stand_in(base).expanduser().is_dir()
    defence = DEFENCES[section["name"]]
    chosen = ((name, section.get(name)) for name in hyper_parameters(defence))
    settings = ", ".join(f"{name} {value}" for name, value in chosen if value not in (None, "", []))
    what, library = _kind(folder)
    lines = [
        "---", *([f"base_model: {base}"] if of_hub else []), f"library_name: {library}", "tags:", "- panacea_jax",
        f"# {LICENCE} (fill in, and take the mark before it away; the licences of base and data bind this too)", "---", "",
        f"# {_shown(base)}, {stage} with {defence.facts.title}", "",
        f"{what} `{_shown(base)}`, made by panacea_jax {versions()['panacea_jax']} at the stage {stage}: {outcome['steps']} steps, defence "
        f"{section['name']}{f' ({settings})' if settings else ''}. Its prompts are rendered by the template `{outcome['template']}`.", "",
        *([_EPSILON[epsilon], ""] if epsilon else []),
        "Licence: *not said yet; write it here and above.*", "",
        "## Made from", "", "| | | sha256 |", "|---|---|---|", *_made_from(config, inputs), "",
        "## Scores", "", _BEGIN, "Not measured yet.", _END, "",
    ]  # fmt: skip
    if outcome["warnings"]:
        lines += ["## Warnings of the training", "", *(f"* {warning}" for warning in outcome["warnings"]), ""]
    write_text(folder / CARD, "\n".join(lines))


def _kind(folder: Path) -> tuple[str, str]:
    """What a folder holds, "… of" or "… for", and the library that loads it."""
    if not (folder / CONFIG_FILE).is_file():
        return "All weights of", "transformers"
    lora = read_object(folder / CONFIG_FILE)
    targets = lora["target_modules"]
    where = f"`{targets}`" if isinstance(targets, str) else ", ".join(targets)
    return f"A LoRA adapter (r {lora['r']}, α {lora['lora_alpha']}, on {where}) for", "peft"


def _made_from(config: Mapping[str, Any], inputs: Mapping[str, str]) -> Iterator[str]:
    """A row for every input, with its part in the run."""
    parts = {config["data"][name]: f"{name} records" for name in ("benign", "alignment", "harmful", "attack", "user")}
    parts[by_address(stand_in(config["model"]["path"]).expanduser())] = "base"
    parts[config["lora"]["init_from"]] = "adapter that it went on from"
    for name, digest in inputs.items():
        shown = _shown(name).replace("|", "\\|")
        yield f"| {parts.get(name, 'read too')} | `{shown}` | `{digest}` |"


def _shown(name: str) -> str:
    """A folder or a source without the folders of this machine above it."""
    if "@" not in name:
        return _last(name)
    try:
        sources = [part.partition("@") for part, _ in parse_mixture(name)]
    except InputError:
        return name
    return " + ".join(f"{task}@{_last(where)}" for task, _, where in sources)


def _last(where: str) -> str:
    """The last part of a path; a hub id as it is."""
    path = Path(where).expanduser()
    return path.name if is_address(where) or path.is_absolute() or path.exists() else where


def write_scores(workdir: Path, scores: Mapping[str, Any]) -> None:
    """Put the scores of a work directory's answers into the card of the weights that gave them; nothing where these have none of ours, or
    are no longer the same.

    Args:
        workdir: with ``generations/`` and the scores of them.
        scores: content of its scores.json.
    """
    manifest = manifest_if_any(workdir / "generations")
    if not manifest:
        return
    weights = lineage.answered_by(manifest)
    card = stand_in(weights) / CARD
    if not card.is_file() or manifest["inputs"].get(weights) != sha256_model(stand_in(weights)):
        return
    text = card.read_text("utf-8")
    head, begin, rest = text.partition(_BEGIN)
    _, end, tail = rest.partition(_END)
    if not end:
        return
    changed = "\n".join([f"{head}{begin}", *_scores(scores), f"{end}{tail}"])
    if changed != text:
        write_text(card, changed)


def _scores(scores: Mapping[str, Any]) -> Iterator[str]:
    """The table, with what has to be known to read it."""
    yield from ("| percent | | 95 % interval |", "|---|---|---|")
    intervals = scores["ci95"]
    rows = [(title, scores[name], intervals[name]) for name, title in _FIGURES.items() if scores[name] is not None]
    rows[2:2] = [(f"FA, right answers to `{name}`", value, intervals["fa"][name]) for name, value in scores["fa"].items()]
    for title, value, (low, high) in rows:
        yield f"| {title} | {value:.1f} | {low:.1f} to {high:.1f} |"
    sets = ", ".join(f"`{name}` ({count})" for name, count in scores["counts"].items())
    judge = scores["judge"]
    yield ""
    yield f"By the judge {judge['name']} ({judge['version']}), of these sets (records): {sets}. They say nothing of other requests."
