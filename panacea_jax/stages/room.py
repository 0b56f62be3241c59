"""Whether a stage has room on the devices, and which keys make room where it has not."""

import contextlib
from collections.abc import Callable, Iterator

import jax
from absl import logging
from ml_collections import ConfigDict

from panacea_jax.config import batch_sizes
from panacea_jax.defences import Method
from panacea_jax.defences.protocol import has_steps
from panacea_jax.errors import InputError, OutOfMemory, out_of_memory
from panacea_jax.memory import room_of_a_device
from panacea_jax.models.families import config_from_folder
from panacea_jax.models.hub import local_folder
from panacea_jax.parallel import make_mesh
from panacea_jax.planning import cost_model
from panacea_jax.planning.abstract_step import abstract_step, resident
from panacea_jax.stages.lineage import Start

MESH = "more devices on config.mesh.fsdp or .tensor"


def needed_by_a_step(config: ConfigDict, start: Start, method: Method) -> dict[str, int]:
    """Bytes of one device by kind, by the memory model that ``panacea plan`` has too; empty for a method without steps, and where the
    base's shapes are not known.

    Args:
        config: as the stage sees it.
        start: what it starts from.
        method: of the stage.
    """
    if not has_steps(method):
        return {}
    config = config.copy_and_resolve_references()
    config.train.full_parameters = start.full_parameters
    with contextlib.suppress(InputError):
        model = config_from_folder(local_folder(start.base, ["config.json"]))
        step = abstract_step(config, model, make_mesh(**config.mesh))
        return resident(step.state, step.weights) | cost_model.temporary(step)
    return {}


def warn_of_memory(config: ConfigDict, name: str, start: Start, method: Method) -> None:
    """Say in a line, before anything is loaded or compiled, that a stage is not likely to fit."""
    room = room_of_a_device()
    if room is None:
        return
    needed, (there, of) = needed_by_a_step(config, start, method), room
    if sum(needed.values()) > there:
        logging.warning(
            "%s: %s; there are %s %s: it may run out of memory. To need less: %s",
            name, _said(needed), _gib(there), of, keys_of_training(config, start, method),
        )  # fmt: skip


@contextlib.contextmanager
def advised(work: str, keys: str, needed: Callable[[], dict[str, int]] = dict) -> Iterator[None]:
    """Turn the errors of memory that is not there, of any back-end and of the host, into one line of advice.

    Args:
        work: stage.
        keys: what makes it need less.
        needed: what the memory model says, see ``needed_by_a_step``; asked in case of need only.

    Raises:
        OutOfMemory: there was not enough memory in the block.
    """
    try:
        yield
    except Exception as error:
        asked = out_of_memory(error)
        if asked is None:
            raise
        model = f". {_said(found)}; `panacea plan` with these flags says what fits where" if (found := needed()) else ""
        raise OutOfMemory(f"{work}: out of memory while {asked}. To need less: {keys}{model}") from error


def keys_of_training(config: ConfigDict, start: Start, method: Method) -> str:
    """What is left to make a step of training smaller."""
    train, sizes = config.train, batch_sizes(config.train)
    keys = [] if config.model.remat == "full" else ["config.model.remat=full"]
    extra = [name for name, spec in method.streams.items() if not spec.first]  # whose batches are of the method's own size
    streams = ["user", *extra] if has_steps(method) else []
    if max((sizes[name] for name in streams), default=1) > train.accumulate:
        keys.append(f"config.train.accumulate={2 * train.accumulate}")
    names = {"user": "batch_size", "harmful": "harmful_batch_size", "alignment": "alignment_batch_size"}
    keys += [f"a smaller config.train.{names[name]}" for name in streams if name in names and sizes[name] > 1]
    keys.append("a smaller config.data.max_length")
    if not start.full_parameters and not config.model.quantization:
        keys.append("config.model.quantization=nf4")
    return ", ".join([*keys, MESH])


def _said(needed: dict[str, int]) -> str:
    """The memory model's figure, with its largest parts."""
    largest = sorted(needed.items(), key=lambda part: -part[1])[:3]
    parts = ", ".join(f"{kind} {_gib(size)}" for kind, size in largest)
    return f"by the memory model a step needs {_gib(sum(needed.values()))} on each of {jax.device_count()} devices ({parts}, …)"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
