"""The command ``generate``: answers of the newest stage's model, or of several adapters of one base, to every evaluation set."""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from panacea_jax.data.encode import encode_prompt
from panacea_jax.data.sources import Record, fingerprint, load_records, parse, take
from panacea_jax.data.template import render, template_id
from panacea_jax.data.tokenizer import load_tokenizer
from panacea_jax.errors import InputError
from panacea_jax.evaluate.alpaca_eval import write_model_outputs
from panacea_jax.evaluate.lines import generation_line
from panacea_jax.evaluate.tasks import answer_length, set_names
from panacea_jax.generate.decode import common_prefix, generate
from panacea_jax.generate.journal import Answers
from panacea_jax.generate.sample import Sampling
from panacea_jax.models import lora
from panacea_jax.models.adapter import AdapterSet
from panacea_jax.models.model import Model
from panacea_jax.parallel import processes
from panacea_jax.progress import Progress, say
from panacea_jax.train.stage import base_of, model_inputs, open_model
from panacea_jax.workdir import Stage, sha256_folder

BARE_BASE = "none"
CACHE_DTYPE = {"auto": None, "int8": "int8"}


def eval_records(spec: str, num_examples: int, key: str = "config.eval.tasks") -> list[Record]:
    """The records of one evaluation set: those of its slice, else the first ``num_examples`` (0: all); see ``data.sources.take``.

    Raises:
        InputError: the source cannot be used, or nothing is left of it.
    """
    records = take(load_records(spec, key), spec, num_examples)
    if not records:
        raise InputError(f"{key}: {spec} holds no record to evaluate")
    return records


def find_params(config: ConfigDict, workdir: Path) -> tuple[str, str]:
    """Which weights to decode with: ``(base folder, adapter folder or "")``.

    ``config.generate.adapter`` names a PEFT folder or "none"; left empty, the newest of the stages heal, finetune and align in the work
    directory counts (its ``model/`` in all-parameter mode, else its ``adapter/`` on the base that it was trained on), and without any
    the bare base.

    Raises:
        InputError: the named folder does not exist.
    """
    named = config.generate.adapter
    if named == BARE_BASE:
        return config.model.path, ""
    if named:
        if not Path(named).is_dir():
            raise InputError(f"config.generate.adapter = {named}: no such folder")
        return config.model.path, named
    for stage in ("heal", "finetune", "align"):
        if (workdir / stage / "model" / "config.json").is_file():
            return str(workdir / stage / "model"), ""
        if (workdir / stage / "adapter" / "adapter_config.json").is_file():
            base = config.model.path if stage == "align" else base_of(config, workdir)
            return base, str(workdir / stage / "adapter")
    return config.model.path, ""


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


def decisive(config: ConfigDict, base: str, adapter: str) -> dict[str, Any]:
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
        "model": {"path": base, "dtype": config.model.dtype},
        "adapter": adapter,
        "template": config.data.template,
        "eval": {"tasks": list(config.eval.tasks), "num_examples": config.eval.num_examples},
        "decoding": decoding,
    }


def generate_stage(config: ConfigDict, workdir: Path) -> Path:
    """Write ``WORKDIR/generations/<set>.jsonl`` for every set of ``config.eval.tasks``; returns that folder.

    With ``config.generate.adapters``, ``WORKDIR/NAME/generations/`` for each of them; returns the work directory.

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
    base, adapter = (config.model.path, "") if several else find_params(config, workdir)
    config = config.copy_and_resolve_references()
    sources = {spec: fingerprint(spec, "config.eval.tasks") for spec in specs}
    stages: list[tuple[str, Stage]] = []
    for place, folder in [(workdir / name, folder) for name, folder in several] or [
        (workdir, adapter)
    ]:
        with config.unlocked():
            config.model.path, config.lora.init_from = base, folder
        stage = Stage(
            place, "generations", decisive(config, base, folder), model_inputs(config) | sources
        )
        if stage.done:
            say(f"{stage.folder}: done already, skipped")
        else:
            stages.append((folder, stage))
    result = workdir if several else workdir / "generations"
    if not stages:
        return result

    # ---- prompts, model
    tokenizer = load_tokenizer(base)
    sets = {name: eval_records(spec, config.eval.num_examples) for name, spec in zip(names, specs)}
    model = open_model(config)
    loaded = [lora.load(folder, model) for folder, _ in stages if folder]
    weights: Any = model.weights
    params: Any = loaded[0] if loaded else None
    if len(loaded) > 1:
        params = lora.side_by_side(loaded)
    elif loaded and config.generate.merge:
        weights, params = lora.merge(weights, loaded[0]), None
    ends = eos_ids(tokenizer, model.folder)
    how, seed = sampling(config)
    for _, stage in stages:
        stage.begin()

    # ---- answers
    for name, spec in zip(names, specs):
        length = config.generate.max_new_tokens or answer_length(spec)
        _answer(
            dataclasses.replace(model, weights=weights), params, tokenizer, sets[name], config.data.template,
            [stage.folder / f"{name}.jsonl" for _, stage in stages],
            batch_size=config.generate.batch_size, max_new_tokens=length, eos_ids=ends, pad_id=0,
            sampling=how, seed=seed, cache_dtype=CACHE_DTYPE[config.generate.cache_dtype],
        )  # fmt: skip
        if parse(spec).task == "alpaca_eval" and processes.first():
            for _, stage in stages:
                generator = f"panacea_jax-{stage.folder.parent.resolve().name}"
                write_model_outputs(stage.folder / f"{name}.jsonl", generator)
    for folder, stage in stages:
        stage.finish({"adapter_sha256": sha256_folder(Path(folder), ("*",)) if folder else ""})
    return result


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
