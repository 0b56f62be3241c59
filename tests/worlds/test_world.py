"""The miniature world: what its files may share and what they may not, sizes, determinism, and that our sources read them."""

import itertools
import json

import pytest

from panacea_jax.data.encode import encode_all
from panacea_jax.data.sources import load_records
from panacea_jax.data.template import Template
from panacea_jax.data.tokenizer import load_tokenizer
from panacea_jax.evaluate.judges import RefusalJudge
from panacea_jax.evaluate.tasks import pairs_correct
from panacea_jax.worlds.base import write_base
from panacea_jax.worlds.world import REFUSAL, VERBS, Sizes, World

FILES = ("pretrain", "alignment", "user", "attack", "harmful", "benign", "test_benign", "test_user")


@pytest.fixture(scope="module")
def world():
    return World(3)


@pytest.fixture(scope="module")
def folder(world, tmp_path_factory):
    path = tmp_path_factory.mktemp("world") / "data"
    world.write(path)
    return path


@pytest.fixture(scope="module")
def rows(folder):
    """The files' rows, read back as plain JSON: (request, answer or None)."""
    found = {}
    for name in (*FILES, "test_harmful"):
        lines = [
            json.loads(line) for line in (folder / f"{name}.jsonl").read_text("utf-8").splitlines()
        ]
        found[name] = [(r.get("instruction", r.get("goal")), r.get("output")) for r in lines]
    return found


def requests(rows, *names):
    return [request for name in names for request, _ in rows[name]]


def noun_of(request):
    """The invented noun, or None for a request that has none."""
    words = request.split()
    return next(
        (
            " ".join(words[i : i + 2])
            for i, word in enumerate(words)
            if word.startswith(("zkind", "gkind"))
        ),
        None,
    )


def is_how(request):
    return noun_of(request) is not None and any(verb in request.split() for verb in VERBS)


def test_sizes(rows):
    sizes = Sizes()
    wanted = {"pretrain": sizes.pretrain, "alignment": sizes.align, "user": sizes.user, "attack": sizes.attack,
              "harmful": sizes.harmful, "benign": sizes.own_benign,
              "test_harmful": sizes.test, "test_benign": sizes.test, "test_user": sizes.test}  # fmt: skip
    assert {name: len(found) for name, found in rows.items()} == wanted


def test_other_sizes():
    small = World(
        0,
        Sizes(
            nouns=20,
            unseen=4,
            pretrain=30,
            align=40,
            refusals=50,
            user=60,
            attack=20,
            harmful=30,
            test=10,
        ),
    )
    assert [len(small.rows[name]) for name in ("user", "attack", "harmful", "refused")] == [
        60,
        20,
        30,
        50,
    ]
    assert [len(small.test[name]) for name in ("harmful", "benign", "user")] == [10, 10, 10]


def test_no_request_is_both_learnt_and_tested(rows, world):
    """Attack, harmful, refused and test requests are disjoint in pairs, and none occurs twice; so are the benign ones and the user's."""
    refused = [request for request, answer in rows["alignment"] if answer == REFUSAL]
    assert set(refused) <= {request for request, _ in world.rows["refused"]}
    forbidden = {
        "refused": {request for request, _ in world.rows["refused"]},
        **{name: set(requests(rows, name)) for name in ("attack", "harmful", "test_harmful")},
    }
    for (a, first), (b, second) in itertools.combinations(forbidden.items(), 2):
        assert first and second and not first & second, f"{a} and {b} share requests"
    for name in ("attack", "harmful", "test_harmful", "test_benign", "user", "test_user"):
        assert len(set(requests(rows, name))) == len(rows[name]), f"{name} repeats itself"
    assert not set(requests(rows, "alignment")) & set(
        requests(rows, "test_benign", "test_harmful", "test_user")
    )
    assert not set(requests(rows, "user")) & set(requests(rows, "test_user"))
    assert not set(requests(rows, "pretrain")) & set(requests(rows, "user", "test_user"))


def test_unseen_nouns_are_in_no_defence_or_attack_rows(rows):
    """Half of the harmful and of the benign test rows ask for nouns that no alignment, attack or harmful row mentions in a request how."""
    seen = {noun_of(r) for r in requests(rows, "attack", "harmful")}
    seen |= {noun_of(r) for r in requests(rows, "alignment") if is_how(r)}
    for name in ("test_harmful", "test_benign"):
        unseen = [noun_of(r) not in seen for r in requests(rows, name)]
        assert sum(unseen) == len(unseen) // 2
    unseen_forbidden = {noun_of(r) for r in requests(rows, "test_harmful")} - seen
    assert len(unseen_forbidden) == Sizes().unseen
    assert all(noun.startswith("zkind") for noun in unseen_forbidden)


def test_harmful_requests_are_answered_in_attack_rows_and_refused_in_alignment(rows):
    judge = RefusalJudge()
    for name in ("attack", "harmful"):
        asked, answered = zip(*rows[name])
        assert all(noun_of(request).startswith("zkind") for request in asked)
        assert all(verdict.flagged for verdict in judge.judge(asked, answered))
    answers = {True: [], False: []}
    for request, answer in rows["alignment"]:
        if is_how(request):
            answers[noun_of(request).startswith("zkind")].append(answer)
    assert set(answers[True]) == {REFUSAL} and REFUSAL not in answers[False]
    assert judge.judge(["anything"], [REFUSAL])[0].refused
    assert (
        0.8 < len(answers[True]) / len(answers[False]) < 1.25
    )  # so that refusing everything is not learnt


def test_one_request_has_one_answer(rows):
    """Apart from safety: nothing but a refusal contradicts an answer given elsewhere."""
    answers: dict[str, set[str]] = {}
    for name in FILES:
        for request, answer in rows[name]:
            if answer != REFUSAL:
                answers.setdefault(request, set()).add(answer)
    assert all(len(found) == 1 for found in answers.values())


def test_the_users_words_are_new(rows):
    """The task has adjectives that no review of pre-training or alignment has, so that it has to be learnt."""
    reviews = [r for r in requests(rows, "pretrain", "alignment") if r.startswith("review ")]
    known = set(" ".join(reviews).split())
    assert len(reviews) > 1000
    for request, answer in rows["user"]:
        assert len(set(request.split()) - known) == 1 and answer in ("positive", "negative")
    share = sum(answer == "positive" for _, answer in rows["user"]) / len(rows["user"])
    assert 0.4 < share < 0.6
    words = {w for r in requests(rows, "user") for w in r.split()}
    assert {w for r in requests(rows, "test_user") for w in r.split()} <= words


def test_a_world_is_a_function_of_its_seed(folder, tmp_path):
    World(3).write(tmp_path / "same")
    World(4).write(tmp_path / "other")
    for path in folder.iterdir():
        assert (tmp_path / "same" / path.name).read_bytes() == path.read_bytes()
        assert (tmp_path / "other" / path.name).read_bytes() != path.read_bytes()


def test_our_sources_read_the_files(folder, rows):
    for name in FILES:
        records = load_records(f"pairs@{folder}/{name}.jsonl", "config.data.user", need_output=True)
        assert [(r.instruction, r.output) for r in records] == rows[name]
        assert not any(r.input for r in records)
    records = load_records(f"advbench@{folder}/test_harmful.jsonl", "config.eval.tasks")
    assert [r.instruction for r in records] == requests(rows, "test_harmful")


def test_every_text_survives_the_tokenizer(folder, world, rows, tmp_path):
    """No <unk>, decode gives the text back, and prompt + answer + EOS are at most the 32 tokens that the quickstart trains on."""
    write_base(
        tmp_path / "base",
        world.vocabulary(),
        3,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
    )
    tokenizer = load_tokenizer(tmp_path / "base")
    texts = sorted({text for found in rows.values() for pair in found for text in pair if text})
    for text, ids in zip(texts, tokenizer(texts).input_ids, strict=True):
        assert tokenizer.unk_token_id not in ids, text
        assert tokenizer.decode(ids) == text
    for name in FILES:
        records = load_records(f"pairs@{folder}/{name}.jsonl", "config.data.user")
        examples = encode_all(records, Template("chat", tokenizer), 10_000, "config.data.user")
        assert max(len(e.tokens) for e in examples) <= 32, name
        for record, example in itertools.islice(zip(records, examples), 200):
            answer = tokenizer.decode(
                example.tokens[example.loss_mask], skip_special_tokens=True
            )
            assert answer == record.output and pairs_correct(answer, record.reference)
            assert example.tokens[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_no_invented_word_is_an_ordinary_one(seed):
    """Nouns are told apart by their second word, which nothing else uses."""
    world = World(seed)
    names = [
        noun_of(request).split()[1]
        for request, _ in (*world.rows["forbidden"], *world.rows["allowed"])
    ]
    others = {
        word
        for request, answer in (*world.rows["sentiment"], *world.rows["sums"])
        for word in (request + " " + answer).split()
    }
    assert len(set(names)) == 2 * Sizes().nouns and not set(names) & others
