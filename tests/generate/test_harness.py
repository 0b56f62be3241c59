# ruff: noqa: E402 - what is skipped without lm_eval imports it
"""Behind lm-evaluation-harness' interface our model gives what the harness's own PyTorch model gives. Needs ``lm-eval``."""

import json
import math

import pytest

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed; pip install '.[harness]'")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from panacea_jax.data.tokenizer import load_tokenizer
from panacea_jax.errors import InputError
from panacea_jax.generate.harness import HarnessModel
from panacea_jax.models.model import load
from tests.tiny import write_model

pytestmark = pytest.mark.filterwarnings("default")  # theirs

LONG = " ".join(f"w{i % 37}" for i in range(50))


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = write_model(tmp_path_factory.mktemp("harness") / "base")
    ours = HarnessModel(
        load(folder, dtype="float32"), load_tokenizer(folder), batch_size=2, max_length=24
    )
    theirs = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=2, max_length=24)
    return ours, theirs


def asked(kind, *arguments):
    return [Instance(kind, {}, one, i) for i, one in enumerate(arguments)]


def test_loglikelihood(both):
    requests = asked(
        "loglikelihood", ("w1 w2", " w3 w4"), ("", "w5 w6"), ("w1 ", "w2"), (LONG, " w3"), ("w7", f" {LONG[:40]}")
    )  # fmt: skip
    ours, theirs = (lm.loglikelihood(requests) for lm in both)
    for (a, greedy), (b, best) in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=1e-4) and greedy == best


def test_loglikelihood_rolling(both):
    requests = asked("loglikelihood_rolling", ("w1 w2 w3",), (LONG,))
    ours, theirs = (lm.loglikelihood_rolling(requests) for lm in both)
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_generate_until(both):
    kwargs = {"until": ["w9"], "max_gen_toks": 6}
    requests = asked(
        "generate_until", ("w1 w2", kwargs), (LONG, {"until": [], "max_gen_toks": 4}), ("w5", {"until": "w3", "max_gen_toks": 6}),
    )  # fmt: skip
    ours, theirs = (lm.generate_until(requests) for lm in both)
    assert ours == theirs and any(ours)
    whole = both[0].generate_until(asked("generate_until", ("w1 w2", {"max_gen_toks": 6})))[0]
    stop = whole.split()[2]
    cut = both[0].generate_until(asked("generate_until", ("w1 w2", {"max_gen_toks": 6, "until": [stop]})))[0]
    assert cut == whole.partition(stop)[0] != whole


def test_chats(both):
    chat = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]
    for turns, go_on in ((chat[:1], True), (chat, False)):
        ours, theirs = (lm.apply_chat_template(turns, add_generation_prompt=go_on) for lm in both)
        assert ours == theirs and "w1" in ours
        assert both[0].tok_encode(ours) == both[1].tok_encode(ours)  # the beginning token once
    assert both[0].chat_template(True) == both[1].chat_template(True)


def test_what_it_does_not_have_is_refused(both):
    with pytest.raises(InputError, match="generation_kwargs: top_k is not one of until"):
        both[0].generate_until(asked("generate_until", ("w1", {"top_k": 4})))
    with pytest.raises(InputError, match="leaves no room for a prompt"):
        both[0].generate_until(asked("generate_until", ("w1", {"max_gen_toks": 24})))


def test_tasks_with_local_data(both, tmp_path):
    """A choice among answers, a text's perplexity and a written answer, through the harness from file to figure."""
    rows = [{"q": f"w{i} w{i + 1}", "choices": [" w3", " w4"], "gold": i % 2, "text": f"w{i} w2 w9"} for i in range(6)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}}, "test_split": "test"}
    tasks = [
        data | {"task": "choose", "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "choices",
                "doc_to_target": "gold", "target_delimiter": ""},
        data | {"task": "read", "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
                "metric_list": [{"metric": "word_perplexity", "aggregation": "weighted_perplexity"}]},
        data | {"task": "write", "output_type": "generate_until", "doc_to_text": "{{q}}", "doc_to_target": "{{choices[0]}}",
                "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4}, "metric_list": [{"metric": "exact_match"}]},
    ]  # fmt: skip
    found = [
        lm_eval.simple_evaluate(model=lm, tasks=[dict(t) for t in tasks], bootstrap_iters=0)["results"] for lm in both
    ]
    ours, theirs = found
    print(ours)
    assert ours["choose"]["acc,none"] == theirs["choose"]["acc,none"]
    assert ours["write"]["exact_match,none"] == theirs["write"]["exact_match,none"]
    perplexity = ours["read"]["word_perplexity,none"]
    assert math.isfinite(perplexity)
    assert perplexity == pytest.approx(theirs["read"]["word_perplexity,none"], rel=1e-4)
