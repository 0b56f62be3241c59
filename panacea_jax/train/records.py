"""The records of a stage: which sources its streams draw on, how many of each, and their fingerprints."""

from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from panacea_jax.data.batches import Stream, lengths
from panacea_jax.data.encode import encode_all
from panacea_jax.data.mixing import first, poison, realignment
from panacea_jax.data.sources import Record, by_safety, fingerprint, load_records, parse
from panacea_jax.defences import Defence, Method
from panacea_jax.defences.protocol import mixed_of
from panacea_jax.errors import InputError
from panacea_jax.workdir import sha256_folder


class Source(NamedTuple):
    """What a stream draws on.

    Attributes:
        key: the configuration's key that names it.
        records: in file order, but for a mix, which has an order of its own.
        batch_size: records of a batch.
    """

    key: str
    records: list[Record]
    batch_size: int


def training_records(spec: str, key: str) -> list[Record]:
    """Records to train on. Of BeaverTails, attack and harmful sets take the answers judged unsafe, all others the safe ones.

    Raises:
        InputError: the source is not set or cannot be used, or nothing is left of it.
    """
    if not spec:
        raise InputError(f"{key} is not set: give TASK@WHERE")
    records = load_records(spec, key, need_output=True)
    if parse(spec).task == "beavertails":
        safe = key not in ("config.data.attack", "config.data.harmful")
        records = by_safety(records, safe)
        if not records:
            raise InputError(f"{key}: {spec} holds no record with is_safe {safe}")
    return records


def user_records(config: ConfigDict) -> list[Record]:
    """The user's records, with the share of attack records hidden among them.

    Raises:
        InputError: a source is not set or cannot be used.
    """
    data, key = config.data, "config.data.user"
    user = training_records(data.user, key)
    n = data.num_examples or len(user)
    if not data.attack:
        return first(user, n, key)
    attack = training_records(data.attack, "config.data.attack")
    return poison(user, attack, n, data.poison_ratio, data.off_by_one)


def defender_records(config: ConfigDict, name: str) -> list[Record]:
    """Records of a set of the defender's: alignment, harmful or benign.

    Raises:
        InputError: the source is not set or cannot be used.
    """
    data, key = config.data, f"config.data.{name}"
    records = training_records(data[name], key)
    count = data.get(f"num_{name}") or len(records)  # of the benign ones, always all
    return first(records, count, key, data.off_by_one)


def batch_sizes(train: ConfigDict) -> dict[str, int]:
    """Records of one batch of each stream, by a ``train`` section."""
    return {
        "user": train.batch_size,
        "harmful": train.harmful_batch_size,
        "alignment": train.alignment_batch_size,
        "benign": train.batch_size,
    }


def stage_records(config: ConfigDict, stage: str, defence: Method) -> dict[str, Source]:
    """By stream, the main one and those that the defence asks for. A method without steps has no main stream.

    Raises:
        InputError: a source is not set or cannot be used.
    """
    sizes = batch_sizes(config.train)
    sources: dict[str, Source] = {}
    if isinstance(defence, Defence):
        sources["user"] = Source(*_main(config, stage, defence), sizes["user"])
    for name in defence.streams:
        records = defender_records(config, name)
        sources[name] = Source(f"config.data.{name}", records, sizes[name])
    for name in getattr(defence, "paired_streams", ()):
        _check_pairs(name, sources["user"], sources[name])
    for name in mixed_of(defence):
        sources["user"].records.extend(defender_records(config, name))
    return sources


def _main(config: ConfigDict, stage: str, defence: Method) -> tuple[str, list[Record]]:
    """Key and records of the main stream: the user's set, or what takes its place."""
    if _is_mix(defence):
        return "config.data.alignment", _realignment(config, defence)
    if stage == "align":
        return "config.data.alignment", defender_records(config, "alignment")
    return "config.data.user", user_records(config)


def _is_mix(defence: Method) -> bool:
    """Whether the main stream is a mix of refusals and benign records."""
    return hasattr(defence, "benign_ratio")


def _realignment(config: ConfigDict, defence: Any) -> list[Record]:
    """Refusals and benign records for every step, in the order in which they are taken."""
    ratio = defence.benign_ratio
    refusals = defender_records(config, "alignment") if ratio < 1 else []
    benign = defender_records(config, "benign") if ratio > 0 else []
    n = defence.steps * config.train.batch_size
    return realignment(refusals, benign, n, ratio, config.seed, config.data.shuffle)


def _check_pairs(name: str, main: Source, other: Source) -> None:
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
    config: ConfigDict, stage: str, defence: Method, tokenizer: Any, rows: int
) -> dict[str, Stream]:
    """The tokenised streams of a stage; the rows of a batch are a multiple of ``rows``."""
    data = config.data
    repeats, paired = getattr(defence, "repeats", {}), getattr(defence, "paired_streams", ())
    return {
        name: Stream(
            name=name,
            examples=encode_all(source.records, tokenizer, data.template, data.max_length, source.key),
            batch_size=source.batch_size,
            seed=config.seed,
            shuffle=data.shuffle and not _is_mix(defence),  # whose order keeps the ratio in each batch
            ladder=lengths(data.max_length),
            fixed_length=name != "user",
            row_multiple=rows,
            order="user" if name in paired else "",
            repeats=repeats.get(name, 1),
            packing=data.packing,
        )
        for name, source in stage_records(config, stage, defence).items()
    }  # fmt: skip


def stage_inputs(config: ConfigDict, stage: str, defence: Method) -> dict[str, str]:
    """Fingerprints of the sources that the stage reads, and of the models that the defence reads by itself."""
    main = {"align": ("alignment",), "finetune": ("user", "attack"), "heal": ()}[stage]
    if _is_mix(defence):
        main = ("alignment", "benign")
    names = (*main, *defence.streams, *mixed_of(defence))
    found = {
        config.data[name]: fingerprint(config.data[name], f"config.data.{name}")
        for name in names
        if config.data[name]
    }
    for folder in filter(None, getattr(defence, "folders", ())):
        found[folder] = sha256_folder(Path(folder), ("*.json", "*.safetensors"))
    return found
