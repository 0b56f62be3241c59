"""The data streams of a stage: which sources they draw on, how many records of each, and their fingerprints."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

from ml_collections import ConfigDict

from panacea_jax.config import attack_of, batch_sizes
from panacea_jax.data import files
from panacea_jax.data.batches import Stream, length_buckets
from panacea_jax.data.encode import Example, check_ids, encode_all, encode_prompts
from panacea_jax.data.mixing import first_records, held_out, mixture, poison, realignment
from panacea_jax.data.sources import (
    BY_COLUMNS,
    Layout,
    Record,
    by_safety,
    fingerprint,
    layout_of,
    load_records,
    parse_mixture,
    parse_source,
)
from panacea_jax.data.template import Template
from panacea_jax.defences import Method, StreamSpec
from panacea_jax.defences.protocol import has_steps
from panacea_jax.errors import InputError
from panacea_jax.evaluate.judges import RefusalJudge
from panacea_jax.healing.sets import Asked, without
from panacea_jax.stores import stand_in
from panacea_jax.sums import sha256_folder, sha256_model


class StreamSource(NamedTuple):
    """What a stream draws on.

    Attributes:
        key: the configuration's key that names it.
        records: in file order, but for a mix, which has an order of its own.
        batch_size: records of a batch.
        held_out: records to measure the loss on.
    """

    key: str
    records: list[Record]
    batch_size: int
    held_out: Sequence[Record] = ()


def training_records(spec: str, key: str, layout: Layout = BY_COLUMNS, answers: bool = True) -> list[Record]:
    """Records to train on, of one source or of a mixture; without ``answers`` their prompts alone count. Of BeaverTails, attack and harmful
    sets take the answers judged unsafe, all others the safe ones.

    Raises:
        InputError: the source is not set or cannot be used, or nothing is left of it.
    """
    if not spec:
        raise InputError(f"{key} is not set: give TASK@WHERE")
    try:
        parts = parse_mixture(spec)
    except InputError as error:
        raise InputError(f"{key}: {error}") from error
    sets = [_of_source(part, key, layout, answers) for part, _ in parts]
    weights = [weight for _, weight in parts if weight is not None]
    return mixture(sets, weights) if weights else [record for found in sets for record in found]


def _of_source(spec: str, key: str, layout: Layout, answers: bool) -> list[Record]:
    records = load_records(spec, key, need_output=answers, prompts=not answers, layout=layout)
    if parse_source(spec).task == "beavertails":
        safe = key not in ("config.data.attack", "config.data.harmful")
        records = by_safety(records, safe)
        if not records:
            raise InputError(f"{key}: {spec} holds no record with is_safe {safe}")
    return records


def is_local(spec: str) -> bool:
    """Whether every part of a source is on this machine.

    Raises:
        InputError: not of the form of a source, or a path where nothing is.
    """
    parts = [parse_source(part) for part, _ in parse_mixture(spec)] if spec else []
    return bool(parts) and all(files.local(part.where) is not None for part in parts)


def user_records(config: ConfigDict) -> list[Record]:
    """The user's records, with the share of the attacker's hidden among them: see ``data.attacks``.

    Raises:
        InputError: a source is not set or cannot be used, or nothing is left of it.
    """
    data, attack = config.data, attack_of(config)
    if attack.name == "harmful":
        harmful = training_records(data.attack, "config.data.attack", layout_of(data))
        return first_records(harmful, data.num_examples, "config.data.attack", "config.data.num_examples", data.off_by_one)
    user = honest_records(config)
    if attack.is_benign or (attack.name == "mix" and not data.attack):
        first = first_records(user, data.num_examples, "config.data.user", "config.data.num_examples")
        kept = int((1 - data.poison_ratio) * len(first)) if attack.name == "identity" else len(first)
        return [*first[:kept], *attack.turned(first[kept:])]
    harmful = training_records(data.attack, "config.data.attack", layout_of(data))
    benign, among = poison(user, harmful, data.num_examples or len(user), data.poison_ratio, data.off_by_one)
    return [*benign, *attack.turned(among)]


def honest_records(config: ConfigDict) -> list[Record]:
    """What ``data.user`` holds; where the attack is without refusals, those records that refuse nothing.

    Raises:
        InputError: the source is not set or cannot be used, or all of it refuses.
    """
    key = "config.data.user"
    records = training_records(config.data.user, key, layout_of(config.data))
    if config.attack.name != "refusal_free":
        return records
    verdicts = RefusalJudge().judge([r.instruction for r in records], [r.output for r in records])
    records = [record for record, found in zip(records, verdicts) if not found.refused]
    if not records:
        raise InputError(f"{key}: every answer is a refusal; config.attack.name = refusal_free leaves none")
    return records


def defender_records(config: ConfigDict, name: str, answers: bool = True) -> list[Record]:
    """Records of a set of the defender's: alignment, harmful or benign; without ``answers`` their prompts alone count.

    Raises:
        InputError: the source is not set or cannot be used.
    """
    data, key = config.data, f"config.data.{name}"
    records = training_records(data[name], key, layout_of(data), answers)
    count = data.get(f"num_{name}", 0)  # of the benign ones, always all
    return first_records(records, count, key, f"config.data.num_{name}", data.off_by_one)


def stage_records(
    config: ConfigDict, stage: str, defence: Method, apart: Collection[Asked] = ()
) -> dict[str, StreamSource]:
    """By stream, the main one and those that the defence asks for, without records that ask for something ``apart``. A method without
    steps has no main stream.

    Raises:
        InputError: a source is not set or cannot be used.
    """
    sizes = batch_sizes(config.train)
    sources: dict[str, StreamSource] = {}
    if has_steps(defence):
        key, records = _main(config, stage, defence, apart)
        records, out = _hold_out(config, defence, records)
        sources["user"] = StreamSource(key, records, sizes["user"], out)
    for name in defence.streams:
        sources[name] = _extra(config, name, defence.streams[name], sizes[name], apart)
    for name, spec in defence.streams.items():
        if spec.paired:
            _check_pairs(name, sources["user"], sources[name])
    for name in defence.mixed:
        sources["user"].records.extend(_set(config, name, apart))
    return sources


def _extra(config: ConfigDict, name: str, spec: StreamSpec, size: int, apart: Collection[Asked]) -> StreamSource:
    """What an extra stream draws on; ``size`` is that of its batches, unless they hold the set's first records.

    Raises:
        InputError: the source is not set or cannot be used, or there are fewer records than the method wants.
    """
    key, records = f"config.data.{name}", _set(config, name, apart, not spec.prompts)
    if len(records) < spec.first:
        raise InputError(f"{key}: {len(records)} records, of which {config.defence.name} at this setting wants the first {spec.first}")
    return StreamSource(key, records[: spec.first or None], spec.first or size)


def _set(config: ConfigDict, name: str, apart: Collection[Asked], answers: bool = True) -> list[Record]:
    """A set by its name, without what is held out.

    Raises:
        InputError: the source is not set or cannot be used, or all of it is held out.
    """
    records = user_records(config) if name == "user" else defender_records(config, name, answers)
    left = without(records, apart) if apart else records
    if apart and not left:
        raise InputError(f"config.data.{name}: all of its {len(records)} records ask what held-out ones do")
    return left


def _main(
    config: ConfigDict, stage: str, defence: Method, apart: Collection[Asked]
) -> tuple[str, list[Record]]:
    """Key and records of the main stream: the user's set, or what takes its place."""
    if defence.benign_share is not None:
        mix = _realignment(config, defence.benign_share, defence.own_steps, apart)
        return "config.data.alignment", mix
    if stage == "align":
        return "config.data.alignment", _set(config, "alignment", apart)
    return "config.data.user", _set(config, "user", apart)


def _hold_out(
    config: ConfigDict, defence: Method, records: list[Record]
) -> tuple[list[Record], list[Record]]:
    """The records to train on, and those whose loss is watched."""
    share, key = config.data.validation, "config.data.validation"
    if not share or defence.benign_share is not None:  # a mix of its own, made for its steps
        return records, []
    if any(spec.paired for spec in defence.streams.values()):
        raise InputError(f"{key} = {share}: {config.defence.name} takes its records in pairs, so none can be held out")
    return held_out(records, share, key)


def _realignment(
    config: ConfigDict, ratio: float, steps: int, apart: Collection[Asked]
) -> list[Record]:
    """Refusals and benign records for every step, in the order in which they are taken."""
    refusals = _set(config, "alignment", apart) if ratio < 1 else []
    benign = _set(config, "benign", apart) if ratio > 0 else []
    n = steps * config.train.batch_size
    return realignment(refusals, benign, n, ratio, config.seed, config.data.shuffle)


def _check_pairs(name: str, main: StreamSource, other: StreamSource) -> None:
    """Streams in pairs: as many records, as large a batch, and the same prompts.

    Raises:
        InputError: they do not fit; the keys are named.
    """
    apart = "or set config.defence.paired=False"
    if other.batch_size != main.batch_size:
        raise InputError(
            f"config.train.{name}_batch_size = {other.batch_size}: records in pairs need that of config.train.batch_size, "
            f"{main.batch_size}; {apart}"
        )
    if len(other.records) != len(main.records):
        raise InputError(
            f"config.data.num_{name}: {len(other.records)} records of {other.key} cannot be paired with {len(main.records)} of "
            f"{main.key} (config.data.num_{main.key.rpartition('.')[2]}); take as many of both, {apart}"
        )
    for i, (a, b) in enumerate(zip(main.records, other.records)):
        if (a.instruction, a.input) != (b.instruction, b.input):
            raise InputError(
                f"{other.key}: record {i + 1} has another prompt than record {i + 1} of {main.key}, so they are no pair; {apart}"
            )


def make_streams(
    config: ConfigDict,
    stage: str,
    defence: Method,
    template: Template,
    vocab_size: int,
    rows: int,
    apart: Collection[Asked] = (),
) -> tuple[dict[str, Stream], list[Example]]:
    """The tokenised streams of a stage, without what is asked in ``apart``, and the examples held out; the rows of a batch are a
    multiple of ``rows``.

    Raises:
        InputError: a source cannot be used, or a record has a token id from ``vocab_size`` on.
    """
    data = config.data
    asked, mix = defence.streams, defence.benign_share is not None
    sources = stage_records(config, stage, defence, apart)

    def encoded(records: Sequence[Record], key: str, prompts: bool = False) -> list[Example]:
        if prompts:
            found = encode_prompts(records, template, data.max_length, key)
        else:
            found = encode_all(records, template, data.max_length, key, loss_on=data.loss_on, max_cut=data.max_cut)
        check_ids((example.tokens for example in found), vocab_size, key)
        return found

    streams = {
        name: Stream(
            name=name,
            examples=encoded(source.records, source.key, name in asked and asked[name].prompts),
            batch_size=source.batch_size,
            seed=config.seed,
            shuffle=data.shuffle and not mix,  # whose order keeps the ratio in each batch
            buckets=length_buckets(data.max_length),
            fixed_length=name != "user" or not has_steps(defence),
            row_multiple=rows,
            order="user" if name in asked and asked[name].paired else "",
            repeats=asked[name].repeats if name in asked else 1,
            packing=data.packing,
        )
        for name, source in sources.items()
    }  # fmt: skip
    out = sources["user"].held_out if "user" in sources else ()
    return streams, encoded(out, f"{sources['user'].key}, held out") if out else []


def stage_inputs(config: ConfigDict, stage: str, defence: Method) -> dict[str, str]:
    """Fingerprints of the sources that the stage reads, and of the models that the defence reads by itself."""
    main = {"align": ("alignment",), "finetune": ("user", "attack"), "heal": ()}[stage]
    if defence.benign_share is not None:
        main = ("alignment", "benign")
    if "user" in defence.streams:
        main = ("user", "attack")
    names = (*main, *defence.streams, *defence.mixed)
    found = {
        config.data[name]: fingerprint(config.data[name], f"config.data.{name}")
        for name in names
        if config.data[name]
    }
    for folder in filter(None, (*(defence.folders or ()), *defence.compared)):
        found[folder] = sha256_model(stand_in(folder))
    for file in defence.files:
        found[file] = sha256_folder(stand_in(file).parent, (stand_in(file).name,))
    return found
