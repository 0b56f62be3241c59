"""Hugging Face's ``config.json`` → :class:`ModelConfig`, one short function a family.

Defaults for absent keys are those of the configuration classes in transformers 5, but that without num_key_value_heads
each query head has its own; keys that change what the model computes and are not understood here are refused rather than
ignored.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path, PurePath
from typing import Any

from panacea_jax.errors import InputError
from panacea_jax.models.config import (
    ModelConfig,
    RopeScaling,
    language_part,
    read_whole_config,
)
from panacea_jax.models.reader import Reader
from panacea_jax.untrusted import parsing

# Far above every decoder that there is: lists as long as a file claims layers, and angles as long as a head, are made before a tensor
# is looked at.
MOST_LAYERS, MOST_WIDE, MOST_HEAD = 4096, 2**24, 2**14


def config_from_dict(
    d: Mapping[str, Any], where: str = "config.json", *, classifier: bool = False
) -> ModelConfig:
    """Read a parsed ``config.json``: of a language model, alone or beside a vision tower, or of a sequence classifier.

    Raises:
        InputError: unknown architecture, unsupported rope kind, or a missing, mistyped or
            impossible value; names the key.
    """
    with parsing(where, "not understood"):
        return _classifier(d, where) if classifier else _decoder(d, where)


def _decoder(d: Mapping[str, Any], where: str) -> ModelConfig:
    text = language_part(d)
    found = FAMILIES[_architecture(text, where)](Reader(text, where))
    return dataclasses.replace(found, nested=text is not d)


def _classifier(d: Mapping[str, Any], where: str) -> ModelConfig:
    named = (d.get("architectures") or [f"model_type {d.get('model_type')}"])[0]
    family = str(named).replace("ForSequenceClassification", "ForCausalLM")
    if family == named or family not in FAMILIES:
        known = ", ".join(FAMILIES).replace("ForCausalLM", "ForSequenceClassification")
        raise InputError(f"{where}: {named} is no sequence classifier; known: {known}")
    return dataclasses.replace(FAMILIES[family](Reader(d, where)), num_labels=_num_labels(d, where))


def config_from_folder(folder: str | PurePath, *, classifier: bool = False) -> ModelConfig:
    """Read ``folder/config.json``.

    Raises:
        InputError: as :func:`config_from_dict`, or the file is missing or not a JSON object.
    """
    where = str(Path(folder) / "config.json")
    return config_from_dict(read_whole_config(folder), where, classifier=classifier)


def _num_labels(d: Mapping[str, Any], where: str) -> int:
    """transformers writes ``id2label`` and, unless it is the default of two labels, no count."""
    labels = d.get("id2label")
    if labels is not None and not (isinstance(labels, dict) and labels):
        raise InputError(f"{where}: id2label must be an object with a name for each label")
    return len(labels) if labels else Reader(d, where).integer("num_labels", 2)


def _architecture(d: Mapping[str, Any], where: str) -> str:
    named = d.get("architectures")
    if isinstance(named, list) and named:
        name = str(named[0])
    elif named is None or named == []:
        by_type = {name.removesuffix("ForCausalLM").lower(): name for name in FAMILIES}
        kind = str(d.get("model_type"))
        name = by_type.get(kind.removesuffix("_text"), f"model_type {kind}")
    else:
        name = str(named)
    if name not in FAMILIES:
        raise InputError(f"{where}: unsupported architecture {name}; known: {', '.join(FAMILIES)}")
    return name


def _common(r: Reader, head_dim: int | None = None) -> dict[str, Any]:
    """Fields that all families share. ``head_dim``: the family's default where that is not
    hidden_size / heads.
    """
    if r.d.get("quantization_config") is not None:
        raise InputError(f"{r.where}: quantization_config: quantised weights are not supported")
    if r.flag("use_bidirectional_attention"):
        raise r.fail("use_bidirectional_attention", "not supported")
    hidden, heads = r.integer("hidden_size", most=MOST_WIDE), r.integer("num_attention_heads", most=MOST_WIDE)
    kv_heads = r.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise r.fail("num_key_value_heads", f"does not divide num_attention_heads = {heads}")
    if r.d.get("head_dim") is None and head_dim is None and hidden % heads:
        raise r.fail("num_attention_heads", f"does not divide hidden_size = {hidden}")
    dim = r.integer("head_dim", head_dim or hidden // heads, most=MOST_HEAD)
    if dim % 2:
        raise r.fail("head_dim", f"the head size {dim} is odd; rotary embedding needs pairs")
    theta, scaling = _rope(r)
    return {
        "model_type": str(r.d.get("model_type")),
        "vocab_size": r.integer("vocab_size", most=MOST_WIDE),
        "hidden_size": hidden,
        "intermediate_size": r.integer("intermediate_size", most=MOST_WIDE),
        "num_layers": r.integer("num_hidden_layers", most=MOST_LAYERS),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": dim,
        "query_scale": dim**-0.5,
        "rope_theta": theta,
        "rope_scaling": scaling,
        "rms_norm_eps": r.number("rms_norm_eps", 1e-6),
    }


def _rope(r: Reader) -> tuple[float, RopeScaling | None]:
    """Rotary base and scaling from ``rope_scaling`` (+ ``rope_theta``) or transformers 5's
    ``rope_parameters``.
    """
    inner = r.inner("rope_scaling" if r.d.get("rope_scaling") else "rope_parameters")
    given = inner.d
    theta = inner.number("rope_theta", r.number("rope_theta", 10000.0))
    partial = inner.number("partial_rotary_factor", r.number("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise InputError(f"{r.where}: partial_rotary_factor = {partial}: not supported")
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind not in ("default", "linear", "llama3"):
        raise InputError(
            f"{r.where}: rope_type {kind!r} is not supported; known: default, linear, llama3"
        )
    if by_kind := [name for name, value in given.items() if isinstance(value, dict)]:
        raise InputError(f"{inner.where}: {by_kind[0]}: this architecture has one rotary base")
    if kind == "default":
        return theta, None
    if given.get("factor") is None:
        raise InputError(f"{inner.where}: factor is missing")
    if kind == "linear":
        return theta, RopeScaling("linear", inner.number("factor", 1.0))
    for name in ("low_freq_factor", "high_freq_factor"):
        if given.get(name) is None:
            raise InputError(f"{inner.where}: {name} is missing")
    low, high = inner.number("low_freq_factor", 1.0), inner.number("high_freq_factor", 4.0)
    if high <= low:
        raise inner.fail("high_freq_factor", f"must be above low_freq_factor = {low}")
    name = "original_max_position_embeddings"
    length = inner.integer(name, r.integer("max_position_embeddings", 8192))
    # transformers lets a top-level value win over the one beside the factors.
    scaling = RopeScaling("llama3", inner.number("factor", 1.0), low, high, r.integer(name, length))
    return theta, scaling


def _windows(types: list[str], window: int) -> tuple[int, ...] | None:
    windows = tuple(window if kind == "sliding_attention" else 0 for kind in types)
    return windows if any(windows) else None


def _llama(r: Reader) -> ModelConfig:
    bias = r.flag("attention_bias")
    return ModelConfig(
        **_common(r),
        activation=r.activation("hidden_act", "silu"),
        tie_embeddings=r.flag("tie_word_embeddings"),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=r.flag("mlp_bias"),
    )


def _mistral(r: Reader) -> ModelConfig:
    fields = _common(r)
    # An absent key means 4096 (v0.1's published default); an explicit null means none (v0.2 on).
    window = 0
    if not ("sliding_window" in r.d and r.d["sliding_window"] is None):
        window = r.integer("sliding_window", 4096)
    return ModelConfig(
        **fields,
        activation=r.activation("hidden_act", "silu"),
        tie_embeddings=r.flag("tie_word_embeddings"),
        windows=_windows(["sliding_attention"] * fields["num_layers"], window),
    )


def _qwen2(r: Reader) -> ModelConfig:
    return ModelConfig(**_qwen(r), qkv_bias=True)


def _qwen3(r: Reader) -> ModelConfig:
    bias = r.flag("attention_bias")
    return ModelConfig(**_qwen(r, head_dim=128), qkv_bias=bias, o_bias=bias, qk_norm=True)


def _qwen(r: Reader, head_dim: int | None = None) -> dict[str, Any]:
    """What Qwen2 and Qwen3 share."""
    fields = _common(r, head_dim)
    windows = None
    if r.flag("use_sliding_window") and r.d.get("sliding_window", 4096) is not None:
        first = r.d.get("max_window_layers", 28)
        if not isinstance(first, int) or isinstance(first, bool) or first < 0:
            raise r.fail("max_window_layers", "must be an integer, 0 or more")
        kinds = ["full_attention", "sliding_attention"]
        default = [kinds[layer >= first] for layer in range(fields["num_layers"])]
        windows = _windows(r.layer_types(default), r.integer("sliding_window", 4096))
    return {
        **fields,
        "activation": r.activation("hidden_act", "silu"),
        "tie_embeddings": r.flag("tie_word_embeddings"),
        "windows": windows,
    }


def _gemma(r: Reader) -> ModelConfig:
    bias = r.flag("attention_bias")
    # Published Gemma files say "gelu" but were trained with the tanh approximation (transformers PR
    # 29402).
    activation = r.activation("hidden_act", "gelu_pytorch_tanh")
    return ModelConfig(
        **_common(r, head_dim=256),
        activation="gelu_tanh" if activation == "gelu" else activation,
        tie_embeddings=r.flag("tie_word_embeddings", True),
        qkv_bias=bias,
        o_bias=bias,
        scale_embeddings=True,
        unit_offset_norm=True,
    )


def _gemma2(r: Reader) -> ModelConfig:
    bias = r.flag("attention_bias")
    fields = _common(r, head_dim=256)
    fields["query_scale"] = r.number("query_pre_attn_scalar", 256.0) ** -0.5
    default = [
        "full_attention" if layer % 2 else "sliding_attention"
        for layer in range(fields["num_layers"])
    ]
    return ModelConfig(
        **fields,
        activation=r.activation("hidden_activation", "gelu_pytorch_tanh"),
        tie_embeddings=r.flag("tie_word_embeddings", True),
        qkv_bias=bias,
        o_bias=bias,
        windows=_windows(r.layer_types(default), r.integer("sliding_window", 4096)),
        scale_embeddings=True,
        unit_offset_norm=True,
        post_norms=True,
        attention_softcap=r.nullable("attn_logit_softcapping", 50.0),
        final_softcap=r.nullable("final_logit_softcapping", 30.0),
    )


# What the published files of Gemma 3 leave out.
_GEMMA3 = {"vocab_size": 262208, "num_attention_heads": 8, "num_key_value_heads": 4}


def _gemma3(r: Reader) -> ModelConfig:
    r = r.changed(**{key: value for key, value in _GEMMA3.items() if r.d.get(key) is None})
    if r.d.get("attn_logit_softcapping") is not None:
        raise r.fail("attn_logit_softcapping", "Gemma 3 has no soft caps on its scores")
    full, sliding = _gemma3_ropes(r)
    bias = r.flag("attention_bias")
    fields = _common(full, head_dim=256)
    fields["query_scale"] = r.number("query_pre_attn_scalar", 256.0) ** -0.5
    every = r.integer("sliding_window_pattern", 6)
    default = [
        "sliding_attention" if (layer + 1) % every else "full_attention"
        for layer in range(fields["num_layers"])
    ]
    windows = _windows(r.layer_types(default), r.integer("sliding_window", 4096))
    local, stretch = _rope(sliding)
    if stretch is not None:
        raise InputError(
            f"{r.where}: sliding_attention has rope_type {stretch.kind!r}: only default is supported"
        )
    mixed = windows is not None and not all(windows)
    if windows is not None and not mixed:
        fields |= {"rope_theta": local, "rope_scaling": None}
    return ModelConfig(
        **fields,
        activation=r.activation("hidden_activation", "gelu_pytorch_tanh"),
        tie_embeddings=r.flag("tie_word_embeddings", True),
        qkv_bias=bias,
        o_bias=bias,
        windows=windows,
        qk_norm=True,
        local_rope_theta=local if mixed else None,
        scale_embeddings=True,
        unit_offset_norm=True,
        post_norms=True,
        final_softcap=r.nullable("final_logit_softcapping", None),
    )


def _gemma3_ropes(r: Reader) -> tuple[Reader, Reader]:
    """The file as layers with full attention see it, and as those with a window do: one rotary base each."""
    by_kind = r.inner("rope_parameters")
    if wrong := set(by_kind.d) - {"full_attention", "sliding_attention"}:
        raise InputError(f"{by_kind.where}: {min(wrong)} is not a kind of layer")
    theta, local = r.number("rope_theta", 1e6), r.number("rope_local_base_freq", 1e4)
    full = r.changed(rope_parameters=by_kind.d.get("full_attention"), rope_theta=theta)
    sliding = by_kind.d.get("sliding_attention")
    return full, r.changed(rope_parameters=sliding, rope_theta=local, rope_scaling=None)


FAMILIES: dict[str, Callable[[Reader], ModelConfig]] = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _mistral,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
    "GemmaForCausalLM": _gemma,
    "Gemma2ForCausalLM": _gemma2,
    "Gemma3ForCausalLM": _gemma3,
}
