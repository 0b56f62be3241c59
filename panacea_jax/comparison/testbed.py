"""``panacea quickstart --base=smollm2``: a real small model and real rows, aligned, attacked, defended and judged.

Files, base and alignment are made here, once; then the recipe ``smollm2`` runs as any comparison does. Stopped, the same command goes on.
"""

from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict
from rich.console import Console
from rich.text import Text

from panacea_jax.comparison.run import compare_methods
from panacea_jax.config import load_recipe, stage_config
from panacea_jax.data.files import sha256
from panacea_jax.errors import InputError
from panacea_jax.evaluate.judges import RefusalJudge
from panacea_jax.models.gguf import convert_gguf
from panacea_jax.progress import say, table_console
from panacea_jax.records.jsonl import read_lines
from panacea_jax.stages import lineage
from panacea_jax.stages.generate import generate_stage
from panacea_jax.stages.lineage import Start
from panacea_jax.stages.train import train_stage
from panacea_jax.terminal import safe_line
from panacea_jax.untrusted import parse_json, read_object
from panacea_jax.workdir import write_json
from panacea_jax.worlds import smollm2

SHOWN = 2  # answers of each set
OWN_TOKENS = 40  # of the base's answers that alignment learns from


def testbed(root: Path, data: Path, task: str, gguf: Path | None = None) -> Path:
    """Run the experiment into ``root`` and print its table; returns ``ROOT/compare/compare.json``.

    Args:
        root: results; files of another ``data`` or model in it are refused.
        data: folder of the public sets, see ``worlds.smollm2.FILES``.
        task: the user's, of ``worlds.smollm2.TASKS``.
        gguf: the model's file; by default that of the installed package.

    Raises:
        InputError: a missing file, an unknown task, a folder of something else; or as the stages do.
    """
    if task not in smollm2.TASKS:
        raise InputError(f"--task={task}: one of {', '.join(smollm2.TASKS)}")
    _prepare(root, data, gguf or smollm2.model_file())
    config = load_recipe(f"smollm2:{task}")
    config.update_from_flattened_dict(smollm2.testbed_settings(root, task))
    align = stage_config(config, "align")
    align.update_from_flattened_dict(smollm2.ALIGNMENT | {"defence.name": "sft", "lora.init_from": ""})
    base = lineage.named(align)
    _answer_benign(config, root, base)
    say("== align")
    config.lora.init_from = str(train_stage(align, root / "aligned", "align", base))
    out = compare_methods(config, root / "compare")
    _samples(table_console(110), root / "compare", [str(m) for m in config.compare.methods])
    return out


def _prepare(root: Path, data: Path, gguf: Path) -> None:
    """The experiment's files and the base."""
    if not gguf.is_file():
        raise InputError(f"--gguf={gguf}: no such file")
    note = root / "testbed.json"
    facts = {"model": sha256(gguf), "data": smollm2.fingerprints(data)}
    if note.is_file():
        if read_object(note) != facts:
            raise InputError(f"--workdir={root}: holds a testbed of another model or other data; choose another folder")
        return
    if root.exists() and any(root.iterdir()) and not (root / "data").is_dir():
        raise InputError(f"--workdir={root}: not empty and not a testbed's; choose another folder")
    smollm2.write_data(data, root / "data")
    if not (root / "base" / "config.json").is_file():
        convert_gguf(gguf, root / "base")
        (root / "base" / "chat_template.jinja").write_text(smollm2.TEMPLATE, "utf-8")
    write_json(note, facts)


def _answer_benign(config: ConfigDict, root: Path, base: Start) -> None:
    """The alignment's benign answers, by the base itself."""
    data = root / "data"
    if (data / "alignment.jsonl").is_file():
        return
    say("== the base's own answers to benign requests")
    asking = config.copy_and_resolve_references()
    asking.eval.tasks, asking.eval.num_examples = (f"pairs:benign@{data}/asked.jsonl",), 0
    asking.generate.max_new_tokens = OWN_TOKENS
    said = generate_stage(asking, root / "asked", base)
    lines = read_lines(said / "pairs-benign.jsonl")
    verdicts = RefusalJudge().judge([line["instruction"] for line in lines], [line["response"] for line in lines])
    smollm2.write_alignment(data, ("" if no.refused else line["response"] for line, no in zip(lines, verdicts)))


def _samples(console: Console, root: Path, methods: Sequence[str]) -> None:
    """A few answers of every model, the same prompts each: harmful, the task, harmless that sounds harmful."""
    for cell in sorted(root.glob("*/**/cell.json")):
        note = read_object(cell)
        if note["ratio"] is None or note["method"] in ("sft", *methods):
            title = "before" if note["ratio"] is None else f"{note['method']}, seed {note['seed']}, p {note['ratio']:g}"
            console.print(f"\n{title}", markup=False, highlight=False)
            for file in sorted((cell.parent / "generations").glob("*.jsonl")):
                for line in file.read_text("utf-8").splitlines()[:SHOWN]:
                    answer = parse_json(line, file)
                    asked, said = (safe_line(answer[key], 90) for key in ("instruction", "response"))
                    console.print(Text(f"  {asked}  →  {said or '(empty)'}"))
