"""The command ``generate``: answers of the newest stage's model, or of several adapters of one base, to every evaluation set."""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from panacea_jax.data.encode import encode_prompt
from panacea_jax.data.sources import Record, fingerprint, load_records, parse_source, take
from panacea_jax.data.template import render, template_id
from panacea_jax.data.tokenizer import load_tokenizer
from panacea_jax.errors import InputError
from panacea_jax.evaluate.lines import generation_line
from panacea_jax.evaluate.tasks import answer_length, set_names
from panacea_jax.generate.decode import generate
from panacea_jax.generate.sample import Sampling
from panacea_jax.generate.schedule import common_prefix
from panacea_jax.models import lora
from panacea_jax.models.adapter import AdapterSet
from panacea_jax.models.model import Model
from panacea_jax.parallel import processes
from panacea_jax.progress import Progress, say
from panacea_jax.records.alpaca_eval import write_model_outputs
from panacea_jax.records.journal import Answers
from panacea_jax.stages import lineage
from panacea_jax.stages.lineage import Start
from panacea_jax.workdir import StageFolder, sha256_folder


def eval_records(spec: str, num_examples: int, key: str = "config.eval.tasks") -> list[Record]:
    """The records of one evaluation set: those of its slice, else the first ``num_examples`` (0: all); see ``data.sources.take``.

    Raises:
        InputError: the source cannot be used, or nothing is left of it.
    """
    records = take(load_records(spec, key), spec, num_examples)
    if not records:
        raise InputError(f"{key}: {spec} holds no record to evaluate")
    return records


def eos_ids(tokenizer: Any, folder: Path | None) -> list[int]:
    """End-of-sequence ids: the tokenizer's, and those that ``generation_config.json`` adds (chat models end turns with another)."""
    ids = {int(tokenizer.eos_token_id)}
    path = None if folder is None else folder / "generation_config.json"
    if path is not None and path.is_file():
        from transformers import GenerationConfig

        extra = GenerationConfig.from_pretrained(str(folder), local_files_only=True).eos_token_id
        ids |= {int(i) for i in (extra if isinstance(extra, list) else [extra]) if i is not None}
    return sorted(ids)


def sampling(config: ConfigDict) -> tuple[Sampling, int]:
    """How tokens are chosen, and the seed of the draws."""
    g = config.generate
    return Sampling(g.temperature, g.top_p), config.seed if g.seed is None else g.seed


def decisive_for_answers(config: ConfigDict, start: Start) -> dict[str, Any]:
    """What a manifest of answers is compared by: all that decides them, and nothing else."""
    how, seed = sampling(config)
    decoding = {
        "max_new_tokens": config.generate.max_new_tokens,
        "cache_dtype": config.generate.cache_dtype,
        "merge": config.generate.merge,
        "temperature": float(how.temperature),
    }
    if how.temperature:
        decoding |= {"top_p": float(how.top_p), "seed": seed}
    return {
        "model": {"path": start.base, "dtype": config.model.dtype},
        "adapter": start.adapter,
        "template": config.data.template,
        "eval": {"tasks": list(config.eval.tasks), "num_examples": config.eval.num_examples},
        "decoding": decoding,
    }


def generate_stage(config: ConfigDict, workdir: Path, start: Start | None = None) -> Path:
    """Write ``WORKDIR/generations/<set>.jsonl`` for every set of ``config.eval.tasks``; returns that folder.

    With ``config.generate.adapters``, ``WORKDIR/NAME/generations/`` for each of them; returns the work directory.

    Args:
        config: as fine-tuning sees it.
        workdir: the work directory.
        start: which weights answer; by default what ``lineage.to_answer`` finds.

    Raises:
        InputError: no tasks, or anything about model, adapter, sources or work directory.
    """
    # ---- what is asked for
    specs = list(config.eval.tasks)
    if not specs:
        raise InputError("config.eval.tasks is empty: name at least one TASK@WHERE")
    names = set_names(specs)
    several = [str(entry).partition("=")[::2] for entry in config.generate.adapters]
    for name, folder in several:
        if not Path(folder).is_dir():
            raise InputError(f"config.generate.adapters: {name}={folder}: no such folder")
    if several:
        base = lineage.named(config)
        starts = [(workdir / n, dataclasses.replace(base, adapter=folder)) for n, folder in several]
    else:
        starts = [(workdir, start or lineage.to_answer(config, workdir))]
    sources = {spec: fingerprint(spec, "config.eval.tasks") for spec in specs}
    result = workdir if several else workdir / "generations"
    with contextlib.ExitStack() as stack:
        stages: list[tuple[Start, StageFolder]] = []
        for place, one in starts:
            made_by, inputs = decisive_for_answers(config, one), one.inputs() | sources
            stage = stack.enter_context(StageFolder(place, "generations", made_by, inputs))
            if stage.done:
                say(f"{stage.folder}: done already, skipped")
            else:
                stages.append((one, stage))
        if not stages:
            return result

        # ---- prompts, model
        begun = stages[0][0]
        tokenizer = load_tokenizer(begun.base)
        count = config.eval.num_examples
        sets = {name: eval_records(spec, count) for name, spec in zip(names, specs)}
        model = begun.open_model(config)
        loaded = [lora.load(one.adapter, model, frozen=True) for one, _ in stages if one.adapter]
        weights: Any = model.weights
        params: Any = loaded[0] if loaded else None
        if len(loaded) > 1:
            params = lora.side_by_side(loaded)
        elif loaded and config.generate.merge:
            weights, params = lora.merge(weights, loaded[0]), None
        ends = eos_ids(tokenizer, model.folder)
        how, seed = sampling(config)
        kept = config.generate.cache_dtype
        for _, stage in stages:
            stage.begin()

        # ---- answers
        for name, spec in zip(names, specs):
            length = config.generate.max_new_tokens or answer_length(spec)
            _answer(
                dataclasses.replace(model, weights=weights), params, tokenizer, sets[name], config.data.template,
                [stage.folder / f"{name}.jsonl" for _, stage in stages],
                batch_size=config.generate.batch_size, max_new_tokens=length, eos_ids=ends, pad_id=0,
                sampling=how, seed=seed, cache_dtype=None if kept == "auto" else kept,
            )  # fmt: skip
            if parse_source(spec).task == "alpaca_eval" and processes.first():
                for _, stage in stages:
                    generator = f"panacea_jax-{stage.folder.parent.resolve().name}"
                    write_model_outputs(stage.folder / f"{name}.jsonl", generator)
        for one, stage in stages:
            stage.finish({"adapter_sha256": adapter_sha256(one)})
    return result


def adapter_sha256(start: Start) -> str:
    """Hash of all files of the adapter that answered; "" for none."""
    return sha256_folder(Path(start.adapter), ("*",)) if start.adapter else ""


def _answer(
    model: Model,
    params: Any,
    tokenizer: Any,
    records: Sequence[Record],
    template: str,
    paths: Sequence[Path],
    **settings: Any,
) -> None:
    """Decode one set with each adapter into its own file, from where these end; ``settings`` are those of ``generate``."""
    form = template_id(template, tokenizer)
    prompts = [render(r, template, tokenizer) for r in records]
    ids = [encode_prompt(r, tokenizer, template) for r in records]
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(Answers(path, prompts)) for path in paths]
        todo = [(a, i) for a, file in enumerate(files) for i in file.missing]
        total = len(files) * len(records)
        bar = stack.enter_context(Progress(f"generate {paths[0].stem}", total, total - len(todo)))
        results = generate(
            model, model.weights, params, [ids[i] for _, i in todo],
            adapters=[a for a, _ in todo], indices=[i for _, i in todo],
            slots=max(map(len, ids)) + settings["max_new_tokens"],
            shared=0 if isinstance(params, AdapterSet) else common_prefix(ids), **settings,
        )  # fmt: skip
        for number, tokens, finished in results:
            a, i = todo[number]
            line = generation_line(
                records[i],
                prompt=prompts[i],
                response=tokenizer.decode(tokens, skip_special_tokens=True),
                template=form,
                finished=finished,
            )
            files[a].put(i, line | {"tokens": len(tokens) + finished})
            bar.advance()
