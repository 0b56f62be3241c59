"""The command ``doctor``: what this machine has, what a configuration will use of it, and whether
its files can be used.

Nothing is downloaded or trained. Of the base only file headers are read; the adapter of
``config.lora.init_from`` is read whole, as a run would place it.
"""

import platform
from collections.abc import Sequence

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from panacea_jax.memory import limit_of
from panacea_jax.parallel import make_mesh
from panacea_jax.parallel.sharding import batch_rows
from panacea_jax.stages.doctor_files import describe_files
from panacea_jax.stages.doctor_model import describe_attention, describe_memory, describe_model
from panacea_jax.stages.doctor_report import Report, gib
from panacea_jax.workdir import versions


def doctor(config: ConfigDict) -> None:
    """Print what there is and what will be used; complain once all of it is printed.

    Args:
        config: validated configuration; everything about a model is left out when
            ``config.model.path`` is not set.

    Raises:
        InputError: the first problem that was found, after the tables.
    """
    report = Report()
    _versions(report)
    devices = _devices(report)
    mesh = _mesh(report, config, devices) if devices else None
    model = describe_model(report, config)
    describe_attention(report, config, model)
    if model is not None and mesh is not None:
        describe_memory(report, config, model, mesh)
    describe_files(report, config)
    report.end()


def _versions(report: Report) -> None:
    rows = [
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        *versions().items(),
    ]
    report.table("versions", ("", ""), rows)


def _devices(report: Report) -> list[jax.Device]:
    """Every device of every process; empty when JAX finds none."""
    try:
        devices = jax.devices()
    except (
        RuntimeError
    ) as error:  # JAX_PLATFORMS names a back-end whose plugin or driver is missing
        report.problems.append(f"JAX finds no device: {str(error).splitlines()[0]}")
        return []
    kinds: dict[tuple[str, str], list[jax.Device]] = {}
    for device in devices:
        kinds.setdefault((device.platform, device.device_kind), []).append(device)
    rows = [
        (place, kind, str(len(found)), gib(limit_of(found[0]) if found[0] in jax.local_devices() else None))
        for (place, kind), found in kinds.items()
    ]
    title = f"devices ({jax.process_count()} process{'es' * (jax.process_count() > 1)})"
    report.table(title, ("platform", "kind", "#count", "#memory each"), rows)
    return list(devices)


def _mesh(report: Report, config: ConfigDict, devices: Sequence[jax.Device]) -> Mesh | None:
    with report.noting():
        mesh = make_mesh(**config.mesh, devices=devices)
        multiple, size = batch_rows(mesh), config.train.batch_size
        rows = -(-size // multiple) * multiple
        shape = " × ".join(f"{axis} {n}" for axis, n in mesh.shape.items())
        padding = f" ({rows - size} of them padding)" if rows > size else ""
        report.table("mesh", ("", ""), [
            ("shape", shape),
            ("rows of a batch", f"{rows} for config.train.batch_size = {size}{padding}"),
        ])  # fmt: skip
        return mesh
    return None
