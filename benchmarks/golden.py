"""Golden numbers: what a change that must not change numbers is held against, bit for bit.

    python -m benchmarks.golden write golden.json      # before the change
    python -m benchmarks.golden compare golden.json    # after it, on the same machine; exit code 1 and the names of what differs

A tiny model on the CPU through the command line alone: five steps (or the one shot) of every method, with an adapter and with all
parameters, answers, verdicts, scores, perplexity, layer coefficients, and the plans of three topologies. Bits depend on the machine and on
the versions of jax, so no such file is kept in the repository.
"""

import hashlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from safetensors.numpy import load_file

from panacea_jax.defences import DEFENCES
from tests.runs import Place, make_place, panacea

STEPS = 5
# Hyper-parameters that the tiny model needs other than the methods' own.
SETTINGS: dict[str, dict[str, object]] = {
    "panacea": {"rho": 0.5, "lam": 0.3}, "tar": {"inner_steps": 4, "inner_every": 2}, "t_vaccine": {"layers": 1, "interval": 2},
    "lisa": {"alignment_steps": 2, "finetune_steps": 2}, "realign": {"steps": STEPS}, "repnoise": {"paired": False},
    "ewc": {"lam": 1e3}, "safelora": {"num_layers": 3}, "ascent": {"rho": 0.5},
    "sbr": {"prompts": 4},
}  # fmt: skip
VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    "panacea_mean": ("panacea", {"rho": 0.5, "lam": 0.3, "final_epsilon": "mean"}),
    "panacea_every": ("panacea", {"rho": 0.5, "lam": 0.3, "every": 2}),
    "vlguard_sum": ("vlguard", {"mode": "sum"}),
    "antidote_mask": ("antidote", {"safety_mask": True}),
}
FULL = ("sft", "panacea", "booster", "ldifs", "antidote", "random_perturbation")
TOPOLOGIES = ("gpu:h100x8", "v5e:2x2", "v5p:2x2x1")


def _flags(place: Place, **values: object) -> list[str]:
    """Those of ``Place``, but for hyper-parameters that only some methods have."""
    changed = [f"--config.{key}={value}" for key, value in values.items()]
    ours = [f for f in place.flags(*changed) if not f.startswith("--config.defence.")]
    return ours + [f for f in changed if f.startswith("--config.defence.")]


def _run(command: str, *arguments: object) -> None:
    if code := panacea(command, *arguments):
        raise SystemExit(f"panacea {command}: exit code {code}: {arguments}")


def _tensors(file: Path) -> dict[str, str]:
    """Hash of each tensor of a file."""
    return {n: hashlib.sha256(x.tobytes()).hexdigest()[:16] for n, x in load_file(file).items()}


def _text(file: Path) -> str:
    return file.read_text("utf-8")


def numbers(root: Path) -> dict[str, Any]:
    """Everything, by name."""
    found: dict[str, Any] = {}
    place = make_place(root / "place")
    methods = {name: (name, SETTINGS.get(name, {})) for name in DEFENCES} | VARIANTS

    # ---- every method, on adapters and on all parameters
    unaligned = make_place(root / "unaligned").base
    start = root / "start"
    _run("align", *_flags(place, **{"defence.name": "sft", "train.steps": STEPS}), f"--workdir={start}")
    for full in (False, True):
        for label, (name, settings) in methods.items():
            if full and name not in FULL:
                continue
            stage = DEFENCES[name].stage
            chosen: dict[str, object] = {"defence.name": name, "train.steps": STEPS, "data.benign": place.spec("user")}
            chosen |= {f"defence.{key}": value for key, value in settings.items()}
            if DEFENCES[name]().folders is not None:
                continue  # its base must differ from the aligned model: below
            if full:
                chosen |= {"train.full_parameters": True, "optimizer.learning_rate": 1e-3}
            elif stage == "heal":
                chosen |= {"lora.init_from": start / "align" / "adapter"}
            folder = root / ("full" if full else "lora") / label
            _run(stage, *_flags(place, **chosen), f"--workdir={folder}")
            for file in sorted((folder / stage).rglob("*.safetensors")):
                found[f"{folder.name}/{'full' if full else 'lora'}/{file.name}"] = _tensors(file)
            if stage != "heal":
                lines = [json.loads(line) for line in _text(folder / stage / "metrics.jsonl").splitlines()]
                found[f"{folder.name}/{'full' if full else 'lora'}/loss"] = [line["loss"] for line in lines]

    # ---- what compares with an unaligned base, against the base merged with the aligned adapter
    merged = root / "merged"
    _run("convert", *_flags(place, **{"lora.init_from": start / "align" / "adapter"}), f"--out={merged}")
    chosen = {"defence.name": "safelora", "defence.base": unaligned, "defence.num_layers": 3, "model.path": merged,
              "lora.init_from": root / "lora" / "sft" / "finetune" / "adapter"}  # fmt: skip
    _run("heal", *_flags(place, **chosen), f"--workdir={root / 'safelora'}")
    found["safelora"] = _tensors(root / "safelora" / "heal" / "adapter" / "adapter_model.safetensors")
    chosen |= {"defence.name": "safemerge", "defence.safe": start / "align" / "adapter"}
    del chosen["defence.num_layers"]
    _run("heal", *_flags(place, **chosen), f"--workdir={root / 'safemerge'}")
    found["safemerge"] = _tensors(root / "safemerge" / "heal" / "adapter" / "adapter_model.safetensors")
    chosen = {"defence.name": "asft", "defence.base": unaligned, "model.path": merged, "train.steps": STEPS}
    _run("finetune", *_flags(place, **chosen), f"--workdir={root / 'asft'}")
    found["asft"] = _tensors(root / "asft" / "finetune" / "adapter" / "adapter_model.safetensors")
    chosen = {"defence.name": "resta", "defence.base": place.base, "defence.aligned": start / "align" / "adapter",
              "lora.init_from": root / "lora" / "sft" / "finetune" / "adapter"}  # fmt: skip
    _run("heal", *_flags(place, **chosen), f"--workdir={root / 'resta'}")
    found["resta"] = _tensors(root / "resta" / "heal" / "adapter" / "adapter_model.safetensors")

    # ---- a whole run
    run = root / "run"
    values: dict[str, object] = {
        "align.defence.name": "sft", "align.train.steps": 3, "align.train.batch_size": 4, "heal.defence.name": "random_perturbation",
        "heal.defence.rho": 0.25, "eval.perplexity": True, "defence.rho": 0.5, "defence.lam": 0.3,
    }  # fmt: skip
    _run("run", *_flags(place, **values), f"--workdir={run}")
    for file in sorted(run.glob("**/*.json*")):
        if file.name not in ("manifest.json", "metrics.jsonl", "adapter_config.json"):
            found[f"run/{file.relative_to(run)}"] = _text(file)

    # ---- answers drawn, from an int8 cache, and of several adapters at once
    adapter, other = (root / "lora" / name / "finetune" / "adapter" for name in ("panacea", "sft"))
    for label, more in {
        "drawn": {"generate.temperature": 0.8, "generate.top_p": 0.9, "generate.adapter": adapter},
        "int8": {"generate.cache_dtype": "int8", "generate.adapter": adapter},
        "merged": {"generate.merge": True, "generate.adapter": adapter},
        "several": {"generate.adapters": f"('a={adapter}','b={other}')"},
    }.items():
        _run("generate", *_flags(place, **more), f"--workdir={root / label}")
        for file in sorted((root / label).glob("**/generations/*.jsonl")):
            found[f"{label}/{file.relative_to(root / label)}"] = _text(file)

    # ---- what made all this, by which a stopped run is known again
    for file in sorted(root.glob("**/manifest.json")):
        manifest = json.loads(_text(file))
        # The names of inputs alone: the bytes of an adapter's header are in no fixed order.
        made = {key: manifest[key] for key in ("stage", "config")}
        found[f"made/{file.parent.relative_to(root)}"] = made | {"inputs": sorted(manifest["inputs"])}

    # ---- plans
    for name in TOPOLOGIES:
        folder = root / name.replace(":", "-")
        _run("plan", *_flags(place, **{"model.dtype": "bfloat16", "train.batch_size": 8, "train.harmful_batch_size": 8}),
             f"--topology={name}", f"--workdir={folder}")  # fmt: skip
        plans = json.loads(_text(folder / "plan.json"))
        found[f"plan/{name}"] = [{k: v for k, v in p.items() if k != "compile_seconds"} for p in plans]
    return found


def main(arguments: list[str]) -> int:
    """``write FILE`` or ``compare FILE``."""
    if len(arguments) != 2 or arguments[0] not in ("write", "compare"):
        print("usage: python -m benchmarks.golden write|compare FILE", file=sys.stderr)
        return 2
    what, file = arguments[0], Path(arguments[1])
    root = Path(tempfile.gettempdir()) / "panacea_jax-golden"  # always the same one: paths are among the numbers
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    found = json.loads(json.dumps(numbers(root)))
    if what == "write":
        file.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
        print(f"{len(found)} numbers written to {file}")
        return 0
    before = json.loads(file.read_text("utf-8"))
    different = [name for name in sorted({*before, *found}) if before.get(name) != found.get(name)]
    for name in different:
        print(f"differs: {name}")
    print(f"{len(before) - len(different)} of {len(before)} are equal to the bit")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
