"""The command ``generate``: answers of the newest stage's model, or of several adapters of one base, to every evaluation set."""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from panacea_jax.config import attack_of
from panacea_jax.data.encode import check_ids, encode_prompt
from panacea_jax.data.sources import (
    Record,
    fingerprint,
    layout_of,
    load_records,
    parse_source,
    take,
)
from panacea_jax.data.template import Template
from panacea_jax.errors import InputError
from panacea_jax.evaluate.lines import generation_line
from panacea_jax.evaluate.tasks import answer_length, set_names
from panacea_jax.generate.decode import generate
from panacea_jax.generate.ends import eos_ids
from panacea_jax.generate.sample import Sampling
from panacea_jax.generate.schedule import common_prefix
from panacea_jax.models import lora
from panacea_jax.models.adapter import AdapterSet
from panacea_jax.models.model import Model
from panacea_jax.models.vocabulary import open_vocabulary
from panacea_jax.parallel import processes
from panacea_jax.progress import Progress, say
from panacea_jax.records.alpaca_eval import write_model_outputs
from panacea_jax.records.journal import Answers
from panacea_jax.stages import lineage
from panacea_jax.stages.lineage import Start
from panacea_jax.stages.rendering import decisive_for_prompts, make_template
from panacea_jax.stages.room import MESH, advised
from panacea_jax.stores import stand_in
from panacea_jax.sums import sha256_model
from panacea_jax.workdir import StageFolder


def eval_records(config: ConfigDict, spec: str) -> list[Record]:
    """The records of one evaluation set: those of its slice, else the first ``config.eval.num_examples`` (0: all); see
    ``data.sources.take``.

    Raises:
        InputError: the source cannot be used, or nothing is left of it.
    """
    key = "config.eval.tasks"
    records = take(load_records(spec, key, layout=layout_of(config.data)), spec, config.eval.num_examples)
    if not records:
        raise InputError(f"{key}: {spec} holds no record to evaluate")
    source = parse_source(spec)
    compared = source.task == "chat" and not source.prompts_only
    if compared and (without := [i for i, record in enumerate(records, 1) if not record.reference]):
        where = f"{key}: {spec}: record {without[0]}"
        raise InputError(f"{where} has no answer to compare with; prompts alone are asked as chat:harmful@… or chat:benign@…")
    if source.attacked:
        attack = attack_of(config)
        return [attack.asks(record) for record in records]
    return records


def sampling(config: ConfigDict) -> tuple[Sampling, int]:
    """How tokens are chosen, and the seed of the draws."""
    g = config.generate
    return Sampling(g.temperature, g.top_p), config.seed if g.seed is None else g.seed


# What makes answering need less memory.
KEYS = f"a smaller config.generate.batch_size or .max_new_tokens, config.generate.cache_dtype=int8, config.model.quantization=nf4, {MESH}"


def decisive_for_weights(config: ConfigDict, start: Start) -> dict[str, str]:
    """Which base answers, and in which numbers; "quantization" where it is quantised, which manifests did not say from the first."""
    bits = {"quantization": config.model.quantization} if config.model.quantization else {}
    return {"path": start.base, "dtype": config.model.dtype, **bits}


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
        "model": decisive_for_weights(config, start),
        "adapter": start.adapter,
        **decisive_for_prompts(config),
        "eval": {"tasks": list(config.eval.tasks), "num_examples": config.eval.num_examples},
        "decoding": decoding,
    }


def generate_stage(config: ConfigDict, workdir: Path, start: Start | None = None) -> Path:
    """Write ``WORKDIR/generations/<set>.jsonl`` for every set of ``config.eval.tasks``; returns that folder.

    With ``config.generate.adapters``, ``WORKDIR/NAME/generations/`` for each of them; returns the work directory.

    Args:
        config: as fine-tuning sees it.
        workdir: the work directory.
        start: which weights answer, of several adapters what their base is; by default what ``lineage.to_answer`` and ``lineage.named``
            find.

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
        if not stand_in(folder).is_dir():
            raise InputError(f"config.generate.adapters: {name}={folder}: no such folder")
    if several:
        base = start or lineage.named(config)
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
        stack.enter_context(advised("generate", KEYS))
        begun = stages[0][0]
        _, tokenizer, vocab_size = open_vocabulary(begun.base)
        template = make_template(config, tokenizer, workdir)
        sets = {n: read_prompts(config, spec, template, vocab_size) for n, spec in zip(names, specs)}
        model = begun.open_model(config)
        loaded = [lineage.finished_adapter(one.adapter, model, "answering with") for one, _ in stages if one.adapter]
        weights: Any = model.weights
        params: Any = loaded[0] if loaded else None
        if len(loaded) > 1:
            params = lora.side_by_side(loaded)
        elif loaded and config.generate.merge:
            weights, params = lora.merge(weights, loaded[0]), None
        ends = eos_ids(template, model.folder)
        how, seed = sampling(config)
        kept = config.generate.cache_dtype
        for _, stage in stages:
            stage.begin()

        # ---- answers
        for name, spec in zip(names, specs):
            length = config.generate.max_new_tokens or answer_length(spec)
            _answer(
                dataclasses.replace(model, weights=weights), params, template, sets[name],
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
    """Hash of the adapter that answered; "" for none."""
    return sha256_model(stand_in(start.adapter)) if start.adapter else ""


class Prompt(NamedTuple):
    """What is asked: the record, its text as people read it, and the ids that the model reads."""

    record: Record
    text: str
    ids: list[int]


def read_prompts(
    config: ConfigDict, spec: str, template: Template, vocab_size: int
) -> list[Prompt]:
    """The prompts of one evaluation set.

    Raises:
        InputError: a source that cannot be used, a record that the template has no form for, or a token id from ``vocab_size`` on.
    """
    key, prompts = f"config.eval.tasks: {spec}", []
    for number, record in enumerate(eval_records(config, spec), start=1):
        try:
            text = template.plain(template.prompt(record))
            prompts.append(Prompt(record, text, encode_prompt(record, template)))
        except InputError as error:
            raise InputError(f"{key}: record {number}: {error}") from error
    check_ids((prompt.ids for prompt in prompts), vocab_size, key)
    return prompts


def _answer(
    model: Model,
    params: Any,
    template: Template,
    prompts: Sequence[Prompt],
    paths: Sequence[Path],
    **settings: Any,
) -> None:
    """Decode one set with each adapter into its own file, from where these end; ``settings`` are those of ``generate``."""
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(Answers(path, [prompt.text for prompt in prompts])) for path in paths]
        todo = [(a, i) for a, file in enumerate(files) for i in file.missing]
        total = len(files) * len(prompts)
        bar = stack.enter_context(Progress(f"generate {paths[0].stem}", total, total - len(todo)))
        ids = [prompt.ids for prompt in prompts]
        results = generate(
            model, model.weights, params, [ids[i] for _, i in todo],
            adapters=[a for a, _ in todo], indices=[i for _, i in todo],
            slots=max(map(len, ids)) + settings["max_new_tokens"],
            shared=0 if isinstance(params, AdapterSet) else common_prefix(ids), **settings,
        )  # fmt: skip
        for number, tokens, finished in results:
            a, i = todo[number]
            line = generation_line(
                prompts[i].record,
                prompt=prompts[i].text,
                response=template.tokenizer.decode(tokens, skip_special_tokens=True),
                template=template.id,
                finished=finished,
            )
            files[a].put(i, line | {"tokens": len(tokens) + finished})
            bar.advance()
