"""Loading tokenizers: golden ids of the real one, and the folders that are refused."""

import json
import shutil
from pathlib import Path

import pytest

from panacea_jax.data.tokenizer import PROBE, load_tokenizer
from panacea_jax.errors import InputError

KEY = "config.model.path"


def refused(folder: str | Path, *parts: str) -> None:
    with pytest.raises(InputError) as caught:
        load_tokenizer(folder)
    line = str(caught.value)
    assert line.startswith(f"{KEY}: ") and "\n" not in line
    for part in parts:
        assert part in line


def test_real_llama2_ids_are_sentencepieces(llama2):
    ids = [1, 835, 2799, 4080, 29901, 13, 10994, 3186, 29871, 29896, 29906]
    assert llama2("### Instruction:\nHello world 12").input_ids == ids


def test_small_folder(words):
    assert words.convert_ids_to_tokens(words("mend a blorf").input_ids) == [
        *("<s>", "mend", "a", "blorf")
    ]
    assert words.eos_token == "</s>"


def test_sentencepiece_model_alone_is_refused(shared: Path, tmp_path: Path):
    source = shared / "tokenizers" / "llama2"
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(source / name, tmp_path / name)
        refused(tmp_path, "tokenizer.model alone", "tokenizer.json")
    shutil.copyfile(source / "tokenizer.json", tmp_path / "tokenizer.json")
    assert load_tokenizer(tmp_path)("Hello").input_ids == [1, 15043]


def test_invented_model_alone_is_refused(tmp_path: Path):
    (tmp_path / "tokenizer.model").write_bytes(b"whatever")
    refused(tmp_path, f"{tmp_path}/tokenizer.model alone")


def test_bad_folders(tmp_path: Path, make_tokenizer):
    refused(tmp_path / "absent", "no such file or folder")
    refused(tmp_path, "no tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("{oops")
    refused(tmp_path, "no usable tokenizer")
    refused(tmp_path / "tokenizer.json", "not a folder")
    refused("owner/name/subset", "neither a folder nor a hub id")
    refused("owner/name:train", "neither a folder nor a hub id")
    refused(make_tokenizer(tmp_path / "endless", eos=False), "names no end-of-sequence token")


def test_a_tokenizer_that_appends_eos_is_refused(tmp_path: Path, make_tokenizer):
    folder = make_tokenizer(tmp_path / "eager")
    file = folder / "tokenizer.json"
    backend = json.loads(file.read_text())
    backend["post_processor"]["single"].append({"SpecialToken": {"id": "</s>", "type_id": 0}})
    backend["post_processor"]["special_tokens"]["</s>"] = {
        **{"id": "</s>", "ids": [2], "tokens": ["</s>"]}
    }
    file.write_text(json.dumps(backend))
    refused(folder, "appends EOS")


def test_no_code_from_the_folder(tmp_path: Path, make_tokenizer):
    folder = make_tokenizer(tmp_path / "code")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    config["tokenizer_class"] = "Evil"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("raise SystemExit('remote code ran')\n")
    refused(folder, "no usable tokenizer")


def test_only_a_hub_id_may_use_the_network(
    words, make_tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked: list[tuple[str, bool, bool]] = []

    def from_pretrained(name: str, *, local_files_only: bool, trust_remote_code: bool):
        asked.append((name, local_files_only, trust_remote_code))
        return words

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", from_pretrained)
    monkeypatch.chdir(tmp_path)
    folder = make_tokenizer(tmp_path / "words")
    load_tokenizer(folder)
    load_tokenizer("owner/name")
    assert asked == [(str(folder), True, False), ("owner/name", False, False)]


def byte_level(folder: Path, name: str) -> Path:
    """A byte-level tokenizer.json whose numbers are cut in threes, under a class of that name."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "w"), ("Ġw", "o"), ("1", "2"), ("12", "3")]
    tokens = ["<s>", "</s>", *alphabet, *(a + b for a, b in merges)]
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    core.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\p{N}{1,3}|[^\p{N}]+"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    core.decoder = decoders.ByteLevel()
    folder.mkdir()
    core.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": name, "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "LlamaTokenizerFast", "LlamaTokenizer"])
def test_a_class_that_is_not_the_files(name, tmp_path: Path, caplog):
    """Published folders name Llama's class over a byte-level file: the ids are the file's, and spaces stay."""
    from tokenizers import Tokenizer

    folder = byte_level(tmp_path / "b", name)
    tokenizer, core = load_tokenizer(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in (PROBE, "how many  wolves 123 4567", " w"):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert ids == core.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert "makes other ids" not in caplog.text


def test_a_class_that_splits_in_a_way_of_its_own(tmp_path: Path, caplog):
    """Digits one by one instead of in threes: other ids of the same text, with a word."""
    load_tokenizer(byte_level(tmp_path / "b", "Qwen2Tokenizer"))
    assert "Qwen2Tokenizer" in caplog.text and "makes other ids than tokenizer.json" in caplog.text


def test_a_class_that_loses_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What transformers 5.3 to 5.21 made of Llama's class over a byte-level file: no space is left."""
    from transformers import LlamaTokenizer

    folder = byte_level(tmp_path / "b", "LlamaTokenizerFast")
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    wrong = LlamaTokenizer(vocab=model["vocab"], merges=merges, bos_token="<s>", eos_token="</s>")
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_, **__: wrong)
    refused(folder, "LlamaTokenizer", "makes other ids than tokenizer.json and loses text")
