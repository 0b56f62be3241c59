"""Reading config.json; the oracle is transformers' own configuration classes."""

import json
from pathlib import Path

import numpy as np
import pytest
import transformers as tf
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from panacea_jax.errors import InputError
from panacea_jax.models.families import config_from_dict, config_from_folder

# The published config files, where the shared data stand beside the repository.
HF_CONFIGS = Path(__file__).parents[3] / "shared" / "data" / "hf_configs"

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}

# Published files, shortened to what the model computes with; sizes as their authors give them.
PUBLISHED = {
    "Llama-2-7b": (
        {
            **LLAMA, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-05,
            "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float16",
        },
        6_738_415_616,
    ),
    "Llama-3.1-8B": (
        {
            **LLAMA, "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
            "rope_theta": 500000.0, "mlp_bias": False, "attention_bias": False,
            "rope_scaling": {
                "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192, "rope_type": "llama3",
            },
        },
        8_030_261_248,
    ),
    "Qwen2-7B": (
        {
            "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 152064,
            "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
            "num_attention_heads": 28, "num_key_value_heads": 4, "rope_theta": 1000000.0,
            "sliding_window": 131072, "use_sliding_window": False, "max_window_layers": 28,
            "tie_word_embeddings": False,
        },
        7_615_616_512,
    ),
    "gemma-7b": (
        {
            "architectures": ["GemmaForCausalLM"], "model_type": "gemma", "vocab_size": 256000,
            "hidden_size": 3072, "intermediate_size": 24576, "num_hidden_layers": 28,
            "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 256,
            "hidden_act": "gelu",
        },
        8_537_680_896,
    ),
    "gemma-2-9b": (
        {
            "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "vocab_size": 256000,
            "hidden_size": 3584, "intermediate_size": 14336, "num_hidden_layers": 42,
            "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256,
            "query_pre_attn_scalar": 224, "sliding_window": 4096, "hidden_act": "gelu_pytorch_tanh",
            "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
        },
        9_241_705_984,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_published_sizes(name):
    given, parameters = PUBLISHED[name]
    assert config_from_dict(given).num_parameters() == parameters


def test_gemma_quirks():
    gemma = config_from_dict(PUBLISHED["gemma-7b"][0])
    assert gemma.activation == "gelu_tanh"  # "gelu" in the file
    assert gemma.tie_embeddings and gemma.scale_embeddings and gemma.unit_offset_norm
    gemma2 = config_from_dict(PUBLISHED["gemma-2-9b"][0])
    assert gemma2.query_scale == 224**-0.5
    assert gemma2.windows == (4096, 0) * 21
    assert (gemma2.attention_softcap, gemma2.final_softcap) == (50.0, 30.0)
    off = {**PUBLISHED["gemma-2-9b"][0], "attn_logit_softcapping": None}
    assert config_from_dict(off).attention_softcap is None


GEMMA3 = {
    "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64,
    "num_hidden_layers": 13, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 32,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "factor": 8.0}


@pytest.mark.parametrize(
    "given",
    [
        {},  # 1, 4, 12 and 27 B say nothing of their bases
        {"rope_scaling": LINEAR},
        {"rope_theta": 700.0, "rope_local_base_freq": 300.0, "rope_scaling": LINEAR},
        {
            "rope_parameters": {
                "full_attention": {**LINEAR, "rope_theta": 700.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
            }
        },
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 700.0}}},
        {"sliding_window_pattern": 4, "sliding_window": 9},
        {"layer_types": ["full_attention"] * 12 + ["sliding_attention"], "sliding_window": 9},
        {"num_hidden_layers": 5},  # none with full attention
        {"layer_types": ["full_attention"] * 13},
    ],
)
def test_gemma3_windows_and_bases_equal_transformers(given):
    ours = config_from_dict({**GEMMA3, **json.loads(json.dumps(given))})
    theirs = tf.Gemma3TextConfig(**{k: v for k, v in {**GEMMA3, **given}.items() if k != "architectures"})  # fmt: skip
    rotary = tf.models.gemma3.modeling_gemma3.Gemma3RotaryEmbedding(theirs)
    windows = ours.windows or (0,) * ours.num_layers
    assert list(windows) == [
        theirs.sliding_window * (kind == "sliding_attention") for kind in theirs.layer_types
    ]
    assert (ours.local_rope_theta is None) == (len(set(windows)) == 1)
    for kind in set(theirs.layer_types):
        want = getattr(rotary, f"{kind}_inv_freq").numpy()
        found = ours.rope_frequencies(local=kind == "sliding_attention")
        np.testing.assert_allclose(found, want, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0: Gemma 3 has no"),
        ({"rope_parameters": LINEAR}, "rope_parameters: factor is not a kind of layer"),
        (
            {"rope_parameters": {"sliding_attention": LINEAR}},
            "sliding_attention has rope_type 'linear'",
        ),
        ({"layer_types": ["full_attention"]}, "layer_types.*13 layers"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ],
)
def test_gemma3_is_not_guessed(changes, message):
    with pytest.raises(InputError, match=message):
        config_from_dict({**GEMMA3, **changes})


def test_one_rotary_base_by_kind_of_layer_is_for_gemma3_alone():
    by_kind = {"full_attention": {"rope_type": "default", "rope_theta": 500.0}}
    with pytest.raises(InputError, match="full_attention: this architecture has one rotary base"):
        config_from_dict({**LLAMA, "rope_parameters": by_kind})


def test_qwen3():
    d = {**LLAMA, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
    found = config_from_dict(d)
    assert (found.head_dim, found.qk_norm, found.qkv_bias, found.o_bias) == (128, True, False, False)
    biased = config_from_dict({**d, "attention_bias": True, "head_dim": 16})
    assert (biased.head_dim, biased.qkv_bias, biased.o_bias) == (16, True, True)


def _mistral(**changes):
    d = {**LLAMA, "architectures": ["MistralForCausalLM"], "model_type": "mistral", **changes}
    return config_from_dict(d)


def test_mistral_window():
    assert _mistral().windows == (4096, 4096)
    assert _mistral(sliding_window=7).windows == (7, 7)
    assert _mistral(sliding_window=None).windows is None


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({}, None),
        ({"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}, (0, 9)),
        ({"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2}, None),
        ({"use_sliding_window": False, "sliding_window": 9, "max_window_layers": 0}, None),
        ({"use_sliding_window": True, "sliding_window": None}, None),
        (
            {
                "use_sliding_window": True,
                "sliding_window": 9,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            (9, 0),
        ),
    ],
)
def test_qwen2_windows(changes, windows):
    d = {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **changes}
    assert config_from_dict(d).windows == windows
    theirs = tf.Qwen2Config(**{k: v for k, v in d.items() if k not in ("architectures",)})
    sliding = [kind == "sliding_attention" for kind in theirs.layer_types]
    assert (windows is not None) == any(sliding)


SCALED = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize(
    "given",
    [
        {"rope_theta": 500.0},
        {"rope_theta": 500.0, "rope_scaling": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        {"rope_theta": 500.0, "rope_scaling": SCALED},
        {"rope_parameters": {**SCALED, "rope_theta": 500.0}},
        {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}},
    ],
)
def test_rope_frequencies_equal_transformers(given):
    ours = config_from_dict({**LLAMA, "head_dim": 32, **json.loads(json.dumps(given))})
    theirs = tf.LlamaConfig(**{**LLAMA, "head_dim": 32, **given})
    kind = theirs.rope_parameters["rope_type"]
    if kind == "default":
        rotary = tf.models.llama.modeling_llama.LlamaRotaryEmbedding(theirs)
        want = rotary.inv_freq.numpy()
    else:
        want = ROPE_INIT_FUNCTIONS[kind](theirs)[0].numpy()
    np.testing.assert_allclose(ours.rope_frequencies(), want, rtol=1e-6)
    if kind == "llama3":  # all three regimes occur
        ratio = 500.0 ** (-np.arange(0, 32, 2) / 32) / ours.rope_frequencies()
        assert ratio.min() == 1 and ratio.max() == pytest.approx(8)
        assert ((ratio > 1.01) & (ratio < 7.9)).any()


def test_rope_parameters_win_over_nothing_and_default_theta():
    assert config_from_dict(LLAMA).rope_theta == 10000.0


def test_defaults_and_nulls():
    config = config_from_dict({**LLAMA, "head_dim": None, "num_key_value_heads": None})
    assert (config.head_dim, config.num_kv_heads) == (16, 4)
    assert hash(config) == hash(config_from_dict(LLAMA))
    assert config.query_scale == 0.25


@pytest.mark.parametrize("whole", [LLAMA, GEMMA3], ids=["llama", "gemma3"])
def test_model_type_stands_in_for_missing_architectures(whole):
    d = {k: v for k, v in whole.items() if k != "architectures"}
    assert config_from_dict(d) == config_from_dict(whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            r"GPT2LMHeadModel; known: LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, "
            r"Qwen3ForCausalLM, GemmaForCausalLM, Gemma2ForCausalLM, Gemma3ForCausalLM$",
        ),
        ({"architectures": None, "model_type": "gpt2"}, "unsupported architecture .*gpt2"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type 'yarn'.*llama3"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_type 'dynamic'"),
        ({"rope_parameters": {"full_attention": {}, "rope_type": "longrope"}}, "longrope"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor is missing"),
        (
            {"rope_scaling": {**SCALED, "high_freq_factor": 1.0}},
            "high_freq_factor = 1.0: must be above low_freq_factor",
        ),
        ({"rope_scaling": 3}, "rope_scaling = 3: must be an object"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "64"}, "hidden_size = '64': must be a positive integer"),
        ({"vocab_size": True}, "vocab_size = True"),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0"),
        ({"num_key_value_heads": 3}, "num_key_value_heads = 3: does not divide"),
        ({"num_attention_heads": 5}, "num_attention_heads = 5: does not divide hidden_size = 64"),
        ({"head_dim": 7}, "head_dim = 7.*odd"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps = -1.0: must be a positive number"),
        ({"hidden_act": "relu"}, "hidden_act = 'relu'.*silu"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings = 'yes': must be true or false"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ],
)
def test_bad_values_are_named(changes, message):
    with pytest.raises(InputError, match=message) as error:
        config_from_dict({**LLAMA, **changes}, where="some/config.json")
    assert str(error.value).startswith("some/config.json: ")
    assert "\n" not in str(error.value)


def test_bad_layer_types():
    d = {**LLAMA, "architectures": ["Gemma2ForCausalLM"]}
    for types in (["full_attention"], ["full_attention", "chunked_attention"], "full"):
        with pytest.raises(InputError, match="layer_types"):
            config_from_dict({**d, "layer_types": types})


def test_bad_files(tmp_path):
    with pytest.raises(InputError, match="nowhere: no such model folder"):
        config_from_folder(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"config.json: no such file"):
        config_from_folder(tmp_path)
    path = tmp_path / "config.json"
    for text, message in (
        (b'{"a": 1', "not readable as JSON"),
        (b"\xff\xfe", "not readable as JSON"),
        (b"[1]", "not a JSON object"),
    ):
        path.write_bytes(text)
        with pytest.raises(InputError, match=message) as error:
            config_from_folder(tmp_path)
        assert str(path) in str(error.value)


@pytest.mark.skipif(not HF_CONFIGS.is_dir(), reason="published config files not here")
def test_published_files_are_read():
    for path in sorted(HF_CONFIGS.glob("*.json")):
        config = config_from_dict(json.loads(path.read_text()), str(path))
        assert config.num_parameters() > 6e9
