"""Random input to every parser of what strangers hand in: each returns, or raises ``InputError``; nothing else, in bounded memory and time.

    python -m tests.fuzz --inputs=200000

Inputs are well-formed ones with parts exchanged, so that most come past the first check, and plain bytes. What failed once is in
``tests/fuzz_seeds.py``; ``tests/test_fuzz.py`` runs those and a few hundred others in every ``make test``.
"""

import argparse
import functools
import gzip
import json
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from panacea_jax.config import get_config
from panacea_jax.config.axes import parse_axes
from panacea_jax.config.recipes import load_recipe
from panacea_jax.config.variation import read_value
from panacea_jax.data.sources import load_records, parse_mixture, parse_source
from panacea_jax.data.template import Template
from panacea_jax.data.tokenizer import load_tokenizer
from panacea_jax.defences.spec import parse_stack
from panacea_jax.errors import InputError
from panacea_jax.evaluate.gate import parse_gate
from panacea_jax.models.adapter import layer_numbers, target_names
from panacea_jax.models.families import FAMILIES, config_from_folder
from panacea_jax.models.gguf import FAMILIES as GGUF_FAMILIES
from panacea_jax.models.gguf import _open, describe
from panacea_jax.models.gguf_metadata import Metadata
from panacea_jax.models.gguf_tokenizer import make_tokenizer
from panacea_jax.models.peft_config import read_peft_config
from panacea_jax.models.tensorfile import read_header
from panacea_jax.models.weights import find_tensors
from panacea_jax.records.jsonl import read_lines
from panacea_jax.signatures import signed_by
from panacea_jax.untrusted import parsing
from panacea_jax.workdir import read_manifest
from tests.test_signatures import CONTENT, KEY, SIGNATURE
from tests.tiny import write_model

# Bytes beyond what the imports took; seconds of the processor for one input, and how many times that it may wait for one.
MEMORY, SECONDS, WAITS = 2 * 2**30, 20, 30
# Inputs of one call of hypothesis, which remembers them.
PIECE = 1000
# Where files of inputs lie: making and removing folders on a disk takes longer than most parsers do.
FOLDERS = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None

# ---------------------------------------------------------------- strategies

_numbers = st.one_of(
    st.integers(-3, 70), st.sampled_from([2**31, 2**53, 2**63, 2**64, 10**30, 10**400, -(10**400)]),
    st.floats(allow_nan=True, allow_infinity=True),
)  # fmt: skip
_nasty = ("", "\0", "\ud800", "../x", "/etc/passwd", "\x1b[2J", "=1+1", "(a+)+$", "[" * 200, "nan")
_texts = st.one_of(st.text(max_size=12), st.sampled_from(_nasty))
_leaves = st.one_of(st.none(), st.booleans(), _numbers, _texts)
_values = st.recursive(
    _leaves, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(_texts, inner, max_size=4)), max_leaves=8
)


def changed(good: Any) -> st.SearchStrategy[Any]:
    """A good value with some parts exchanged for others or left out."""
    if isinstance(good, dict) and good:
        one = st.one_of(*(changed(value).map(lambda new, key=key: good | {key: new}) for key, value in good.items()))
        all_of_it = st.fixed_dictionaries({}, optional={key: changed(value) for key, value in good.items()})
        less = st.sampled_from(list(good)).map(lambda left: {key: value for key, value in good.items() if key != left})
        more = st.dictionaries(_texts, _values, max_size=2).map(lambda new: good | new)
        return st.one_of(one, one, all_of_it, less, more, _values)
    if isinstance(good, list):
        return st.one_of(st.just(good), st.lists(st.one_of(*map(changed, good)) if good else _values, max_size=5), _values)
    return st.one_of(st.just(good), _values)


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


def torn(data: bytes) -> st.SearchStrategy[bytes]:
    """Good bytes, cut, with some overwritten, or others."""
    cut = st.integers(0, len(data)).map(lambda n: data[:n])
    place = st.tuples(st.integers(0, max(0, len(data) - 1)), st.binary(min_size=1, max_size=8))
    written = st.lists(place, min_size=1, max_size=3).map(functools.partial(_written, data))
    return st.one_of(written, cut, st.binary(max_size=64))


def _written(data: bytes, changes: list[tuple[int, bytes]]) -> bytes:
    for at, new in changes:
        data = data[:at] + new + data[at + len(new) :]
    return data


def _safetensors(header: Any) -> bytes:
    text = header if isinstance(header, bytes) else as_json(header)
    return len(text).to_bytes(8, "little") + text + bytes(64)


HEADER = {
    "__metadata__": {"format": "pt"},
    "model.norm.weight": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]},
    "lm_head.weight": {"dtype": "BF16", "shape": [4, 4], "data_offsets": [32, 64]},
}
INDEX = {"metadata": {"total_size": 64}, "weight_map": dict.fromkeys(("model.norm.weight", "lm_head.weight"), "model-1.safetensors")}
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 42, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5, "rope_theta": 1e4, "hidden_act": "silu", "tie_word_embeddings": False, "sliding_window": 16,
    "layer_types": ["full_attention"] * 2,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 32},
    "query_pre_attn_scalar": 8, "attn_logit_softcapping": 50.0, "use_sliding_window": True, "max_window_layers": 1,
    "text_config": {"model_type": "gemma3_text"}, "id2label": {"0": "a"},
}  # fmt: skip
PEFT = {
    "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 3}, "use_rslora": True,
    "alpha_pattern": {"model.layers.0": 2}, "layers_to_transform": [0], "layers_pattern": "layers", "exclude_modules": "lm_head",
    "init_lora_weights": "pissa", "modules_to_save": ["norm"], "bias": "none",
}  # fmt: skip
ROWS = [
    {"instruction": "w1", "input": "w2", "output": "w3", "label": 1, "category": {"self_harm": True}, "is_safe": False},
    {"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": [{"type": "text", "text": "w2"}]}]},
    {"conversations": [{"from": "human", "value": "w1"}, {"from": "gpt", "value": "w2"}]},
    {"prompt": "w1", "completion": "w2", "response": "w3", "goal": "w4", "target": "w5"},
    {"question": "w1", "answer": "w2 #### 3", "sentence": "w1", "text": "w2", "refusal": "Question: w1\nAnswer: w2"},
]
TASKS = ("pairs", "chat", "gsm8k", "sst2", "ag_news", "alpaca", "beavertails", "refusals", "xstest", "advbench")
SIGNED = (KEY, CONTENT, SIGNATURE)
MANIFEST = {"stage": "finetune", "status": "done", "config": {"lora": {"rank": 2}}, "inputs": {}, "outcome": {}}
GATE = {"bounds": ["hs <= 10", "fa@pairs >= undefended - 2", "credited"], "judge": "refusal", "records": 3, "interval": True}
OVERRIDES = {
    "lora.rank": "4", "lora.targets": "('q','v')", "lora.layers": "upper:2", "defence.rho": "auto", "data.shuffle": "False",
    "optimizer.learning_rate": "1e-4", "eval.tasks": "('pairs@x',)", "generate.seed": "3",
}  # fmt: skip
LINES = [
    "pairs@x.jsonl", "beavertails:only=self_harm@x", "gsm8k@a*2 + sst2@b*1", "panacea:rho=0.5|1,lam=0.1+vaccine:rho=2", "lora.rank=1,2,3",
    "optimizer.learning_rate=1e-5..1e-3:log4", "hs@pairs <= undefended - 2", "upper:2", "0-3,5", "q,v,down",
]  # fmt: skip


@functools.cache
def _gguf() -> bytes:
    """A tiny file of the gguf package's own."""
    import gguf
    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.gguf"
        out = gguf.GGUFWriter(path, "llama")
        for key, value in {"context_length": 64, "embedding_length": 8, "feed_forward_length": 16, "block_count": 1}.items():
            out.add_uint32(f"llama.{key}", value)
        out.add_head_count(2)
        out.add_layer_norm_rms_eps(1e-5)
        out.add_tokenizer_model("llama")
        out.add_token_list(["<unk>", "<s>", "</s>", "a", "b", "ab"])
        out.add_token_scores([0.0, 0.0, 0.0, -1.0, -2.0, -3.0])
        out.add_token_types([2, 3, 3, 1, 1, 1])
        out.add_bos_token_id(1)
        out.add_eos_token_id(2)
        out.add_tensor("token_embd.weight", np.zeros((6, 8), np.float32))
        out.add_tensor("output_norm.weight", np.ones(8, np.float32))
        for write in (out.write_header_to_file, out.write_kv_data_to_file, out.write_tensors_to_file, out.close):
            write()
        return path.read_bytes()


@functools.cache
def _parquet() -> bytes:
    import io

    import pyarrow
    import pyarrow.parquet

    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"instruction": ["w1", "w2"], "output": ["w3", "w4"]}), out)
    return out.getvalue()


@functools.cache
def _tokenizer() -> tuple[Path, dict[str, Any], dict[str, Any]]:
    base = write_model(Path(tempfile.mkdtemp()) / "base")
    return base, *(json.loads((base / name).read_text()) for name in ("tokenizer.json", "tokenizer_config.json"))  # type: ignore[return-value]


# ---------------------------------------------------------------- targets


def put(folder: Path, name: str, data: bytes) -> Path:
    (folder / name).write_bytes(data)
    return folder / name


def _index(folder: Path, data: bytes) -> None:
    put(folder, "model-1.safetensors", _safetensors(HEADER))
    put(folder, "model.safetensors.index.json", data)
    find_tensors(folder)


def _config(folder: Path, data: bytes) -> None:
    put(folder, "config.json", data)
    config = config_from_folder(folder)
    config.rope_frequencies()


def _peft(folder: Path, data: bytes) -> None:
    put(folder, "adapter_config.json", data)
    config = read_peft_config(folder)
    for module in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        if config.adapts(module):
            config.scale(module)


def _records(suffix: str, folder: Path, asked: tuple[str, bytes]) -> None:
    task, data = asked
    path = put(folder, f"rows{suffix}", data)
    load_records(f"{task}@{path}", "config.data.user", need_output=len(data) % 2 == 0)


def _gguf_file(folder: Path, data: bytes) -> None:
    path = put(folder, "a.gguf", data)
    reader = _open(path)
    with parsing(path, "damaged"):
        meta = Metadata.of(reader, path)
        if meta.architecture in GGUF_FAMILIES:
            describe(meta, GGUF_FAMILIES[meta.architecture], {tensor.name: tensor for tensor in reader.tensors})
            make_tokenizer(meta)


def _tokenizer_files(folder: Path, files: tuple[bytes, bytes]) -> None:
    for name, data in zip(("tokenizer.json", "tokenizer_config.json"), files):
        put(folder, name, data)
    Template("alpaca", load_tokenizer(folder)).ids(["w1 w2"])


def _signature(folder: Path, files: tuple[bytes, bytes]) -> None:
    key, signature = files
    put(folder, "manifest.json.minisig", signature)
    signed_by(put(folder, "minisign.pub", key))(put(folder, "manifest.json", SIGNED[1].encode()))


def _override(folder: Path, asked: tuple[str, str]) -> None:
    read_value(asked[1], asked[0], get_config(), "config.sweep.over")


def _line(folder: Path, text: str) -> None:
    for parse in (
        parse_source, parse_mixture, lambda t: parse_stack(t, "key"), lambda t: parse_axes([t], get_config()),
        lambda t: parse_gate({"bounds": [t]}, "key"), lambda t: layer_numbers(t, 4), lambda t: target_names(t.split(",")),
    ):  # fmt: skip
        try:
            parse(text)
        except InputError:
            continue


class Target(NamedTuple):
    """A parser: what it is given in an empty folder, from which inputs; ``cost``: its share of the inputs is divided by it."""

    run: Callable[[Path, Any], object]
    inputs: Callable[[], st.SearchStrategy[Any]]
    cost: int = 1


def _file_of(name: str, read: Callable[[Path], object]) -> Callable[[Path, bytes], object]:
    return lambda folder, data: read(put(folder, name, data))


def _json_of(good: Any) -> st.SearchStrategy[bytes]:
    return st.one_of(changed(good).map(as_json), torn(as_json(good)))


def _of_tasks(data: st.SearchStrategy[bytes]) -> st.SearchStrategy[tuple[str, bytes]]:
    return st.tuples(st.sampled_from(TASKS), data)


_rows = st.lists(st.one_of(*map(changed, ROWS)), min_size=1, max_size=3)
_jsonl = st.one_of(_rows.map(lambda rows: b"\n".join(map(as_json, rows))), torn(b"\n".join(map(as_json, ROWS))))
_sheet = b'instruction,output,label\nw1,"w2\nw3",1\n'

TARGETS = {
    "safetensors header": Target(
        _file_of("a.safetensors", read_header), lambda: st.one_of(changed(HEADER).map(_safetensors), torn(_safetensors(HEADER)))
    ),
    "shard index": Target(_index, lambda: _json_of(INDEX)),
    "config": Target(
        _config,
        lambda: st.one_of(*(_json_of(CONFIG | {"architectures": [name]}) for name in FAMILIES), _json_of(CONFIG | {"architectures": None})),
    ),
    "adapter settings": Target(_peft, lambda: _json_of(PEFT)),
    "records": Target(functools.partial(_records, ".jsonl"), lambda: _of_tasks(_jsonl)),
    "list of records": Target(functools.partial(_records, ".json"), lambda: _of_tasks(_rows.map(as_json))),
    "packed records": Target(functools.partial(_records, ".jsonl.gz"), lambda: _of_tasks(torn(gzip.compress(as_json(ROWS[0]), mtime=0)))),
    "sheet": Target(functools.partial(_records, ".csv"), lambda: _of_tasks(torn(_sheet))),
    "parquet": Target(functools.partial(_records, ".parquet"), lambda: _of_tasks(torn(_parquet()))),
    "answers": Target(_file_of("pairs.jsonl", read_lines), lambda: _jsonl),
    "manifest": Target(lambda folder, data: read_manifest(put(folder, "manifest.json", data).parent), lambda: _json_of(MANIFEST)),
    "gate": Target(lambda folder, content: parse_gate(content, "config.gate"), lambda: changed(GATE)),
    "signature": Target(
        _signature, lambda: st.tuples(*(st.one_of(st.just(text.encode()), torn(text.encode())) for text in (SIGNED[0], SIGNED[2])))
    ),
    "gguf": Target(_gguf_file, lambda: torn(_gguf()), cost=4),
    "recipe of values": Target(
        lambda folder, asked: load_recipe(str(put(folder, f"recipe{asked[0]}", asked[1]))),
        lambda: st.tuples(st.sampled_from([".json", ".yaml"]), _json_of(OVERRIDES)), cost=20,
    ),
    "override": Target(_override, lambda: st.tuples(st.sampled_from(list(OVERRIDES)), st.one_of(_texts, _values.map(repr))), cost=20),
    "line": Target(
        _line, lambda: st.one_of(_texts, *(torn(line.encode()).map(lambda data: data.decode("latin-1")) for line in LINES)), cost=20
    ),
    "tokenizer": Target(
        _tokenizer_files,
        lambda: st.one_of(
            st.tuples(_json_of(_tokenizer()[1]), st.just(as_json(_tokenizer()[2]))),
            st.tuples(st.just(as_json(_tokenizer()[1])), _json_of(_tokenizer()[2])),
        ),
        cost=50,
    ),
}  # fmt: skip


def tried(target: Target, given_input: Any) -> bool:
    """Whether the input was refused; False: it was taken.

    Raises:
        Exception: anything but ``InputError``, or an error of more than one line.
    """
    with tempfile.TemporaryDirectory(dir=FOLDERS) as folder:
        try:
            target.run(Path(folder), given_input)
        except InputError as error:
            assert "\n" not in str(error) and len(str(error)) < 4000
            return True
    return False


def fuzz(name: str, inputs: int, number: int) -> int:
    """So many inputs for one target, told apart by ``number``; how many were refused."""
    refused = 0

    @seed(number)
    @settings(
        max_examples=inputs, database=None, deadline=None, phases=(Phase.generate, Phase.shrink), suppress_health_check=list(HealthCheck)
    )  # fmt: skip
    @given(TARGETS[name].inputs())
    def run(given_input: Any) -> None:
        nonlocal refused
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # either ends the process: an input on which a parser hangs
        signal.alarm(WAITS * SECONDS)
        refused += tried(TARGETS[name], given_input)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)

    run()
    return refused


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--inputs", type=int, default=200_000, help="of all targets together")
    parser.add_argument("--only", default="", help="targets, with commas")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    names = asked.only.split(",") if asked.only else list(TARGETS)
    whole = sum(1 / TARGETS[name].cost for name in names)
    total, refused, failed = 0, 0, list[str]()
    for name in names:  # imports and good files first, which the limit shall not count
        fuzz(name, 5, asked.seed)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    for name in names:
        begun, left, found = time.monotonic(), round(asked.inputs / whole / TARGETS[name].cost), 0
        for piece in range(0, left, PIECE):
            try:
                found += fuzz(name, min(PIECE, left - piece), asked.seed * 1_000_003 + piece)
            except Exception:
                failed.append(name)
                traceback.print_exc()
        total, refused = total + left, refused + found
        print(f"{name}: {left} inputs, {found} refused, {time.monotonic() - begun:.0f} s", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(f"{total} inputs, {refused} refused, the others taken; at most {peak} MiB")
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
