"""The cells of a comparison: method × seed × poison ratio × setting, each align → finetune → heal (→ a later attack) → generate →
judge.

A stage that several cells have in common (an alignment, the SFT fine-tune that heal methods start from) lies in a folder of its own and
is run once. A cell's own folder holds what is its alone: heal, answers, scores, and ``cell.json``, which says that it is done.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from panacea_jax.comparison.results import NOTE
from panacea_jax.comparison.settings import (
    folder_name,
    of_alignment,
    of_base,
    of_finetuning,
    of_healing,
)
from panacea_jax.config import attack_of, defence_section, make_defence, stage_config, varied
from panacea_jax.config.variation import WORLD, Setting, written
from panacea_jax.data.slices import ATTACKED
from panacea_jax.data.sources import parse_source
from panacea_jax.defences.ascent import AUTO
from panacea_jax.defences.spec import Part, Stack, parse_stack, slug
from panacea_jax.errors import InputError
from panacea_jax.evaluate.judges import Judge, make_judge
from panacea_jax.evaluate.tasks import find_task
from panacea_jax.stages import lineage
from panacea_jax.stages.bare import write_bare
from panacea_jax.stages.curve import curve_stage
from panacea_jax.stages.generate import generate_stage
from panacea_jax.stages.held_out import decisive_for_choice
from panacea_jax.stages.judge import judge_stage
from panacea_jax.stages.lineage import Start
from panacea_jax.stages.miniature import Experiment
from panacea_jax.stages.perplexity import perplexity_stage
from panacea_jax.stages.run import check_run
from panacea_jax.stages.streams import stage_records
from panacea_jax.stages.train import decisive, train_stage
from panacea_jax.stages.unchanged import Unchanged
from panacea_jax.stores import by_address
from panacea_jax.train.shared import Shared
from panacea_jax.untrusted import read_object
from panacea_jax.workdir import sha256_json, write_json, write_text
from panacea_jax.worlds.miniature import eval_tasks, make_world, settings, sources

_SFT = Part("sft")
# Rows that are computed together: another machine has room for others.
_NEUTRAL = {"generate": ("batch_size",), "judge": ("batch_size",)}


class Cell(NamedTuple):
    """One run of a comparison.

    Attributes:
        method: what defends.
        seed: in a miniature world, the world too.
        ratio: poison ratio; None for the aligned model, before any fine-tuning.
        setting: what differs from the comparison's configuration.
        title: what tables and folders call it; "": the method.
        bare: the ε of fine-tuning is left out, so that w alone answers.
    """

    method: Stack
    seed: int
    ratio: float | None
    setting: Setting = ()
    title: str = ""
    bare: bool = False

    @property
    def name(self) -> str:
        """What it is called."""
        return self.title or str(self.method)

    def __str__(self) -> str:
        setting = f", {written(self.setting)}" if self.setting else ""
        if self.ratio is None:
            return f"aligned, seed {self.seed}{setting}"
        return f"{self.name}, seed {self.seed}, poison ratio {self.ratio:g}{setting}"


class Cells:
    """Runs cells into one folder; whatever is there already is not run again.

    Attributes:
        root: where everything goes.
        aligns: whether there is an alignment stage.
        starts: whether every seed has a model of its own before fine-tuning: it is aligned here, or of the seed's world.
        used: folders of the cells that were asked for, below ``root``.
    """

    def __init__(
        self, config: ConfigDict, root: Path, aligns: bool, shared: Shared
    ) -> None:
        """
        Args:
            config: of the whole comparison.
            root: where everything goes.
            aligns: whether there is an alignment stage.
            shared: what cells have in common.
        """
        self.root, self.aligns = root, aligns
        self.starts = aligns or bool(config.compare.world)
        self.used: dict[str, None] = {}
        self._unchanged = Unchanged()
        self._judge: Judge | None = None
        self._config = config.copy_and_resolve_references()
        self._seeds: dict[tuple[int, str], ConfigDict] = {}
        self._shared = shared

    def folder(self, cell: Cell) -> Path:
        """Where a cell's answers and scores lie."""
        name = f"seed{cell.seed}" if cell.ratio is None else f"seed{cell.seed}-p{cell.ratio:g}"
        name = f"{name}-{folder_name(cell.setting)}" if cell.setting else name
        # A title need not say all of the method: how long the noise is that stands beside an ε.
        called = cell.name if str(cell.method) in cell.name else f"{cell.name} {cell.method}"
        return self.root / "aligned" / name if cell.ratio is None else self.root / "cells" / slug(called) / name

    def check(
        self,
        methods: Iterable[Stack],
        seed: int,
        ratios: Sequence[float],
        settings: Sequence[Setting] = ((),),
    ) -> None:
        """Find now what a later cell would stumble over: sources that are not set, cannot be read or hold too few records.

        Args:
            methods: of all cells.
            seed: one of those of the cells.
            ratios: poison ratios of all cells.
            settings: of all cells.

        Raises:
            InputError: the first such thing.
        """
        # The ratio changes the user's records alone, which are the same for every method: with one of them all ratios are seen.
        for ratio in ratios[1:]:
            check_run(self._of_cell(Cell(Stack(), seed, ratio)))
        seen = set()
        for method in methods:
            names = tuple(
                part and part.name for part in (method.align, method.finetune, method.heal)
            )
            if names not in seen:
                seen.add(names)
                for setting in settings:
                    config = self._of_cell(Cell(method, seed, ratios[0], setting))
                    check_run(config)
                    if attack := _attack_after(config):
                        stage, changed = attack
                        stage_records(changed, stage, make_defence(changed.defence))

    def run(self, cell: Cell) -> Path:
        """Run one cell unless it is done; returns its folder.

        Raises:
            InputError, Preempted, Diverged: as the stages do; InputError also where another configuration, or other records or another base
                of these names, made the cell.
        """
        config, folder = self._of_cell(cell), self.folder(cell)
        note = folder / NOTE
        made, made_before = _made_by(config)
        self.used[folder.relative_to(self.root).as_posix()] = None
        if note.is_file():
            noted = read_object(note)
            if noted.get("config_sha256") not in (made, made_before):
                raise InputError(
                    f"{folder}: made by another configuration; choose another --workdir"
                )
            trained = [self.root / where for where in noted["stages"].values()]
            self._unchanged.check(config, [*trained, *folder.glob("after/*/"), folder / "generations"])
            self._check_judge(config, folder)
            return folder
        stages: dict[str, Path] = {}
        main, near = stage_config(config, "finetune"), self._start_folder(cell)
        start = lineage.named(main)
        if self.aligns:
            stages["align"] = near / "align"
            alone = stage_config(self._of_cell(cell._replace(setting=self._until_aligned(cell))), "align")
            # The ratio is none of alignment's business: all ratios share it.
            alone.data.poison_ratio = self._config.data.poison_ratio
            aligned = train_stage(alone, near, "align", shared=self._shared)
            start = lineage.after_alignment(start, aligned, config.align.train.full_parameters)
        # With lora.policy "merged" the merged base lies beside the alignment, or where that would be, once for all that start from it.
        start = lineage.merged_first(main, start, near)
        left = start
        if cell.ratio is not None:
            stages["finetune"] = self._finetune_folder(cell)
            alone = stage_config(self._of_cell(cell._replace(setting=self._until_tuned(cell))), "finetune")
            tuned = train_stage(
                alone, stages["finetune"].parent, "finetune", start, shared=self._shared
            )
            left = _left(start, write_bare(tuned.parent, folder / "bare") if cell.bare else tuned)
        if cell.method.heal:
            heal = stage_config(config, "heal")
            own = self.folder(cell._replace(setting=of_healing(cell.setting)))
            stages["heal"] = own / "heal"
            # The adapter of alignment, or the one that was given; "" where it is part of the base, which then is the aligned model. Of all
            # weights the model.
            healed = dataclasses.replace(left, aligned=start.base if left.full_parameters else start.adapter)
            tuned = train_stage(heal, own, "heal", healed, shared=self._shared)
            left = _left(start, tuned)
        if (attack := _attack_after(main)) and cell.ratio is not None:
            stage, changed = attack
            tuned = train_stage(changed, folder / "after", stage, left, shared=self._shared)
            left = _left(start, tuned)
        generate_stage(main, folder, left)
        judge_stage(main, folder)
        if config.eval.every and list(stages)[-1:] == ["finetune"] and not attack:  # else its checkpoints are not the cell's
            curve_stage(main, folder, start, stages["finetune"])
        if config.eval.perplexity:
            perplexity_stage(main, folder, left)
        found = {stage: str(path.relative_to(self.root)) for stage, path in stages.items()}
        write_json(note, {
            "method": cell.name, "seed": cell.seed, "ratio": cell.ratio, "stages": found, "config_sha256": made,
            **({"setting": dict(cell.setting)} if cell.setting else {}),
        })  # fmt: skip
        return folder

    def _check_judge(self, config: ConfigDict, folder: Path) -> None:
        """Make sure that a cell which is done was judged as the others will be.

        Raises:
            InputError: by another version of the judge.
        """
        self._judge = self._judge or make_judge(config)
        scores, now = folder / f"scores.{self._judge.name}.json", self._judge.version
        if scores.is_file() and (before := read_object(scores)["judge"]["version"]) != now:
            rule = f"move its judgements and its {NOTE} away to judge again"
            raise InputError(f"{folder}: by version {before} of the judge, not {now}; {rule}")

    def is_done(self, cell: Cell) -> bool:
        """Whether a cell has been run."""
        return (self.folder(cell) / NOTE).is_file()

    def epsilon(self, cell: Cell) -> Path | None:
        """The ε that a cell which is done deploys, by the latest of its stages that has one; None where none has."""
        stages = read_object(self.folder(cell) / NOTE)["stages"]
        files = (self.root / stages[name] / "epsilon.safetensors" for name in ("heal", "finetune") if name in stages)
        return next((file for file in files if file.is_file()), None)

    def _start_folder(self, cell: Cell) -> Path:
        """Where all that starts from one alignment lies, or from the model as it came if there is none."""
        start = slug(cell.method.align or _SFT) if self.aligns else "unaligned"
        if setting := self._until_aligned(cell):
            start = f"{start}-{folder_name(setting)}"
        return self.root / "shared" / f"seed{cell.seed}" / start

    def _finetune_folder(self, cell: Cell) -> Path:
        finetune = cell.method.finetune or _SFT
        setting = folder_name(of_finetuning(finetune, cell.setting))  # "" of none
        return self._start_folder(cell) / f"p{cell.ratio:g}" / setting / slug(finetune) / "finetune"

    def _until_aligned(self, cell: Cell) -> Setting:
        """What of a setting the model that is fine-tuned notices."""
        return of_alignment(cell.method.align or _SFT, cell.setting) if self.aligns else of_base(cell.setting)

    def _until_tuned(self, cell: Cell) -> Setting:
        """Likewise the fine-tuned one."""
        read = {*self._until_aligned(cell), *of_finetuning(cell.method.finetune or _SFT, cell.setting)}
        return tuple(pair for pair in cell.setting if pair in read)

    def _of_cell(self, cell: Cell) -> ConfigDict:
        """The ordinary configuration of one cell."""
        config = varied(self._of_seed(cell.seed, dict(cell.setting).get(WORLD, self._config.compare.world)), cell.setting)
        with config.unlocked():
            if cell.ratio is not None:
                config.data.poison_ratio = float(cell.ratio)
            if attack_of(config).asks_differently:
                config.eval.tasks = _asked_both_ways(config.eval.tasks)
            parts = {
                "align": cell.method.align or _SFT if self.aligns else None,
                "heal": cell.method.heal,
            }
            for stage, part in parts.items():
                config[stage].defence = defence_section(part or Part(""))
            config.defence = defence_section(cell.method.finetune or _SFT)
            for section in (config.defence, config.heal.defence):
                folders = make_defence(section).folders if section.name else None
                if folders and not folders[0]:
                    with section.unlocked():
                        section.base = config.model.path  # what the alignment of the comparison starts from
        return config

    def _of_seed(self, seed: int, scale: str) -> ConfigDict:
        """The configuration for one seed; makes its world first, if seeds are worlds."""
        if (seed, scale) not in self._seeds:
            config = self._config.copy_and_resolve_references()
            values: dict[str, Any] = {"seed": seed}
            if scale:
                name = str(seed) if scale == config.compare.world else f"{seed}-{scale}"
                root = self.root / "worlds" / name
                make_world(root, seed, scale)
                world = Experiment(root, seed, scale)
                if not (root / "base" / "done").is_file():
                    world.pretrain()
                    write_text(root / "base" / "done", "")
                values = settings(seed) | sources(world.data) | {
                    "model.path": str(world.base), "eval.tasks": eval_tasks(world.data),
                }  # fmt: skip
            with config.unlocked():
                config.update_from_flattened_dict(values)
            self._seeds[seed, scale] = config
        return self._seeds[seed, scale]


def _attack_after(config: ConfigDict) -> tuple[str, ConfigDict] | None:
    """Stage and configuration of what ``config.after`` does to what a method left; None for nothing.

    Fine-tuning is as before, but for its steps, the poison ratio, of harmful records as they are, and the defence, of which there is none.
    """
    part, after = parse_stack(config.after.attack, "config.after.attack").heal, config.after
    if not (part or after.steps):
        return None
    config = stage_config(config, "finetune")
    with config.unlocked():
        config.defence = defence_section(part or _SFT)
        config.lora.policy = "single"  # what is merged is merged
        config.attack.name = "mix"
        config.train.steps, config.data.poison_ratio = after.steps, float(after.poison_ratio)
    return ("heal" if part else "finetune"), config


def _asked_both_ways(tasks: Iterable[str]) -> tuple[str, ...]:
    """The evaluation sets, and behind them those of harmful prompts as the attacker asks them."""
    both = dict.fromkeys(tasks)
    for spec in list(both):
        source = parse_source(spec)
        if find_task(source.scored_as).role == "harmful" and not source.attacked:
            head = ":".join(filter(None, (source.task, source.slice, source.role)))
            both[f"{head}{ATTACKED}{spec.removeprefix(head)}"] = None
    return tuple(both)


def _left(start: Start, tuned: Path) -> Start:
    """What a stage left, as the next one starts from it."""
    if start.full_parameters:
        return dataclasses.replace(start, base=by_address(tuned), adapter="")
    return dataclasses.replace(start, adapter=by_address(tuned))


def _made_by(config: ConfigDict) -> tuple[str, str]:
    """Hash of what a cell that is done is compared by; and as notes from before have it, in which the neutral keys counted too."""
    return sha256_json(_decisive(config, _NEUTRAL)), sha256_json(_decisive(config))


def _decisive(config: ConfigDict, neutral: Mapping[str, Sequence[str]] = MappingProxyType({})) -> dict[str, Any]:
    """What decides a cell, but for keys of these sections."""
    stages = {
        stage: _of_stage(stage_config(config, stage)) for stage in ("align", "finetune", "heal")
    }
    sections = ("eval", "generate", "judge", *(["after"] if _attack_after(config) else []))
    rest = {key: {k: v for k, v in config[key].to_dict().items() if k not in neutral.get(key, ())} for key in sections}
    if not config.eval.every:  # a key that came later: comparisons from before go on
        rest["eval"].pop("every")
    if not config.judge.adapter:  # likewise
        rest["judge"].pop("adapter")
    if AUTO in (config.defence.rho, config.heal.defence.rho):  # then held-out records choose
        rest["choice"] = decisive_for_choice(config)
    text = json.dumps(stages | rest, default=str)
    return dict(json.loads(text))


def _of_stage(config: ConfigDict) -> dict[str, Any]:
    return decisive(config, lineage.named(config))
