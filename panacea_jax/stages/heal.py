"""The command ``heal`` with ``config.heal.methods``: several methods on one finished model, measured side by side, the best exported.

In order: what is asked for, each method in a folder of its own (one that is done is skipped), all of them on the same held-out records,
table and export.
"""

import dataclasses
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from panacea_jax.config import defence_section, make_defence
from panacea_jax.data.sources import fingerprint
from panacea_jax.defences import Ascent
from panacea_jax.defences.spec import Part, parse_stack, slug
from panacea_jax.disk import replacing
from panacea_jax.errors import InputError
from panacea_jax.healing import table
from panacea_jax.healing.methods import BRINGS, allowed, lacking
from panacea_jax.healing.sets import Answered, Exam, HeldOutSet, answer, set_sizes
from panacea_jax.healing.table import Treated
from panacea_jax.healing.trial import changed
from panacea_jax.models import lora
from panacea_jax.models.hub import local_folder
from panacea_jax.models.model import Model
from panacea_jax.models.vocabulary import open_vocabulary
from panacea_jax.parallel import processes
from panacea_jax.progress import say
from panacea_jax.records.jsonl import encode_line
from panacea_jax.stages import lineage
from panacea_jax.stages.held_out import (
    budget_of,
    decisive_for_exam,
    fingerprint_of,
    held_out_sets,
    make_exam,
)
from panacea_jax.stages.lineage import Start
from panacea_jax.stages.rendering import make_template, of_one_day
from panacea_jax.stages.train import check_stage, decisive, train_stage
from panacea_jax.stores import stand_in
from panacea_jax.train.shared import Shared
from panacea_jax.untrusted import read_object
from panacea_jax.workdir import (
    StageFolder,
    read_manifest,
    write_bytes,
    write_json,
    write_text,
)


def heal_stage(config: ConfigDict, workdir: Path, start: Start | None = None) -> Path:
    """Try every method of ``config.heal.methods``; returns the folder of the best, ``WORKDIR/heal/adapter`` or ``…/model``.

    Writes ``WORKDIR/heal/heal.{json,md}`` too, and of each method a folder with what it made, ``answers.jsonl`` and ``seconds.json``. Where
    an ascent moved the weights, noise of the same norm is a line of its own. A method that the data does not allow is left out, with the
    reason in the table.

    Args:
        config: as the stage sees it (``stage_config``).
        workdir: the work directory.
        start: what is healed; by default what ``lineage.to_heal`` finds.

    Raises:
        InputError: something in the configuration, its files or the work directory, or there is nothing to heal.
        Preempted, Diverged: as of ``train_stage``.
    """
    # ---- what is asked for
    parts = [_part(text) for text in config.heal.methods]
    start = start or lineage.to_heal(config, workdir)
    sets, budget = held_out_sets(config, start), budget_of(config)
    there = [name for name in (*BRINGS, "attack") if config.data.get(name, "")]
    made_by = decisive(config, start) | decisive_for_exam(config) | {"defence": list(map(str, parts))}
    inputs = start.inputs() | fingerprint_of(sets)
    for name in there:
        inputs[config.data[name]] = fingerprint(config.data[name], f"config.data.{name}")
    kind = "model" if start.full_parameters else "adapter"
    with StageFolder(workdir, "heal", made_by, inputs) as stage:
        out = stage.folder / kind
        if stage.done:
            say(f"{stage.folder}: done already, skipped")
            return out
        stage.begin()
        config = of_one_day(config, workdir)

        # ---- methods
        tried = _Tried(config, stage.folder, start, sets, there)
        for part in parts:
            tried.run(part)
        tried.run_control()

        # ---- all of them on the same records
        _, tokenizer, _ = open_vocabulary(start.base)
        model = start.open_model(config)
        exam = make_exam(config, sets, make_template(config, tokenizer, workdir), model)
        rows = list(_measured(config, start, tried, model, exam))

        # ---- table, export
        best = table.best_of(rows, budget)
        lines = table.lines_below(best, rows, allowed(there))
        made = tried.folders.get(best.method)
        source = made / "heal" / kind if made else stand_in(start.adapter or local_folder(start.base))
        with replacing(out) as new:
            processes.once(lambda: shutil.copytree(source, new))
        if processes.first():
            found = table.rows_as_json(rows, best, budget)
            write_json(stage.folder / "heal.json", found | {"records": set_sizes(sets), "data": allowed(there)})
            write_text(stage.folder / "heal.md", table.as_markdown(rows, best, budget, lines))
            table.show_rows(rows, best, budget, lines)
        stage.finish({"best": best.method, "base": start.base})
    return out


def _part(text: Any) -> Part:
    part = parse_stack(str(text), "config.heal.methods").heal
    assert part is not None  # validated
    return part


class _Tried:
    """Runs methods, each in a folder of its own.

    Attributes:
        folders: by method, in the order they were asked for; of those that ran.
        left_out: by method, why it did not.
        seconds: by method; None where an earlier process ran it and did not live to say.
    """

    def __init__(
        self, config: ConfigDict, root: Path, start: Start, sets: Sequence[HeldOutSet], there: Sequence[str]
    ) -> None:  # fmt: skip
        self._config, self._start, self._sets, self._there = config, start, sets, there
        self._root, self._shared = root, Shared()
        self.folders: dict[str, Path] = {}
        self.left_out: dict[str, str] = {}
        self.seconds: dict[str, float | None] = {}
        self._norms: list[float] = []

    def run(self, part: Part) -> None:
        """Run one, unless it is done or cannot be."""
        name, folder = str(part), self._root / slug(part)
        if name in self.folders or name in self.left_out:
            return
        config = self._config.copy_and_resolve_references()
        with config.unlocked():
            config.defence = defence_section(part)
        if needs := lacking(make_defence(config.defence), self._there):
            self.left_out[name] = needs
            return
        try:
            method = check_stage(config, "heal", self._start)
        except InputError as error:
            self.left_out[name] = str(error)
            return
        say(f"== heal: {name}")
        note, began = folder / "seconds.json", time.perf_counter()
        done = (folder / "heal" / "manifest.json").is_file()
        train_stage(config, folder, "heal", self._start, apart=self._sets, shared=self._shared)
        if not done and processes.first():
            write_json(note, {"seconds": time.perf_counter() - began})
        self.folders[name] = folder
        self.seconds[name] = read_object(note)["seconds"] if note.is_file() else None
        if isinstance(method, Ascent):
            self._norms.append(read_manifest(folder / "heal")["outcome"]["report"]["norm_epsilon"])

    def run_control(self) -> None:
        """Noise of the norm of the first ascent that moved the weights, if one did."""
        if norms := [norm for norm in self._norms if norm > 0]:
            self.run(Part("random_perturbation", (("rho", float(f"{norms[0]:.6g}")),)))


def _measured(
    config: ConfigDict, start: Start, tried: _Tried, model: Model, exam: Exam
) -> Iterator[Treated]:
    """A line for the model as it came, for each method that ran, and for each that did not."""
    untreated = _weights(config, start, model, None)
    changes = {table.UNTREATED: 0.0}

    def candidates() -> Iterator[Any]:
        yield untreated
        for name, folder in tried.folders.items():
            healed = _weights(config, start, model, folder / "heal")
            changes[name] = float(changed(healed, untreated))
            yield healed

    names = [table.UNTREATED, *tried.folders]
    for name, found in zip(names, answer(model, candidates(), exam), strict=True):
        folder = tried.folders.get(name)
        if folder is not None:
            _write_answers(folder, found)
        yield Treated(name, found.figures, changes[name], tried.seconds.get(name))
    for name, why in tried.left_out.items():
        yield Treated(name, why=why)


def _weights(config: ConfigDict, start: Start, model: Model, made: Path | None) -> Any:
    """What a stage left, or with None what it started from: an adapter, or all weights."""
    if start.full_parameters:
        if made is None:
            return model.weights
        left = dataclasses.replace(start, base=str(made / "model"))
        return left.open_model(config, model.mesh).weights
    return lora.load(made / "adapter" if made else start.adapter, model, frozen=True)


def _write_answers(folder: Path, found: Answered) -> None:
    if processes.first():
        lines = (encode_line(line) for lines in found.lines for line in lines)
        write_bytes(folder / "answers.jsonl", b"".join(lines))
