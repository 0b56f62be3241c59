"""GGUF files, as llama.cpp writes them, to Hugging Face folders: config, tokenizer, weights dequantised on the way.

The container and the quantised types are the ``gguf`` package's. What differs from Hugging Face is
put right here: llama.cpp keeps the rows of Llama's q and k in the order of its own rotary embedding,
stores Gemma's norms as 1 + w, and says nothing of a tied head but by leaving it out.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from panacea_jax.errors import InputError
from panacea_jax.models.config import ModelConfig, RopeScaling
from panacea_jax.models.families import MOST_LAYERS, config_from_dict
from panacea_jax.models.gguf_header import check_header
from panacea_jax.models.gguf_metadata import Metadata
from panacea_jax.models.gguf_tokenizer import make_tokenizer
from panacea_jax.models.model import abstract_model
from panacea_jax.models.saving import save_tensors
from panacea_jax.models.tensorfile import Entry
from panacea_jax.models.weights import hf_shapes
from panacea_jax.untrusted import parsing, reason

# Stored types that stay as they are; all others, the quantised ones among them, become float32.
KEPT = {"F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
# Keys that change what is computed; none of the families here has them.
REFUSED = ("expert_count", "attention.scale", "attention.clamp_kqv", "attention.max_alibi_bias", "logit_scale",
           "embedding_scale", "residual_scale")  # fmt: skip
# Written by llama.cpp for Llama 3.1 and later: by how much each rotary frequency is divided.
ROPE_FACTORS = "rope_freqs.weight"

Json = dict[str, Any]
Tensors = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Family:
    """How llama.cpp stores a family.

    Attributes:
        architecture: Hugging Face's class.
        model_type: Hugging Face's family name.
        pairs: rows of q and k are stored pair by pair: llama.cpp rotates neighbours, Hugging Face's code halves of a head.
        norm_offset: what has been added to the weights of norms.
        keys: keys of config.json that this family has besides the common ones.
    """

    architecture: str
    model_type: str
    pairs: bool = False
    norm_offset: float = 0.0
    keys: Callable[[Metadata, Tensors], Json] = lambda meta, tensors: {}


def _llama(meta: Metadata, tensors: Tensors) -> Json:
    mistral: Json = {}
    if meta.get("attention.sliding_window") is not None:
        window = meta.integer("attention.sliding_window")
        mistral = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": window}
    return {
        **mistral,
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
    }


def _query_scale(meta: Metadata, deepest: int) -> Json:
    # llama.cpp knows the 27B by its depth: it alone scales by the width of a head's share.
    share = meta.integer("embedding_length") // meta.integer("attention.head_count")
    largest = meta.integer("block_count") == deepest
    return {"query_pre_attn_scalar": share if largest else meta.integer("attention.key_length")}


def _gemma2(meta: Metadata, tensors: Tensors) -> Json:
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        **_query_scale(meta, deepest=46),
        "sliding_window": meta.integer("attention.sliding_window", 4096),
        "attn_logit_softcapping": meta.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": meta.number("final_logit_softcapping", 30.0),
    }


def _gemma3(meta: Metadata, tensors: Tensors) -> Json:
    every, kinds = 6, ("sliding_attention", "full_attention")
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        **_query_scale(meta, deepest=62),
        "sliding_window": meta.integer("attention.sliding_window", 1024),
        "layer_types": [kinds[(i + 1) % every == 0] for i in range(meta.integer("block_count", most=MOST_LAYERS))],
        "rope_local_base_freq": 10000.0,  # not in the file
    }


# By the file's general.architecture. Mistral is a "llama" there.
FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", "llama", pairs=True, keys=_llama),
    "qwen2": Family("Qwen2ForCausalLM", "qwen2"),
    "gemma": Family("GemmaForCausalLM", "gemma", norm_offset=1.0),
    "gemma2": Family("Gemma2ForCausalLM", "gemma2", norm_offset=1.0, keys=_gemma2),
    "qwen3": Family("Qwen3ForCausalLM", "qwen3"),
    "gemma3": Family("Gemma3ForCausalLM", "gemma3_text", norm_offset=1.0, keys=_gemma3),
}


def convert_gguf(file: Path, out: Path) -> Path:
    """Write a GGUF file as a Hugging Face folder.

    Quantised and float32 tensors become float32, float16 and bfloat16 stay; one tensor is in memory
    at a time.

    Args:
        file: to read.
        out: folder to write; may exist if it is empty.

    Raises:
        InputError: the gguf package is missing, the file is damaged, or holds an architecture, rope,
            tokenizer or tensor that is not understood here; names it.
    """
    reader = _open(file)
    with parsing(file, "damaged or not understood"):
        return _convert(reader, file, out)


def _convert(reader: Any, file: Path, out: Path) -> Path:
    meta = Metadata.of(reader, file)
    if meta.architecture not in FAMILIES:
        raise InputError(
            f"{file}: general.architecture {meta.architecture}: not supported; known: {', '.join(FAMILIES)}"
        )
    family = FAMILIES[meta.architecture]
    tensors: Tensors = {tensor.name: tensor for tensor in reader.tensors}
    hf_config = describe(meta, family, tensors)
    config = config_from_dict(hf_config, str(file))
    tokenizer = make_tokenizer(meta)
    ends = meta.end_ids()
    special = {"bos_token_id": meta.token_id("bos"), "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
               "pad_token_id": meta.token_id("padding")}  # fmt: skip
    special = {key: value for key, value in special.items() if value is not None}

    def companions(folder: Path) -> None:
        tokenizer.save_pretrained(str(folder))
        text = json.dumps(special, indent=2) + "\n"
        (folder / "generation_config.json").write_text(text, "utf-8")

    entries = list(_entries(file, meta, family, tensors, config))
    return save_tensors(entries, out, hf_config | special, companions=companions)


def _open(file: Path) -> Any:
    try:
        import gguf
    except ImportError as error:
        raise InputError(
            f"--gguf={file}: needs the gguf package: pip install 'panacea_jax[gguf]'"
        ) from error
    check_header(file)
    try:
        return gguf.GGUFReader(file)
    except OSError as error:
        raise InputError(f"--gguf={file}: cannot be read ({error.strerror})") from error
    except Exception as error:  # whatever its parser stumbles over
        raise InputError(f"--gguf={file}: damaged or not a GGUF file ({reason(error)})") from error


def describe(meta: Metadata, family: Family, tensors: Tensors) -> Json:
    """The contents of ``config.json``."""
    heads, hidden = meta.integer("attention.head_count"), meta.integer("embedding_length")
    rotated = meta.integer("rope.dimension_count", hidden // heads)
    dim = meta.integer("attention.key_length", rotated)
    for key in ("rope.dimension_count", "attention.value_length"):
        if meta.integer(key, dim) != dim:
            raise InputError(
                f"{meta.file}: {meta.architecture}.{key} = {meta.get(key)}: only the head size, {dim}, is supported"
            )
    if "token_embd.weight" not in tensors:
        raise InputError(f"{meta.file}: tensor token_embd.weight is missing")
    config = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "hidden_size": hidden,
        "intermediate_size": meta.integer("feed_forward_length"),
        "num_hidden_layers": meta.integer("block_count", most=MOST_LAYERS),
        "num_attention_heads": heads,
        "num_key_value_heads": meta.integer("attention.head_count_kv", heads),
        "head_dim": dim,
        "max_position_embeddings": meta.integer("context_length"),
        "rms_norm_eps": meta.number("attention.layer_norm_rms_epsilon", 1e-6),
        "rope_theta": meta.number("rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in tensors,
        **family.keys(meta, tensors),
    }
    strange = [key for key in REFUSED if meta.get(key)]
    if meta.get("attention.sliding_window") and "sliding_window" not in config:
        strange.append("attention.sliding_window")
    if strange:
        raise InputError(f"{meta.file}: {meta.architecture}.{strange[0]} = {meta.get(strange[0])}: not supported")
    scaling = _rope_scaling(meta, tensors, config)
    return config | ({} if scaling is None else {"rope_scaling": scaling})


def _rope_scaling(meta: Metadata, tensors: Tensors, config: Json) -> Json | None:
    # llama.cpp takes a factor without a type as linear, 0 as none, and knows an older key for it.
    kind = meta.get("rope.scaling.type") or "linear"
    if kind not in ("none", "linear"):
        raise InputError(f"{meta.file}: {meta.architecture}.rope.scaling.type {kind}: not supported")
    factor = meta.number("rope.scaling.factor", meta.number("rope.scale_linear", 0.0)) if kind == "linear" else 0.0
    linear = {"rope_type": "linear", "factor": factor} if factor not in (0.0, 1.0) else None
    factors = _dequantised(tensors[ROPE_FACTORS], meta.file) if ROPE_FACTORS in tensors else np.ones(1)
    if np.allclose(factors, 1.0):
        return linear
    if linear:
        raise InputError(f"{meta.file}: {ROPE_FACTORS}: beside a linear stretch by {factor:g}, which is not supported")
    # The file holds the outcome only. Every published Llama 3 has it from these settings.
    settings = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    stretch, length = round(float(factors.max()), 4), 8192
    plain = config_from_dict(config, str(meta.file))
    scaled = dataclasses.replace(plain, rope_scaling=RopeScaling("llama3", stretch, original_length=length, **settings))  # fmt: skip
    if not np.allclose(plain.rope_frequencies() / scaled.rope_frequencies(), factors, rtol=1e-4):
        raise InputError(f"{meta.file}: {ROPE_FACTORS}: not the stretch of Llama 3, which alone is supported")
    return {"rope_type": "llama3", "factor": stretch, "original_max_position_embeddings": length, **settings}  # fmt: skip


def _entries(
    file: Path, meta: Metadata, family: Family, tensors: Tensors, config: ModelConfig
) -> Iterator[Entry]:
    """The Hugging Face tensors of the file, each dequantised when its turn comes."""
    import gguf

    arch = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[meta.architecture]
    names = gguf.get_tensor_name_map(arch, config.num_layers)
    left = set(tensors) - {ROPE_FACTORS}
    for name, shape in hf_shapes(abstract_model(config)[1]).items():
        stem, _, kind = name.rpartition(".")
        stored = f"{names.get_name(stem)}.{kind}"
        if stored not in tensors:
            raise InputError(f"{file}: tensor {stored} ({name}) is missing")
        left.discard(stored)
        tensor = tensors[stored]
        found = tuple(int(n) for n in reversed(tensor.shape))
        if found != shape:
            raise InputError(f"{file}: tensor {stored} has shape {found}, its metadata ask for {shape}")
        heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}.get(stem.rpartition(".")[2])
        values = functools.partial(
            _values, tensor, file, heads if family.pairs else None, family.norm_offset if "norm" in stem else 0.0
        )  # fmt: skip
        yield Entry(name, shape, KEPT.get(tensor.tensor_type.name, np.dtype(np.float32)), values)
    if left:
        raise InputError(f"{file}: extra tensor {min(left)}: its metadata have no such layer, bias or tensor")


def _values(tensor: Any, file: Path, heads: int | None, offset: float) -> np.ndarray:
    """A tensor as Hugging Face has it: float32, ``[out, in]`` or ``[out]``."""
    array = _dequantised(tensor, file)
    if heads is not None:  # [heads, hd/2, 2, …] → [heads, 2, hd/2, …]
        paired = array.reshape(heads, -1, 2, *array.shape[1:])
        array = paired.swapaxes(1, 2).reshape(array.shape)
    return array - np.float32(offset) if offset else array


def _dequantised(tensor: Any, file: Path) -> np.ndarray:
    import gguf

    try:
        return np.asarray(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32)
    except NotImplementedError as error:
        raise InputError(
            f"{file}: tensor {tensor.name} has type {tensor.tensor_type.name}, which the gguf package cannot read"
        ) from error
