"""Loading and saving a folder of several safetensors files: memory of the host, bytes read, seconds.

    python benchmarks/loading.py                                          # 2 GB, one process
    python benchmarks/loading.py --dtypes bfloat16 --processes 4 --mesh 1 4 1     # fsdp over four
    python benchmarks/loading.py --dtypes bfloat16 --processes 4 --mesh 1 1 4     # tensor over four

Makes a Llama of random numbers in a temporary folder (three times its size of disk is needed) and then, in fresh processes, loads it, saves
it, and saves it with an adapter merged. Prints JSON lines, one for each step of each process:

    kept      bytes of weights that the process holds
    grew      bytes by which its resident memory was larger at the highest than before the step, by the kernel's own mark (VmHWM)
    times     grew / kept
    layers    grew, in layers of the model as they are stored
    file      the most of it that was pages of mapped files
    read      bytes that it read (rchar of /proc/self/io), and share, that by the bytes of the folder
    seconds, cpu    on the clock, and of the processor

Linux only. What is loaded was just written: no disk is measured.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from panacea_jax.models import lora, tensorfile
from panacea_jax.models.config import read_config
from panacea_jax.models.families import config_from_dict
from panacea_jax.models.model import abstract_model, load
from panacea_jax.models.saving import save_weights
from panacea_jax.models.weights import hf_shapes
from panacea_jax.parallel import make_mesh, processes

DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}
VOCABULARY = 16000
STEPS = ("load", "save", "merge")


# ---- the folder


def llama(hidden: int, layers: int) -> dict[str, Any]:
    """``config.json`` of a Llama of about the usual proportions."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": hidden,
        "intermediate_size": 11 * hidden // 4, "num_hidden_layers": layers, "num_attention_heads": hidden // 64,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 4096,
    }  # fmt: skip


def layers_for(size: float, hidden: int, dtype: str) -> int:
    """Layers with which a model has about ``size`` bytes."""
    parameters = size / DTYPES[dtype].itemsize - 2 * VOCABULARY * hidden
    return max(1, round(parameters / (12.25 * hidden**2)))


def make_folder(folder: Path, config: dict[str, Any], dtype: str, files: int) -> int:
    """Write a model of random numbers in so many safetensors files; returns the bytes of its tensors."""
    kept = DTYPES[dtype]
    numbers = np.random.default_rng(0).standard_normal(2**20, np.float32).astype(kept)
    shapes = hf_shapes(abstract_model(config_from_dict(config))[1])
    entries = [
        tensorfile.Entry(name, shape, kept, partial(np.resize, numbers, shape))
        for name, shape in shapes.items()
    ]
    total = sum(entry.size for entry in entries)
    before = np.cumsum([0, *(entry.size for entry in entries[:-1])])
    names = [f"model-{i + 1:05d}-of-{files:05d}.safetensors" for i in range(files)]
    file_of = {entry.name: names[int(b * files / total)] for entry, b in zip(entries, before)}
    folder.mkdir()
    for name in names:
        tensorfile.write_tensors(folder / name, [e for e in entries if file_of[e.name] == name])
    index = {"weight_map": file_of}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": dtype}))
    return total


# ---- in a fresh process


class Watch:
    """What a block of code does to this process."""

    def __enter__(self) -> "Watch":
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        self._before, self._file = _memory("VmRSS"), _memory("RssFile")
        self.file = 0
        self._over = threading.Event()
        self._sampler = threading.Thread(target=self._sample)
        self._sampler.start()
        self._read, self._cpu, self._start = _read(), time.process_time(), time.perf_counter()
        return self

    def _sample(self) -> None:
        while not self._over.wait(0.01):
            self.file = max(self.file, _memory("RssFile") - self._file)

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._start
        self.cpu = time.process_time() - self._cpu
        self.grew = _memory("VmHWM") - self._before
        self._over.set()
        self._sampler.join()
        self.read = _read() - self._read


def _memory(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) * 1024


def _read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def measure(folder: Path, mesh_sizes: list[int], steps: list[str]) -> list[dict[str, Any]]:
    """The steps, in this process; what is saved goes into folders beside the one loaded."""
    mesh, config = make_mesh(*mesh_sizes), read_config(folder)
    dtype = config["torch_dtype"]
    layer, total = _stored(folder, "model.layers.0."), _stored(folder, "")
    found = []
    with Watch() as watch:
        model = load(folder, mesh=mesh, dtype=dtype)
    arrays = jax.tree.leaves(model.weights)
    kept = sum(s.data.nbytes for x in arrays for s in x.addressable_shards)

    def note(step: str, watch: Watch) -> None:
        found.append(
            {"step": step, "process": jax.process_index(), "kept": kept, "grew": watch.grew, "times": round(watch.grew / kept, 3),
             "layers": round(watch.grew / layer, 2), "file": watch.file, "read": watch.read, "share": round(watch.read / total, 3),
             "seconds": round(watch.seconds, 1), "cpu": round(watch.cpu, 1)}
        )  # fmt: skip

    note("load", watch)
    adapter = lora.init(
        model, 8, 16, ("q", "k", "v", "o", "gate", "up", "down"), key=jax.random.key(0)
    )
    for step in steps[1:]:
        params = adapter if step == "merge" else None
        with Watch() as watch:
            save_weights(model.weights, folder.parent / step, config, adapter=params)
        note(step, watch)
    return found


def _stored(folder: Path, prefix: str) -> int:
    """Bytes of the tensors whose names begin so."""
    names = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    tensors = [t for f in set(names.values()) for t in tensorfile.read_header(folder / f).values()]
    return sum(
        int(np.prod(t.shape)) * t.element.itemsize for t in tensors if t.name.startswith(prefix)
    )


# ---- outside


def run(
    folder: Path, mesh: list[int], count: int = 1, steps: tuple[str, ...] = STEPS
) -> list[dict[str, Any]]:
    """:func:`measure` in so many fresh processes together.

    Raises:
        RuntimeError: one of them failed.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{probe.getsockname()[1]}"
    started = []
    for i in range(count):
        command = [
            sys.executable,
            __file__,
            "--folder",
            folder,
            "--mesh",
            *map(str, mesh),
            "--steps",
            *steps,
        ]
        env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
        if count > 1:
            env |= {
                "JAX_COORDINATOR_ADDRESS": place, "JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(i),
            }  # fmt: skip
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen(command, env=env, text=True, **pipes))
    said = [p.communicate() for p in started]
    if any(p.returncode for p in started):
        raise RuntimeError("\n".join(error for _, error in said))
    return [line for out, _ in said for line in json.loads(out.splitlines()[-1])]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gb", type=float, default=2.0)
    parser.add_argument("--files", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument(
        "--mesh", type=int, nargs=3, default=[1, 1, 1], metavar=("DATA", "FSDP", "TENSOR")
    )
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--steps", nargs="+", default=STEPS, choices=STEPS, help="load comes first")
    # For the fresh processes.
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.folder:
        with processes.joined(processes.find_place()):
            print(json.dumps(measure(args.folder, args.mesh, args.steps)), flush=True)
            processes.leave()
        return
    print(
        f"jax {jax.__version__}, numpy {np.__version__}, mesh {args.mesh}, {args.processes} processes"
    )
    for dtype in args.dtypes:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "model"
            config = llama(args.hidden, layers_for(args.gb * 1e9, args.hidden, dtype))
            total = make_folder(folder, config, dtype, args.files)
            print(
                f"{dtype}, {config['num_hidden_layers']} layers, {total / 1e9:.3f} GB", flush=True
            )
            for line in run(folder, args.mesh, args.processes, args.steps):
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
