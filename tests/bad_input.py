"""The table of bad input, as data: keys, files and command lines, each with what its one line has to name.

``tests/test_bad_input_table.py`` and ``tests/test_bad_input.py`` run the rows.
"""

import gzip
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

# ---------------------------------------------------------------- keys

# What no key of a type takes: another type, nothing, too large, text that is no ASCII, a list.
WRONG = {
    int: ("x", "1.5", "nan", "inf", "", "[1,2]", "9" * 400, "ключ", "None"),
    float: ("x", "nan", "", "[1]", "inf", "1e999", "ü", "None"),
    bool: ("maybe", "2", "", "[True]", "nan", "None"),
}
# Keys of other types, and what is out of the range of a number.
VALUES = {
    "seed": ("-1", "4294967296"),
    "model.dtype": ("", "int8", "float32 ", "bfloat16\x1b[2J", "['float32']"),
    "model.remat": ("some", "\u202enone"),
    "model.attention": ("flash",),
    "model.quantization": ("int4", "x" * 10_000),
    "lora.rank": ("0", "-4", "1048577"),
    "lora.alpha": ("0", "-1"),
    "lora.dropout": ("1", "-0.1"),
    "lora.targets": ("()", "('q','embed')", "('',)", "(1,)", "('q',", "('\U0001f980',)"),
    "lora.layers": ("upper:0", "9-2", "x", "-1", "upper:" + "9" * 400),
    "lora.policy": ("", "double"),
    "data.poison_ratio": ("1.5", "-0.1"),
    "data.max_length": ("1", "1048577"),
    "data.template": ("llama", ""),
    "data.format": ("jsonl",),
    "data.columns": ("('a',)", "('a=b','a=c')", "('=',)"),
    "data.date": ("yesterday", "2026-02-30", "\u0662026-01-01"),
    "data.special_tokens": ("drop",),
    "data.loss_on": ("none",),
    "data.validation": ("1", "-0.5"),
    "attack.name": ("", "poison", "mix:trigger=x"),
    "defence.name": ("panaceea", "", "__class__", "panacea\n"),
    "defence.rho": ("-1", "nan", "inf", "first"),
    "defence.clamp": ("soft",),
    "optimizer.schedule": ("step",),
    "optimizer.b1": ("1", "-0.1"),
    "optimizer.eps": ("0",),
    "mesh.data": ("0", "-2"),
    "checkpoint.keep": ("0",),
    "track.to": ("('pager',)", "pager"),
    "track.project": ("",),
    "generate.adapters": ("('x',)", "('a/b=x',)", "('../a=x',)", "('a=x','a=y')"),
    "generate.top_p": ("0", "1.1"),
    "generate.cache_dtype": ("int4",),
    "judge.name": ("oracle", "../refusal"),
    "judge.template": ("oracle",),
    "gate.bounds": ("('hs <= 101',)", "('hs',)", "('nonsense <= 1',)", "('hs <= nan',)", "(3,)"),
    "compare.methods": ("('panaceea',)", "('panacea:rho=x',)", "('panacea:rho',)", "(3,)"),
    "compare.ratios": ("(2,)", "('x',)", "(nan,)"),
    "compare.seeds": ("(-1,)", "('x',)"),
    "compare.vary": ("('lora.rank',)", "('lora.rank=x',)"),
    "compare.guard": ("(1,)", "(1, 101)"),
    "compare.fa_loss": ("-1", "100.5"),
    "heal.methods": ("('sft',)", "('ascent:rho=',)"),
    "sweep.over": ("('lora.rank',)", "('lora.rank=9..2',)", "('lora.rank=1,1',)"),
    "sweep.sampler": ("oracle",),
    "sweep.objectives": ("()", "('hs','hs')", "('speed',)"),
    "after.attack": ("oracle", "vaccine"),
}  # fmt: skip

# One key each out of its range, in a line that names the key in full.
IMPOSSIBLE = {
    "seed": ("-1", "4294967296"),
    "model.dtype": ("int8",),
    "model.remat": ("some",),
    "model.quantization": ("int4",),
    "model.attention": ("flash",),
    "lora.rank": ("0", "-4"),
    "lora.alpha": ("0", "nan"),
    "lora.targets": ("('q', 'embed')", "()"),
    "data.poison_ratio": ("1.5", "-0.1", "nan"),
    "data.num_examples": ("-1",),
    "data.max_length": ("1",),
    "data.template": ("llama",),
    "defence.name": ("panaceea",),
    "defence.rho": ("-1", "nan", "inf"),
    "defence.lam": ("-1", "nan"),
    "defence.every": ("0",),
    "defence.clamp": ("soft",),
    "defence.final_epsilon": ("first",),
    "optimizer.learning_rate": ("-1", "nan"),
    "optimizer.b1": ("1",),
    "optimizer.eps": ("0",),
    "optimizer.schedule": ("step",),
    "optimizer.warmup_ratio": ("2",),
    "train.batch_size": ("0",),
    "train.epochs": ("0",),
    "train.log_every": ("0",),
    "mesh.data": ("0",),
    "mesh.tensor": ("-2",),
    "checkpoint.keep": ("0",),
    "checkpoint.every": ("-1",),
    "generate.batch_size": ("0",),
    "generate.max_new_tokens": ("-1",),
    "generate.temperature": ("-0.5", "inf"),
    "generate.top_p": ("0", "1.1"),
    "generate.seed": ("-1",),
    "generate.cache_dtype": ("int4",),
    "generate.adapters": ("('x',)",),
    "judge.name": ("oracle",),
    "judge.batch_size": ("0",),
    "judge.template": ("oracle",),
    "eval.num_examples": ("-1",),
    "align.optimizer.b2": ("-1",),
    "align.defence.name": ("vacine",),
    "heal.train.batch_size": ("0",),
}


# ---------------------------------------------------------------- files


class Kind(NamedTuple):
    """A kind of file.

    Attributes:
        path: below the folder of the test.
        command: that reads it; ``{root}`` is that folder.
        names: what every line about it holds.
        hostile: content that is well formed as far as anybody looks at first.
        but: damages that it has not: where nobody misses it, or something else stands in.
    """

    path: str
    command: str
    names: str
    hostile: bytes
    but: tuple[str, ...] = ()


_BASE = "--config.model.path={root}/base"
_ASK = "generate --prompts_only --workdir=new --config.data.template=alpaca --config.model.path={root}/base --config.eval.tasks="
_CONVERT = f"convert --out=new {_BASE} "
_LLAMA = b'{"architectures": ["LlamaForCausalLM"], "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 42, "intermediate_size": 48, '
_DEEP = b"[" * 50_000
_LONG = b'{"instruction": "' + b"w1 " * (3 * 2**20) + b'", "output": "w2"}\n'


def _safetensors(header: object, data: bytes = b"\0" * 64) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def _parquet() -> bytes:
    import pyarrow
    import pyarrow.parquet

    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"instruction": [["a list"]], "output": ["w"]}), out)
    return out.getvalue()


KINDS = {
    "config": Kind("base/config.json", _CONVERT, "config.json", _LLAMA + b'"num_hidden_layers": 99999999999}'),
    "config, infinite": Kind("base/config.json", _CONVERT, "config.json", _LLAMA + b'"hidden_size": 1e999}'),
    "config, deep": Kind("base/config.json", _CONVERT, "config.json", b'{"a": ' + _DEEP),
    "weights": Kind(
        "base/model.safetensors", _CONVERT, "base",
        _safetensors({"model.norm.weight": {"dtype": "F32", "shape": [float("inf")], "data_offsets": [0, 64]}}),
    ),
    "weights, deep": Kind("base/model.safetensors", _CONVERT, "base", _safetensors(b'{"a":' + _DEEP)),
    "weights, negative": Kind(
        "base/model.safetensors", _CONVERT, "base",
        _safetensors({"model.norm.weight": {"dtype": "F32", "shape": [-4, -4], "data_offsets": [0, 64]}}),
    ),
    "weights, shared bytes": Kind(
        "base/model.safetensors", _CONVERT, "base",
        _safetensors({n: {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]} for n in ("a", "b")}),
    ),
    "weights, twice": Kind(
        "base/model.safetensors", _CONVERT, "base", _safetensors(b'{"a": {"dtype":"F32","shape":[16],"data_offsets":[0,64]}, "a": 1}'),
    ),
    "index": Kind(
        "sharded/model.safetensors.index.json", "convert --out=new --config.model.path={root}/sharded", "sharded",
        b'{"weight_map": {"model.norm.weight": "../base/model.safetensors"}}',
    ),
    "index, absolute": Kind(
        "sharded/model.safetensors.index.json", "convert --out=new --config.model.path={root}/sharded", "sharded",
        b'{"weight_map": {"model.norm.weight": "/etc/passwd"}}',
    ),
    "tokenizer": Kind("base/tokenizer.json", f"{_ASK}pairs@{{root}}/rows.jsonl", "base", b'{"model": ' + _DEEP),
    "tokenizer settings": Kind(
        "base/tokenizer_config.json", f"{_ASK}pairs@{{root}}/rows.jsonl", "base", b'{"added_tokens_decoder": ' + _DEEP, but=("missing",),
    ),
    "adapter settings": Kind(
        "adapter/adapter_config.json", _CONVERT + "--config.lora.init_from={root}/adapter", "adapter_config.json",
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": "(.|.)+\\d$"}).encode(),
    ),
    "adapter settings, infinite": Kind(
        "adapter/adapter_config.json", _CONVERT + "--config.lora.init_from={root}/adapter", "adapter_config.json",
        b'{"peft_type": "LORA", "r": Infinity, "lora_alpha": 4, "target_modules": ["q_proj"]}',
    ),
    "adapter": Kind(
        "adapter/adapter_model.safetensors", _CONVERT + "--config.lora.init_from={root}/adapter", "adapter",
        _safetensors({"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 64]}}),
    ),
    "epsilon": Kind(
        "epsilon.safetensors", "layers --out=new --epsilon={root}/epsilon.safetensors", "epsilon.safetensors",
        _safetensors({"__metadata__": {"layers": "x"}, "a": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}}),
    ),
    "gguf": Kind(
        "model.gguf", "convert --out=new --gguf={root}/model.gguf", "model.gguf",
        b"GGUF" + (3).to_bytes(4, "little") + (2**60).to_bytes(8, "little") + (2**60).to_bytes(8, "little"),
    ),
    "records": Kind("rows.jsonl", f"{_ASK}pairs@{{root}}/rows.jsonl", "rows.jsonl", _LONG),
    "records, deep": Kind("rows.jsonl", f"{_ASK}pairs@{{root}}/rows.jsonl", "rows.jsonl", b'{"instruction": ' + _DEEP),
    "records, digits": Kind("rows.jsonl", f"{_ASK}pairs@{{root}}/rows.jsonl", "rows.jsonl", b'{"instruction": ' + b"9" * 5000 + b"}"),
    "list of records": Kind("rows.json", f"{_ASK}pairs@{{root}}/rows.json", "rows.json", _DEEP),
    "sheet": Kind("rows.csv", f"{_ASK}pairs@{{root}}/rows.csv", "rows.csv", b"instruction,output\n" + b"w1 " * (3 * 2**20) + b",w2\n"),
    "packed records": Kind(
        "rows.jsonl.gz", f"{_ASK}pairs@{{root}}/rows.jsonl.gz", "rows.jsonl.gz", gzip.compress((b" " * 1023 + b"\n") * 2**10) * 300
    ),
    "parquet": Kind(  # which is told by its last bytes
        "rows.parquet", f"{_ASK}pairs@{{root}}/rows.parquet", "rows.parquet", _parquet(), but=("flipped",)
    ),
    "saved folder": Kind("saved/state.json", f"{_ASK}pairs@{{root}}/saved", "saved", b"[]"),
    "conversations": Kind("rows.jsonl", f"{_ASK}chat@{{root}}/rows.jsonl", "rows.jsonl", b'{"messages": [{"role": {}, "content": 1}]}'),
    "recipe": Kind("recipe.py", "run --workdir=new --config={root}/recipe.py", "recipe.py", b"def get_config(): return get_config()"),
    "recipe, JSON": Kind("recipe.json", "run --workdir=new --config={root}/recipe.json", "recipe.json", b'{"lora": {"rnak": 1}}'),
    "recipe, YAML": Kind(
        "recipe.yaml", "run --workdir=new --config={root}/recipe.yaml", "recipe.yaml", b"!!python/object/apply:os.mkdir ['new']",
    ),
    "gate": Kind("gate.json", "verify --workdir={root}/judged --gate={root}/gate.json", "gate.json", b'{"bounds": ' + _DEEP),
    "radii": Kind(
        "radii.json", "run --workdir=new --config.defence.rho={root}/radii.json", "rho", b'{"layers": Infinity}', but=("missing", "empty")
    ),
    "manifest": Kind(
        "judged/generations/manifest.json", "judge --workdir={root}/judged --config.eval.tasks=pairs@{root}/rows.jsonl", "judged",
        b'{"stage": 1, "status": [], "config": 3, "inputs": ' + _DEEP, but=("missing", "a folder", "a pipe"),  # answers may have none
    ),
    "answers": Kind(
        "judged/generations/pairs.jsonl", "judge --workdir={root}/judged --config.eval.tasks=pairs@{root}/rows.jsonl", "pairs.jsonl",
        b'{"prompt": 1, "response": ["x"]}\n', but=("truncated",),  # a torn last line is what a kill leaves
    ),
    "answers made elsewhere": Kind(
        "pairs_other.json", "score --workdir=new --generations={root}/pairs_other.json --config.eval.tasks=pairs@{root}/rows.jsonl",
        "pairs_other.json", b'[{"prompt": "w1", "response": null}]',
    ),
}  # fmt: skip


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[0] ^= 0xFF
    path.write_bytes(data)


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _unreadable(path: Path) -> None:
    """The start of a process's memory fails to read even for root, whom permissions do not stop."""
    path.unlink()
    path.symlink_to("/proc/self/mem")


DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "flipped": _flip,
    "unreadable": _unreadable,
    "a folder": _folder,
    "a pipe": _pipe,
}


GOOD = '{"instruction": "w1 w2", "output": "w3"}\n'
# Files of records (None: none is there).
SOURCES = [
    (None, ["no such file"]),
    (b"", ["holds no records"]),
    (b"\n\n", ["holds no records"]),
    (GOOD.encode() * 2 + b'{"instruction": "w1", \n', [":3:", "not JSON"]),
    (GOOD.encode() + b"[1, 2]\n", [":2:", "record 2"]),
    (GOOD.encode() * 3 + b'{"instruction": "w1"}\n', [":4:", "record 4", "'output'"]),
    (GOOD.encode() + b'{"instruction": 5, "output": "w3"}\n', [":2:", "'instruction'"]),
    (GOOD.encode() + b'{"instruction": "caf\xe9", "output": "w3"}\n', [":2:", "not UTF-8"]),
    (b"\x1f\x8b\x08\x00garbage", ["not UTF-8"]),
]

# What names no source.
NO_SOURCES = ("", "train.jsonl", "pears@train.jsonl", "pairs@")

# Recipes in Python (None: none is there).
RECIPES = [
    (None, "no such file"),
    ("def get_config(:\n", "SyntaxError"),
    ("import nonsuch\n", "nonsuch"),
    ("def get_config():\n    return 1 / 0\n", "ZeroDivisionError"),
    ("def get_config():\n    raise RuntimeError('one\\ntwo')\n", "one two"),
    ("def get_config():\n    pass\n", "NoneType"),
    ("x = 1\n", "no get_config()"),
    ("from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({'seed': 1})\n", "is missing"),
    ("from panacea_jax.config import get_config as d\ndef get_config():\n    c = d()\n    c.lora.rnak = 3\n    return c\n", "rnak"),
    ("from panacea_jax.config import get_config as d\ndef get_config():\n    c = d().unlock()\n    c.lora.rnak = 3\n    return c\n",
     "config.lora.rnak is no key"),
    ("from panacea_jax.config import get_config as d\ndef get_config():\n    c = d()\n    c.lora.rank = 'x'\n    return c\n", "rank"),
    ("from panacea_jax.config import get_config as d\ndef get_config():\n    c = d()\n    c.lora.rank = 0\n    return c\n",
     "config.lora.rank = 0"),
    ("def get_config():\n    pass\n", "get_config()"),
]  # fmt: skip

Q = "model.layers.1.self_attn.q_proj.weight"
# Changes of a base's tensors.
TENSORS = {
    "missing": (lambda t: t.pop(Q), [Q, "missing"]),
    "misshaped": (lambda t: t.update({Q: t[Q][:, :-1].copy()}), [Q, "shape", "model.safetensors"]),
    "extra_layer": (
        lambda t: t.update({"model.layers.2.mlp.up_proj.weight": t["model.layers.1.mlp.up_proj.weight"]}),
        ["layers.2.mlp.up_proj", "extra"],
    ),
    "extra": (lambda t: t.update({"vision.weight": np.zeros(3, np.float32)}), ["vision.weight", "extra", "model.safetensors"]),
    "integer": (lambda t: t.update({Q: t[Q].astype(np.int8)}), [Q, "I8"]),
}

A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
# Changes of an adapter's tensors.
ADAPTERS = {
    "width": (lambda t: t.update({A: t[A][:, :-1].copy()}), ["layers.0.self_attn.q_proj.lora_A", "shape"]),
    "rank": (lambda t: t.update({A: t[A][:-1].copy()}), ["layers.0.self_attn.q_proj.lora_A", "shape"]),
    "missing": (lambda t: t.pop(A), ["layers.0.self_attn.q_proj.lora_A", "missing"]),
    "layer": (lambda t: t.update({A.replace(".0.", ".7."): t[A]}), ["layers.7.self_attn.q_proj.lora_A", "2 layers"]),
    "place": (lambda t: t.update({"base_model.model.lm_head.lora_A.weight": t[A]}), ["base_model.model.lm_head.lora_A.weight"]),
    "empty": (lambda t: t.clear(), ["no LoRA factors"]),
}


# ---------------------------------------------------------------- command lines

# Every command refuses a flag that it has not, and a word that is none; these are the others.
LINES = {
    "": ("frobnicate", "unknown command"),
    "an escape": ("\x1b[2J", "unknown command"),
    "no work directory": ("run", "--workdir"),
    "an empty one": ("run --workdir=", "--workdir"),
    "a null byte in it": ("judge --workdir=a\0b --config.eval.tasks=pairs@x.jsonl", "a"),
    "one with a name that is too long": ("judge --config.eval.tasks=pairs@x.jsonl --workdir=" + "x" * 5000, "xxx"),
    "two recipes": ("run --config=a.py --config=b.py", "--config is given twice"),
    "a recipe without a name": ("run --config=", "--config"),
    "a recipe's variant in a file of values": ("run --config=a.json:large", "a.json"),
    "a key twice removed": ("run --config.lora.rank.more=3", "lora.rank"),
    "a section": ("run --config.lora=3", "--config.lora=3"),
    "a key by another name": ("run --config.lora.rnak=3", "did you mean --config.lora.rank?"),
    "a key of the class": ("run --config.__class__=3", "--config.__class__"),
    "a key without a value": ("run --config.lora.rank", "--config.lora.rank"),
    "a flag without a value": ("run --workdir", "--workdir"),
    "a number that is a word": ("quickstart --world=first", "--world"),
    "a base that is none": ("quickstart --base=llama", "--base=llama"),
    "a base without its data": ("quickstart --base=smollm2", "--data"),
    "a number of runs that is a word": ("sweep --trials=many", "--trials"),
    "a key to go over that is none": ("sweep --workdir=new --over=nothing=1,2", "nothing"),
    "nothing to go over": ("sweep --workdir=new", "over"),
    "an axis that is none": ("sweep --workdir=new --over=lora.rank", "lora.rank"),
    "a profile of words": ("run --workdir=new --profile=first", "--profile"),
    "a price that is a word": ("plan --topology=v5e:2x2 --price=cheap", "--price"),
    "nothing to plan": ("plan --topology=abacus", "config.model.path"),
    "no folder to convert to": ("convert --config.model.path=x", "--out"),
    "no base to convert": ("convert --out=new", "config.model.path"),
    "no adapter to push": ("push --to=a/b", "--adapter"),
    "a script that is none": ("launch --print=abacus", "abacus"),
    "two sources of layers": ("layers --epsilon=a --checkpoint=b", "not both"),
    "a probe below nothing": ("layers --workdir=a --probe=-1", "--probe"),
    "nothing to report": ("report --workdir=nowhere", "nowhere"),
    "a report beside itself": ("report --workdir=nowhere --against=nowhere", "--against"),
    "answers that are not there": ("score --workdir=new --generations=nowhere.json", "nowhere.json"),
    "a gate that is not there": ("verify --workdir=new --gate=nowhere.json", "nowhere.json"),
    "a gate twice": ("verify --workdir=new --gate=x.json --config.gate.bounds=('hs<=1',)", "--gate"),
    "processes without a place": ("run --workdir=new --num_processes=2", "process"),
    "a place without processes": ("run --workdir=new --process_id=1", "process"),
    "a process beyond all": ("run --workdir=new --coordinator=127.0.0.1:1 --num_processes=2 --process_id=2", "process_id"),
    "a source that is none": ("generate --prompts_only --workdir=new --config.model.path=x --config.eval.tasks=pairs", "pairs"),
    "a task that is none": ("generate --prompts_only --workdir=new --config.model.path=x --config.eval.tasks=pears@x", "pears"),
    "a task twice": ("judge --workdir=new --config.eval.tasks=('pairs@x','pairs@x')", "twice"),
    "a hub id that climbs": ("convert --out=new --config.model.path=../../etc/x", "etc"),
    "a model that is a file": ("convert --out=new --config.model.path=/proc/version", "/proc/version"),
}  # fmt: skip

# Words of a command line, and all that its line has to name.
ARGUMENTS = [
    (["frobnicate"], ["unknown command 'frobnicate'", "finetune"]),
    (["finetune", "--wrokdir=x"], ["'wrokdir'", "workdir"]),
    (["doctor", "--workdir=x"], ["'workdir'"]),
    (["finetune", "stray"], ["unexpected argument 'stray'"]),
    (["finetune"], ["--workdir is not set"]),
    (["finetune", "--workdir=runs/[a]"], ["--workdir=runs/[a]: a name with *, ? or [ in it"]),
    (["finetune", "--workdir"], ["--workdir"]),
    (["judge"], ["--workdir is not set"]),
    (["convert"], ["--out is not set"]),
    (["layers"], ["--workdir, --epsilon or --checkpoint"]),
    (["layers", "--epsilon=a", "--checkpoint=b"], ["--epsilon or --checkpoint, not both"]),
    (["layers", "--workdir=a,b", "--epsilon=c"], ["several --workdir, or --epsilon"]),
    (["layers", "--workdir=a,b", "--label=c"], ["--label: 1 names for 2 sources"]),
    (["layers", "--workdir=a", "--against=b"], ["--against", "--probe=N"]),
    (["layers", "--workdir=a", "--probe=-1"], ["--probe=-1"]),
    (["layers", "--workdir=a,b", "--probe=1"], ["--workdir=a,b", "one model"]),
    (["layers", "--workdir=a", "--probe=1", "--checkpoint=b"], ["--checkpoint", "one model"]),
    (["layers", "--probe=1"], ["--workdir is not set"]),
    (["layers", "--probe=1", "--workdir=a"], ["config.model.path is not set"]),
    (["quickstart", "--world=first"], ["--world=first"]),
    (["quickstart", "--config.compare.seeds=(1,)"], ["--config.compare.seeds: panacea quickstart reads no configuration"]),
    (["report", "--workdir=a", "--config", "own"], ["--config: panacea report reads no configuration"]),
    (["finetune", "--config.lora.rnak=3"], ["--config.lora.rnak", "did you mean --config.lora.rank?"]),
    (["finetune", "--config.trian.steps=3"], ["--config.trian.steps", "did you mean --config.train.steps?"]),
    (["finetune", "--noconfig.data.shufle"], ["--config.data.shufle"]),
    (["finetune", "--config.lora.rank=many"], ["--config.lora.rank=many"]),
    (["finetune", "--config.lora.rank=2.5"], ["--config.lora.rank=2.5"]),
    (["finetune", "--config.lora=3"], ["--config.lora=3"]),
    (["finetune", "--config.defence.rho=x"], ["config.defence.rho = x", "or auto"]),
    (["finetune", "--config.defence.sigma=x"], ["--config.defence.sigma=x"]),
    (["finetune", "--config.data.shuffle=maybe"], ["--config.data.shuffle=maybe"]),
    (["finetune", "--config.lora.rank"], ["--config.lora.rank"]),
    (["finetune", "--config"], ["--config"]),
    (["finetune", "--config=a.py", "--config=b.py"], ["--config is given twice"]),
]  # fmt: skip

# Settings of healing without what the method reads.
HEALING = [
    (["name=antidote", "data.harmful="], "config.data.harmful is not set"),
    (["name=antidote", "defence.safety_mask=True", "data.alignment="], "config.data.alignment is not set"),
    (["name=realign"], "config.data.benign is not set"),
    (["name=realign", "defence.benign_ratio=0", "data.alignment="], "config.data.alignment is not set"),
    (["name=safelora"], "config.defence.base is not set"),
    (["name=safelora", "defence.base=none"], "config.defence.base = none: none: no such model folder"),
]  # fmt: skip

# Flags other than those that a work directory was made by.
CHANGED = [
    ("--config.defence.rho=0.75", "config defence.rho: 0.5 there, 0.75 now"),
    ("--config.lora.rank=3", "config lora.rank: 2 there, 3 now"),
    ("--config.train.steps=9", "config train.steps: 4 there, 9 now"),
    (
        "--config.export.without_epsilon=True",
        "config export.without_epsilon: False there, True now",
    ),
]
