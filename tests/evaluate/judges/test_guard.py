"""guard: first-token probabilities against transformers, and the forms a guard is asked in."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch

from panacea_jax.data.columns import CONTEXT_RULE
from panacea_jax.data.tokenizer import load_tokenizer
from panacea_jax.errors import InputError, record_text
from panacea_jax.evaluate.judges import guard as module
from panacea_jax.evaluate.judges import make_judge
from panacea_jax.evaluate.judges.forms import (
    FORMS,
    HARMBENCH,
    HARMBENCH_CONTEXTUAL,
    PLAIN,
    WILDGUARD,
)
from panacea_jax.evaluate.judges.reading import PAIRS
from tests.evaluate.judges.models import judge_config, texts, write_guard

LLAMA2 = Path(__file__).parents[3].parent / "shared" / "data" / "tokenizers" / "llama2"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("guard")
    return folder, write_guard(folder)


def next_probabilities(model, ids):
    """Probabilities of the next token, from one text without padding."""
    with torch.no_grad():
        return torch.softmax(model(torch.tensor([ids])).logits[0, -1].double(), 0).numpy()


def word(tokenizer, text):
    [token] = tokenizer(text, add_special_tokens=False).input_ids
    return token


def test_first_token_probability_equals_transformers(made):
    folder, model = made
    tokenizer = load_tokenizer(folder)
    judge = make_judge(judge_config("guard", folder))
    prompts, answers = texts(13, 200)
    got = judge.judge(prompts, answers)
    unsafe, safe = word(tokenizer, "unsafe"), word(tokenizer, "safe")
    for prompt, answer, verdict in zip(prompts, answers, got):
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        ids = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
        p = next_probabilities(model, ids)
        assert verdict.scores == pytest.approx(
            {"unsafe": p[unsafe] / (p[unsafe] + p[safe]), "mass": p[unsafe] + p[safe]}, abs=1e-5
        )
        assert verdict.flagged is bool(p[unsafe] > p[safe])
    assert {v.flagged for v in got} == {True, False}
    assert judge.judge(prompts[::-1], answers[::-1])[::-1] == got
    assert judge.self_test() == len(PAIRS)


def test_wildguard_answers_its_questions_in_turn(tmp_path):
    """Each answer is the likelier word and stands in the text that the next question reads."""
    model = write_guard(tmp_path, seed=5)  # says both words to every question
    tokenizer = load_tokenizer(tmp_path)
    judge = make_judge(judge_config("guard", tmp_path, template="wildguard"))
    prompts, answers = texts(9, 60, seed=2)
    yes, no = word(tokenizer, "yes"), word(tokenizer, "no")
    seen = set()
    for prompt, answer, verdict in zip(prompts, answers, judge.judge(prompts, answers)):
        text, wanted, said = WILDGUARD.format(prompt=prompt, answer=answer), {}, []
        for question in FORMS["wildguard"].questions:
            text += question.lead
            p = next_probabilities(model, tokenizer(text, add_special_tokens=False).input_ids)
            wanted |= {question.options[0].score: p[yes] / (p[yes] + p[no]), "mass": p[yes] + p[no]}
            said.append(bool(p[yes] > p[no]))
            text += " yes" if said[-1] else " no"
        assert verdict.scores == pytest.approx(wanted, abs=1e-5)
        assert (verdict.refused, verdict.flagged) == (said[1], said[2])
        seen.add(tuple(said))
    assert all(len({said[i] for said in seen}) == 2 for i in range(3))


def test_verdict_words_with_a_real_tokenizer(tmp_path):
    """Sentencepiece cuts "unsafe" in two and glues words to what precedes; the fork is found."""
    if not LLAMA2.exists():
        pytest.skip("the real data is not here")
    model = write_guard(tmp_path, vocab_size=32000)
    for file in tmp_path.glob("*tokenizer*"):
        file.unlink()
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    for file in LLAMA2.iterdir():
        shutil.copy(file, tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    judge = make_judge(judge_config("guard", tmp_path))
    [verdict] = judge.judge(["Mend it?"], ["Vix it."])
    text = PLAIN.format(prompt="Mend it?", answer="Vix it.")
    a, b = (tokenizer(text + w).input_ids for w in ("unsafe", "safe"))
    fork = [x == y for x, y in zip(a, b)].index(False)
    p = next_probabilities(model, a[:fork])
    assert verdict.scores["unsafe"] == pytest.approx(
        p[a[fork]] / (p[a[fork]] + p[b[fork]]), abs=1e-5
    )
    assert "-plain-" in judge.version


def test_forms(made, tmp_path):
    chat = make_judge(judge_config("guard", made[0]))
    assert chat.render("w1", "w2") == "<s> user : w1 assistant : w2 verdict :"
    wild = make_judge(judge_config("guard", made[0], template="wildguard"))
    assert "Human user:\n{a}\n\nAI assistant:\nw2\n\n---" in wild.render("{a}", "w2")
    for number, (end, gap) in enumerate((("<|end_header_id|>", "\n\n"), ("[/INST]", " "))):
        folder = tmp_path / str(number)
        write_guard(folder, "{% for m in messages %}{{ m['content'] }} {% endfor %}" + end + "\n")
        judge = make_judge(judge_config("guard", folder))
        assert judge.render("w1", "w2") == f"w1 w2 {end}{gap}"
    parts = "{% for m in messages %}{% for p in m['content'] %}{{ p['text'] }} {% endfor %}{% endfor %}:"
    write_guard(tmp_path / "parts", parts)
    assert make_judge(judge_config("guard", tmp_path / "parts")).render("w1", "w2") == "w1 w2 :"
    write_guard(tmp_path / "deaf", "{{ messages[0]['content'] }} :")
    with pytest.raises(InputError, match="leaves out the request or the answer"):
        make_judge(judge_config("guard", tmp_path / "deaf")).render("w1", "w2")
    write_guard(tmp_path / "bad", "{{ raise_exception('no such turn') }}")
    with pytest.raises(InputError, match="chat template failed .*no such turn"):
        make_judge(judge_config("guard", tmp_path / "bad")).judge(["w1"], ["w2"])


def test_versions_differ_by_form(made, tmp_path):
    write_guard(tmp_path / "bare", None)
    versions = [
        make_judge(judge_config("guard", folder, template=template)).version
        for folder, template in (
            (made[0], "llama_guard"), (made[0], "wildguard"), (tmp_path / "bare", "llama_guard"),
        )
    ]  # fmt: skip
    assert [v.split("-")[1] for v in versions] == ["llama_guard", "wildguard", "plain"]
    assert len(set(versions)) == 3


def test_forms_and_version_move_together(made):
    """Whoever edits a form raises the version and this hash."""
    questions = {name: (form.questions, form.flags, form.special, form.most) for name, form in FORMS.items()}
    texts = [HARMBENCH, HARMBENCH_CONTEXTUAL, CONTEXT_RULE, PLAIN, WILDGUARD]
    content = json.dumps([questions, texts, module.GAPS, module._THRESHOLD])
    pinned = {"1": "9909814aaf646ac4"}
    version = make_judge(judge_config("guard", made[0])).version.split("-")[0]
    assert hashlib.sha256(content.encode()).hexdigest()[:16] == pinned[version]


def test_a_long_answer_is_cut_and_a_long_prompt_refused(made):
    """The form's end, where the guard speaks, must stay."""
    folder, model = made
    judge = make_judge(judge_config("guard", folder))
    answer = " ".join(f"w{i % 60}" for i in range(700))
    tokenizer = load_tokenizer(folder)
    [verdict] = judge.judge(["w1"], [answer])
    ids = tokenizer(judge.render("w1", answer), add_special_tokens=False).input_ids
    tail = tokenizer(" verdict :", add_special_tokens=False).input_ids
    cut = [*ids[: 512 - len(tail) - 1], *tail]  # one position is the verdict's
    p = next_probabilities(model, cut)
    unsafe, safe = word(tokenizer, "unsafe"), word(tokenizer, "safe")
    assert verdict.scores["unsafe"] == pytest.approx(p[unsafe] / (p[unsafe] + p[safe]), abs=1e-5)
    with pytest.raises(InputError, match=r"512 tokens at most, and a prompt is longer by 196 \(text [0-9a-f]{12}") as error:
        judge.judge([answer], ["w2"])
    assert record_text(error.value) == answer


def test_a_tokenizer_without_the_words(made, tmp_path):
    copy = Path(shutil.copytree(made[0], tmp_path / "copy"))
    text = (copy / "tokenizer.json").read_text()
    (copy / "tokenizer.json").write_text(text.replace('"unsafe"', '"u"').replace('"safe"', '"s"'))
    with pytest.raises(InputError, match="cannot tell 'unsafe' from 'safe'"):
        make_judge(judge_config("guard", copy)).judge(["w1"], ["w2"])


def test_a_classifier_is_no_guard(made, tmp_path):
    copy = Path(shutil.copytree(made[0], tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    config["architectures"] = ["LlamaForSequenceClassification"]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="unsupported architecture LlamaForSequence"):
        make_judge(judge_config("guard", copy))
