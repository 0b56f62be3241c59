"""Inputs on which a parser of ours failed once, by the name of its target in ``tests/fuzz.py``."""

import json
from typing import Any


def _header(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text + bytes(64)


_DEEP = b"[" * 50_000
_CONFIG = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 42, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4,
}  # fmt: skip
_PEFT = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
_TOKENIZER = {
    "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "pre_tokenizer": {"type": "WhitespaceSplit"},
    "post_processor": None, "decoder": None, "added_tokens": [
        {"id": 0, "content": "<eos>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True},
    ],
    "model": {"type": "WordLevel", "vocab": {"<eos>": 0, "w0": 1, "<unk>": 2}, "unk_token": "<unk>"},
}  # fmt: skip
SEEDS: dict[str, list[Any]] = {
    "safetensors header": [
        _header(b'{"a": ' + _DEEP),
        _header(b'{"a": {"dtype": "F32", "shape": [Infinity], "data_offsets": [0, 64]}}'),
        _header(b'{"a": {"dtype": "F32", "shape": [16], "data_offsets": [0, 1e999]}}'),
    ],
    "shard index": [b'{"weight_map": ' + _DEEP, json.dumps({"weight_map": {"model.norm.weight": 10**400}}).encode()],
    "config": [
        json.dumps(_CONFIG | changes).encode()
        for changes in (
            {"hidden_act": ["silu"]}, {"rope_theta": 10**400}, {"layer_types": [[], {}], "architectures": ["Gemma2ForCausalLM"]},
        )
    ],
    "adapter settings": [
        json.dumps(_PEFT | changes).encode()
        for changes in (
            {"r": float("inf")}, {"lora_alpha": 10**400}, {"target_modules": "a{99999999999}"}, {"target_modules": "(" * 5000},
            {"rank_pattern": {"q_proj": float("inf")}}, {"target_modules": "(.|.)+\\d$"},
        )
    ],
    "records": [("beavertails", json.dumps({"prompt": "w1", "category": "[" * 50_000}).encode())],
    "answers": [b'{"prompt": ' + _DEEP + b"\n" + b'{"prompt": "w1"}\n'],
    "manifest": [b'{"stage": ' + _DEEP],
    "tokenizer": [
        (json.dumps(_TOKENIZER).encode(), b'{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "model_max_length": []}'),
    ],
}  # fmt: skip
