"""What ``doctor`` says of the files: tokenizer, judge and sources."""

from collections.abc import Iterable, Sequence
from typing import Any

from ml_collections import ConfigDict

from panacea_jax.config import make_defence
from panacea_jax.data import files
from panacea_jax.data.encode import check_ids, encode, encode_prompt
from panacea_jax.data.sources import Record, layout_of, load_records
from panacea_jax.errors import InputError
from panacea_jax.evaluate.judges import make_judge, needs_model
from panacea_jax.models.vocabulary import Vocabulary, open_vocabulary
from panacea_jax.stages.doctor_report import NOT_LOOKED_AT, Report, model_folder
from panacea_jax.stages.rendering import make_template
from panacea_jax.stages.streams import defender_records, is_local, training_records, user_records

STREAMS = ("user", "attack", "harmful", "alignment", "benign")


def describe_files(report: Report, config: ConfigDict) -> None:
    """Print what tokenizer, judge and sources hold, and whether they can be used."""
    vocabulary = _tokenizer(report, config)
    _judge(report, config)
    _sources(report, config, vocabulary)


def _tokenizer(report: Report, config: ConfigDict) -> Vocabulary | None:
    with report.noting():
        folder = model_folder(config.model.path) if config.model.path else None
        if folder is None or not folder.is_dir():
            return None
        found = open_vocabulary(folder)
        _, tokenizer, size = found
        rows = [
            ("class", type(tokenizer).__name__),
            ("entries", f"{len(tokenizer):,} ({size:,} rows in the embedding)"),
            ("end of sequence", f"{tokenizer.eos_token!r} ({tokenizer.eos_token_id})"),
            ("prompt template", make_template(config, tokenizer).id),
        ]
        report.table("tokenizer", ("", ""), rows)
        return found
    return None


def _judge(report: Report, config: ConfigDict) -> None:
    """What the judge reads, and whether its folder can be used."""
    name, places = config.judge.name, {key: config.judge[key] for key in ("path", "adapter") if config.judge[key]}
    if not needs_model(name):
        report.table("judge", ("", ""), [(name, "word lists; needs no model")])
        return
    with report.noting():
        local = True
        for key, where in places.items():
            try:
                local = local and files.local(where) is not None
            except InputError as error:
                raise InputError(f"config.judge.{key}: {error}") from error
        read = make_judge(config).version if local else NOT_LOOKED_AT
        report.table("judge", ("", ""), [(name, " + ".join(places.values())), ("judge version", read)])


def _sources(report: Report, config: ConfigDict, vocabulary: Vocabulary | None) -> None:
    alone = _prompts_alone(config)
    keys = [(f"config.data.{name}", config.data[name], True, name not in alone) for name in STREAMS]
    keys += [(f"config.eval.tasks[{i}]", spec, False, False) for i, spec in enumerate(config.eval.tasks)]
    rows = []
    for key, spec, trained, answers in keys:
        if spec:
            with report.noting():
                records = _records(spec, key, trained, answers, config.data)
                rows.append((key, spec, NOT_LOOKED_AT if records is None else f"{len(records):,}"))
                if records and vocabulary:
                    _check_ids(records, vocabulary, config, f"{key}: {spec}", answers)
    if rows:
        report.table("sources", ("key", "source", "#records"), rows)
    _enough(report, config)


def _records(spec: str, key: str, trained: bool, answers: bool, data: ConfigDict) -> list[Record] | None:
    """The records of a local source; None of one on the hub."""
    try:
        if not is_local(spec):
            return None
    except InputError as error:
        raise InputError(f"{key}: {error}") from error
    if trained:
        return training_records(spec, key, layout_of(data), answers)
    return load_records(spec, key, layout=layout_of(data))


def _check_ids(
    records: Sequence[Record], vocabulary: Vocabulary, config: ConfigDict, where: str, answers: bool
) -> None:
    """Whether the model knows every token of what is trained on, or asked."""
    template = make_template(config, vocabulary.tokenizer)
    ids: Iterable[Any] = (encode_prompt(record, template) for record in records)
    if answers:
        ids = (encode(record, template, config.data.max_length).tokens for record in records)
    check_ids(ids, vocabulary.size, where)


def _enough(report: Report, config: ConfigDict) -> None:
    """Whether the local sources hold as many records as the stages will take."""
    data = config.data
    if report.problems:
        return  # a source that cannot be read has said so already
    with report.noting():
        if is_local(data.user) and (not data.attack or is_local(data.attack)):
            user_records(config)
        for name in ("alignment", "harmful"):
            if is_local(data[name]):
                defender_records(config, name, name not in _prompts_alone(config))


def _prompts_alone(config: ConfigDict) -> set[str]:
    """Sets of which no stage's method wants the answers."""
    sections = [section.defence for section in (config, config.align, config.heal) if section.defence.name]
    asked = [item for section in sections for item in make_defence(section).streams.items()]
    return {name for name, _ in asked if all(spec.prompts for other, spec in asked if other == name)}
