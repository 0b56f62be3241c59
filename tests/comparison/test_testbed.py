"""`panacea quickstart --base=smollm2`: the same code on a tiny GGUF model and invented rows, stopped and started again."""

import json

import gguf
import pytest

from panacea_jax.comparison import testbed
from panacea_jax.worlds import smollm2
from tests.models import test_gguf
from tests.models.test_gguf import model_of, write
from tests.runs import panacea
from tests.worlds.test_smollm2 import write_sets

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
load_recipe = testbed.load_recipe
CHAT = test_gguf.CHAT + "{% if add_generation_prompt %}<s>assistant\n{% endif %}"


def small(where):
    """The recipe with little to do."""
    config = load_recipe(where)
    for stage in (config, config.align, config.heal):
        stage.train.steps, stage.train.batch_size, stage.train.harmful_batch_size = 2, 2, 2
    config.data.num_examples, config.eval.num_examples, config.generate.max_new_tokens = 20, 3, 2
    config.compare.methods = ("random_perturbation:rho=1",)
    config.lora.targets, config.lora.layers = ("q",), ""
    return config


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("testbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_gguf, "CHAT", CHAT)
        write(root / "tiny.gguf", model_of("llama2", max_position_embeddings=512), "llama", gguf.GGMLQuantizationType.F32)
    write_sets(root / "public")
    return root


def command(place, *more):
    files = (f"--data={place / 'public'}", f"--gguf={place / 'tiny.gguf'}", f"--workdir={place / 'out'}")
    return panacea("quickstart", "--base=smollm2", *files, *more)


def test_the_whole_way(place, monkeypatch, capsys):
    monkeypatch.setattr(testbed, "load_recipe", small)
    monkeypatch.setattr(testbed, "OWN_TOKENS", 2)
    monkeypatch.setitem(smollm2.ALIGNMENT, "lora.layers", "upper:2")
    monkeypatch.setattr(smollm2, "TEMPLATE", CHAT)  # of tokens that the tiny model has
    # An untrained model says no sentence.
    monkeypatch.setattr(smollm2, "_whole_sentences", str.strip)
    assert command(place) == 0
    shown = capsys.readouterr().out
    result = json.loads((place / "out" / "compare" / "compare.json").read_text())
    assert [row["method"] for row in result["rows"]] == ["before", "sft", "random_perturbation:rho=1"]
    assert all({"hs", "hs_plus", "fa", "benign"} <= row["figures"].keys() and row["perplexity"] > 1 for row in result["rows"])
    assert "perplexity" in shown and "dax 0  →" in shown
    # An untrained model refuses nothing, so the guard fails, and says so.
    assert result["guard"] == {"0": False} and "FAIL the alignment guard (HS at most 5, benign answered at least 80): 0" in shown

    stamps = {p: p.stat().st_mtime_ns for p in (place / "out").rglob("*.safetensors")}
    assert command(place) == 0
    assert stamps == {p: p.stat().st_mtime_ns for p in (place / "out").rglob("*.safetensors")}

    file = place / "public" / "xstest" / "prompts.jsonl"
    file.write_text(file.read_text() + '{"prompt": "more", "type": "t", "label": "safe"}\n')
    capsys.readouterr()
    assert command(place) == 2
    assert "holds a testbed of another model or other data" in capsys.readouterr().err


def test_what_is_missing_is_said_in_a_line(place, tmp_path, capsys):
    for flags, said in (
        (["--base=smollm2"], "--data is not set"),
        (["--base=smollm2", f"--data={tmp_path}", f"--gguf={tmp_path}/none.gguf"], "none.gguf"),
        (["--base=smollm2", f"--data={tmp_path}", "--task=gsm8k"], "--task=gsm8k: one of sst2, ag_news"),
        (["--base=gpt2"], "--base=gpt2: one of miniature, smollm2"),
    ):
        assert panacea("quickstart", *flags, f"--workdir={tmp_path / 'w'}") == 2
        line = capsys.readouterr().err
        assert said in line and line.count("\n") == 1
