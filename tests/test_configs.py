"""Every recipe loads as the command line loads it, and carries the published numbers."""

import itertools
import re
import runpy
from pathlib import Path

import pytest
from datasets import ReadInstruction
from ml_collections import ConfigDict

from panacea_jax import config
from panacea_jax.cli.keys import key_table
from panacea_jax.cli.parsing import parse_command
from panacea_jax.data import files, hub
from panacea_jax.data.categories import CATEGORIES
from panacea_jax.data.sources import parse_source
from panacea_jax.defences import DEFENCES
from panacea_jax.defences.spec import candidates, parse_stack
from panacea_jax.errors import InputError
from panacea_jax.evaluate.tasks import set_names
from panacea_jax.models.families import config_from_folder
from panacea_jax.stages import run as pipeline
from panacea_jax.stages.quickstart import ALIGN_STEPS, FINETUNE_STEPS
from panacea_jax.worlds.base import ROLES
from panacea_jax.worlds.world import Sizes, World
from tests.runs import make_place

# ml_collections loads recipes with a method of importlib that Python is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

CONFIGS = Path(__file__).parents[1] / "configs"
BASES = {
    "llama2_7b": "meta-llama/Llama-2-7b-hf",
    "gemma2_9b": "google/gemma-2-9b",
    "qwen2_7b": "Qwen/Qwen2-7B",
    "mistral_7b": "mistralai/Mistral-7B-v0.1",
    "gemma_7b": "google/gemma-7b",
}
VARIANTS = {"gsm8k": "gsm8k", "sst2": "sst2", "agnews": "ag_news", "alpaca": "alpaca"}


def load(recipe: str, *overrides: str) -> ConfigDict:
    return parse_command("doctor", [f"--config={CONFIGS / recipe}", *overrides])[1]


def test_every_recipe_is_tested():
    others = {"paper", "compare", "defences", "chat_models", "robustness", "panacea_variants", "smollm2", "experiments", "own"}
    assert {path.stem for path in CONFIGS.glob("*.py")} == {*BASES, *others}


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_recipe_has_the_papers_numbers(name: str, variant: str):
    c = load(f"{name}.py:{variant}")
    config.validate(c)
    assert c.is_locked
    assert c.model.path == BASES[name]
    # methods.md §1 and §14: the published scripts' arguments.
    assert (c.defence.name, c.defence.rho, c.defence.lam) == ("panacea", 1.0, 1e-3)
    assert (c.defence.every, c.defence.clamp, c.defence.final_epsilon) == (1, "reference", "last")
    assert (c.lora.rank, c.lora.alpha, c.lora.targets) == (32, 4.0, ("q", "k", "v"))
    o = c.optimizer
    assert (o.learning_rate, o.weight_decay, o.schedule) == (2e-5, 0.1, "constant")
    assert (o.b1, o.b2, o.eps, o.clip_norm) == (0.9, 0.999, 1e-8, 1.0)
    assert (c.train.epochs, c.train.batch_size, c.train.harmful_batch_size) == (20, 10, 10)
    assert (c.data.max_length, c.data.num_examples, c.data.poison_ratio) == (256, 1000, 0.1)
    assert (c.data.num_harmful, c.data.num_alignment) == (1000, 5000)
    assert (c.data.template, c.eval.num_examples) == ("alpaca", 1000)
    assert (c.align.optimizer.learning_rate, c.align.optimizer.weight_decay) == (5e-4, 0.1)
    assert (c.align.train.epochs, c.align.train.batch_size) == (20, 10)
    assert (c.model.dtype, c.model.remat) == ("bfloat16", "full")


def test_ones_own_data_is_not_attacked():
    """Nor is any of it left out, or anything read that is not named."""
    c = load("own.py")
    config.validate(c)
    d = c.data
    assert (d.attack, d.user, d.harmful, d.num_examples, d.num_harmful, c.eval.tasks, c.model.path) == ("", "", "", 0, 0, (), "")
    assert (d.template, c.align.defence.name, c.defence.name, c.defence.rho) == ("chat", "", "panacea", "auto")


@pytest.mark.parametrize("task", ["sst2", "ag_news"])
def test_the_testbed_attacks_what_it_aligned(task: str):
    c = load(f"smollm2.py:{task}")
    config.validate(c)
    assert c.data.user.startswith(f"{task}@") and c.eval.tasks[1] == f"{task}@smollm2_results/data/test_{task}.jsonl"
    assert c.lora.init_from == "smollm2_results/aligned/align/adapter" and not c.align.defence.name
    assert not {*c.heal.sets, *c.compare.validation} & {*c.eval.tasks}


@pytest.mark.parametrize("variant", VARIANTS)
def test_sources_are_hub_ids_with_a_split(variant: str):
    c = load(f"llama2_7b.py:{variant}")
    train = {key: c.data[key] for key in ("user", "attack", "harmful")}
    tasks = {key: parse_source(spec).task for key, spec in train.items()}
    assert tasks == {"user": VARIANTS[variant], "attack": "beavertails", "harmful": "beavertails"}
    names = set_names(c.eval.tasks)
    assert names[0] == "beavertails-panacea-1000" and names[-1] == "xstest"
    task = [] if variant == "alpaca" else [f"{VARIANTS[variant]}-panacea-1000"]
    assert names[1:-1] == task
    for spec in (*train.values(), *c.eval.tasks):
        where = parse_source(spec).where
        assert files.local(where) is None, "looks like a path, so it would never be fetched"
        split = hub.split_id(where)[2]
        assert split is not None
        ReadInstruction.from_spec(split)
    assert not set(train.values()) & set(c.eval.tasks)


def test_attack_and_harmful_records_are_disjoint():
    c = load("llama2_7b.py:gsm8k")
    attack, harmful = (hub.split_id(parse_source(c.data[k]).where) for k in ("attack", "harmful"))
    assert attack[:2] == harmful[:2]
    whole = {"30k_train": 27186}
    [a], [h] = (ReadInstruction.from_spec(str(s[2])).to_absolute(whole) for s in (attack, harmful))
    assert (a.from_, a.to, h.from_, h.to) == (0, 5000, 5000, 27186)


def test_alignment_is_left_out_until_it_is_set():
    assert load("llama2_7b.py:gsm8k").align.defence.name == ""
    c = load(
        "llama2_7b.py:gsm8k",
        "--config.align.defence.name=sft",
        "--config.data.alignment=refusals@refusals.jsonl",
        "--config.eval.tasks=('pairs@a.jsonl', 'pairs@b.jsonl')",
        "--config.mesh.fsdp=2",
        "--config.mesh.tensor=4",
    )
    assert (c.align.defence.name, c.data.alignment) == ("sft", "refusals@refusals.jsonl")
    assert c.eval.tasks == ("pairs@a.jsonl", "pairs@b.jsonl")
    assert (c.mesh.data, c.mesh.fsdp, c.mesh.tensor) == (1, 2, 4)


def test_the_variant_may_be_left_out():
    assert load("qwen2_7b.py").data.user == load("qwen2_7b.py:gsm8k").data.user


@pytest.mark.parametrize("name", BASES)
def test_unknown_variant_lists_the_known_ones(name: str):
    with pytest.raises(InputError, match="unknown variant 'mnli'; known are gsm8k, sst2, agnews"):
        load(f"{name}.py:mnli")


@pytest.mark.parametrize("name", BASES)
def test_docstrings_name_paper_command_figures_cost_and_hardware(name: str):
    doc = (CONFIGS / f"{name}.py").read_text("utf-8").split('"""')[1]
    assert "2501.18100" in doc
    assert f"panacea run --config=configs/{name}.py:gsm8k --workdir=" in doc
    assert "as published, not measured by us" in doc
    assert re.search(r"Cost \(estimate.*Hardware \(estimate", doc, re.S)


# Parameters that the hub gives for each model; of Gemma 3 the tower's 416,866,032 and the projector's 2,950,272 are left out.
CHAT_MODELS = {
    "llama3_1_8b": ("meta-llama/Llama-3.1-8B-Instruct", 8_030_261_248),
    "llama3_2_3b": ("meta-llama/Llama-3.2-3B-Instruct", 3_212_749_824),
    "llama2_7b": ("meta-llama/Llama-2-7b-chat-hf", 6_738_415_616),
    "qwen2_5_7b": ("Qwen/Qwen2.5-7B-Instruct", 7_615_616_512),
    "qwen3_8b": ("Qwen/Qwen3-8B", 8_190_735_360),
    "gemma2_9b": ("google/gemma-2-9b-it", 9_241_705_984),
    "gemma3_4b": ("google/gemma-3-4b-it", 4_300_079_472 - 416_866_032 - 2_950_272),
}


@pytest.mark.parametrize("variant", CHAT_MODELS)
def test_chat_models(variant: str):
    c, (hub_id, parameters) = load(f"chat_models.py:{variant}"), CHAT_MODELS[variant]
    config.validate(c)
    assert (c.model.path, c.data.template, c.align.defence.name) == (hub_id, "chat", "")
    architecture = config_from_folder(CONFIGS / "architectures" / variant)
    assert architecture.num_parameters() == parameters
    doc = (CONFIGS / "chat_models.py").read_text("utf-8").split('"""')[1]
    [row] = [line.split() for line in doc.splitlines() if line.split()[:1] == [variant] and "/" in line]  # fmt: skip
    assert row[1] == hub_id and float(row[2]) == pytest.approx(parameters, rel=2e-3)


def test_chat_models_are_those_of_the_recipe():
    with pytest.raises(InputError, match=f"known are {', '.join(CHAT_MODELS)}"):
        load("chat_models.py:llama")
    assert {path.name for path in (CONFIGS / "architectures").iterdir()} == set(CHAT_MODELS)


def _keys(section: ConfigDict, prefix: str = "") -> list[str]:
    nested = [
        _keys(value, f"{prefix}{key}.") if isinstance(value, ConfigDict) else [prefix + key]
        for key, value in section.items()
    ]
    return [key for keys in nested for key in keys]


def test_every_key_is_documented_with_its_default():
    """What ``--help`` prints as well."""
    default = config.get_config()
    repeated = [name for key in key_table() if key.default == "as above" for name in key.names]
    assert repeated == [f"{stage}.{part}" for stage in ("align", "heal") for part in ("defence", "optimizer", "train")]
    rows = [(key.names, key.default) for key in key_table() if key.default != "as above"]
    keys = [(key,) for key in _keys(default) if not key.startswith(tuple(f"{name}." for name in repeated))]
    assert sorted(names for names, _ in rows) == sorted(keys)
    for (key,), written in rows:
        value = default
        for part in key.split("."):
            value = value[part]
        shown = written.replace('"', "'")
        same = float(shown) == value if isinstance(value, float) else shown == repr(value)
        assert same, f"docs/configuration.md: {key} is {written} there, {value!r} in config.py"


def test_the_comparison_gives_every_method_the_same_number_of_candidates():
    c = load("compare.py")
    assert c.compare.world == "miniature" and not set(c.compare.seeds) & set(c.compare.development)
    counts = {text: len(candidates(text, "grid")) for text in c.compare.grid}
    assert set(counts.values()) == {4}
    stacks = [stack for text in c.compare.grid for stack in candidates(text, "grid")]
    named = {part.name for s in stacks for part in (s.align, s.finetune, s.heal) if part}
    assert named == DEFENCES.keys() - {"sft", "unlearn"}  # which is an attack
    # The quickstart's alignment and fine-tuning, whichever method defends.
    assert (c.train.steps, c.align.train.steps) == (FINETUNE_STEPS, ALIGN_STEPS)


@pytest.mark.parametrize("variant", ["miniature", "smoke", "llama2_7b"])
def test_comparison_variants_load(variant):
    config.validate(load(f"compare.py:{variant}"))
    with pytest.raises(InputError, match="known are miniature, smoke, llama2_7b"):
        load("compare.py:nothing")


BUDGETS = runpy.run_path(str(CONFIGS / "defences.py"))["BUDGETS"]


def test_every_defence_has_a_budget():
    named = {text.partition(":")[0] for text, _ in BUDGETS.values()}
    assert named == DEFENCES.keys() - {"unlearn"}  # which is an attack


@pytest.mark.parametrize("variant", BUDGETS)
def test_budget_of_a_method(variant):
    """The variant's method stands in its stage with the hyper-parameters of its row, everything validates."""
    c = load(f"defences.py:{variant}")
    config.validate(c)
    stack = parse_stack(BUDGETS[variant][0], "row")
    for part, section in (
        (stack.align, c.align.defence),
        (stack.finetune, c.defence),
        (stack.heal, c.heal.defence),
    ):
        if part:
            assert section.name == part.name
            assert {key: section[key] for key, _ in part.settings} == dict(part.settings)
    for key, value in BUDGETS[variant][1].items():
        found = c
        for word in key.split("."):
            found = found[word]
        assert found == value, key


K, C = "constant", "cosine"
# methods.md, typed off it and not off the recipe: alignment (rate, schedule, epochs, batch), adapter (rank, projections), fine-tuning
# (rate, schedule, batch, records, poison), alignment and harmful records; None where the method has none, or no figure is known.
PUBLISHED = {
    "sft": ((5e-4, K, 20, 10), (32, 3), (2e-5, K, 10, 1000, 0.1), 5000, None),
    "vaccine-2k": ((1e-3, C, 50, 5), (8, 7), (1e-5, C, 5, 1000, 0.1), 2000, None),
    "vaccine-5k": ((5e-4, K, 20, 10), (32, 3), (1e-5, K, 10, 1000, 0.1), 5000, None),
    "vaccine-5k-panacea": ((5e-4, K, 20, 10), (32, 3), (2e-5, K, 10, 1000, 0.1), 5000, None),
    "t_vaccine": ((1e-3, C, 20, 10), (8, 7), (1e-5, C, 10, 1000, 0.1), 2000, 200),
    "booster-1k": ((5e-4, K, 20, 10), (32, 3), (2e-5, K, 10, 1000, 0.1), 5000, 1000),
    "booster-5k": ((5e-4, K, 20, 10), (32, 3), (1e-5, K, 10, 1000, 0.1), 5000, 5000),
    "repnoise": ((1e-4, C, 1, 4), None, None, 1000, 1000),
    "repnoise-panacea": ((5e-4, K, 20, 5), (32, 3), (2e-5, K, 10, 1000, 0.1), 5000, 1000),
    "repnoise-antidote": ((1e-3, C, 20, 5), (256, 3), (1e-4, K, 5, 5000, 0.2), 5000, 2000),
    "repnoise-t_vaccine": ((1e-3, C, 20, 8), (8, 7), (1e-5, C, 10, 1000, 0.1), 2000, 200),
    "lisa": (None, (8, 2), (1e-5, K, 5, 5000, 0.1), 10000, None),
    "lisa-booster": ((5e-4, K, 20, 10), (32, 3), (1e-5, K, 10, 1000, 0.1), 10000, None),
    "lisa-antidote": ((1e-3, C, 20, 5), (256, 3), (1e-4, K, 5, 5000, 0.2), 10000, None),
    "ldifs-booster": ((5e-4, K, 20, 10), (32, 3), (1e-5, K, 5, 1000, 0.1), 5000, None),
    "ldifs-antidote": ((1e-3, C, 20, 5), (256, 3), (1e-4, K, 5, 5000, 0.2), 5000, None),
    "ewc": ((1e-3, C, 50, 5), (8, 7), (1e-5, C, 5, 1000, 0.1), 2000, None),
    "kl": ((1e-3, C, 50, 5), (8, 7), (1e-5, C, 5, 1000, 0.1), 2000, None),
    "vlguard-mix": (None, (8, 7), (1e-5, C, 5, 1000, 0.1), 100, None),
    "antidote": ((1e-3, C, 20, 5), (256, 3), (1e-4, K, 5, 5000, 0.2), 5000, 2000),
}
# And of the methods: by stage.
METHODS = {
    "vaccine-2k": {"align.rho": 2}, "vaccine-5k": {"align.rho": 5}, "vaccine-5k-panacea": {"align.rho": 20},
    "t_vaccine": {"align.rho": 3, "align.layers": 8, "align.interval": 20, "align.importance_interval": 200},
    "booster-1k": {"align.lam": 100, "align.alpha": 0.01}, "booster-5k": {"align.lam": 5, "align.alpha": 0.1},
    "repnoise": {"align.alpha": 1, "align.beta": 0.001, "align.paired": True},
    "repnoise-panacea": {"align.alpha": 0.02, "align.beta": 0.1, "align.paired": False},
    "repnoise-antidote": {"align.alpha": 0.1, "align.beta": 0.001}, "repnoise-t_vaccine": {"align.alpha": 0.1, "align.beta": 0.001},
    "lisa": {"rho": 1, "alignment_steps": 100, "finetune_steps": 900}, "lisa-antidote": {"rho": 1},
    "lisa-booster": {"rho": 0.01, "alignment_steps": 100, "finetune_steps": 900},
    "ldifs-booster": {"rho": 1e-4, "gate": 0.1}, "ldifs-antidote": {"rho": 1e-4, "gate": 0.1},
    "ewc": {"lam": 1e9}, "kl": {"lam": 0.1}, "vlguard-mix": {"mode": "mix"}, "antidote": {"heal.dense_ratio": 0.1},
}  # fmt: skip


@pytest.mark.parametrize("variant", PUBLISHED)
def test_budget_has_the_published_figures(variant):
    c = load(f"defences.py:{variant}")
    align, adapter, tuning, alignment, harmful = PUBLISHED[variant]
    o, t = c.align.optimizer, c.align.train
    if align:
        assert (o.learning_rate, o.schedule, t.epochs, t.batch_size) == align
        assert (o.weight_decay, o.warmup_ratio, t.steps) == (0.1, 0.1, 0)
    assert (c.train.full_parameters, t.full_parameters) == ((adapter is None),) * 2
    if adapter:
        assert (c.lora.rank, len(c.lora.targets), c.lora.alpha) == (*adapter, 4)
    o, t = c.optimizer, c.train
    found = (o.learning_rate, o.schedule, t.batch_size, c.data.num_examples, c.data.poison_ratio)
    assert tuning is None or (found == tuning and (t.epochs, t.steps) == (20, 0))
    assert o.weight_decay == (0 if variant == "lisa" else 0.1)
    assert c.data.num_alignment == alignment and harmful in (None, c.data.num_harmful)
    for key, value in METHODS.get(variant, {}).items():
        stage, _, key = key.rpartition(".")
        assert (c[stage] if stage else c).defence[key] == value, key
    if variant.startswith("lisa"):
        assert t.alignment_batch_size == t.batch_size
    if variant == "t_vaccine":
        assert c.align.train.harmful_batch_size == 1


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("place"))


@pytest.mark.parametrize("variant", BUDGETS)
def test_budget_passes_the_check_of_a_run(variant, place):
    """Nothing is missing but the alignment set, which the recipe says to give. Sources that the recipe names become local ones."""
    c = load(f"defences.py:{variant}")
    assert "" not in (c.model.path, c.data.user, c.data.attack, c.data.harmful)
    local = {
        "user": "user",
        "attack": "attack",
        "harmful": "alignment",
        "benign": "user",
    }  # harmful: in pairs with the alignment
    for key, name in local.items():
        if c.data[key]:
            assert files.local(parse_source(c.data[key]).where) is None
            c.data[key] = place.spec(name)
    for section, key in ((c.model, "path"), (c.defence, "base"), (c.heal.defence, "base")):
        if section[key]:
            assert section[key] == BASES["llama2_7b"]
            section[key] = str(place.base)
    c.data.num_examples = c.data.num_harmful = c.data.num_alignment = 0
    c.eval.tasks = (place.spec("test"),)
    with pytest.raises(InputError, match=r"config\.data\.alignment is not set"):
        pipeline.check_run(c)
    c.data.alignment = place.spec("alignment")
    pipeline.check_run(c)


def test_unknown_budget():
    with pytest.raises(InputError, match="unknown variant 'booster'; known are sft, vaccine-2k"):
        load("defences.py:booster")


@pytest.mark.parametrize(
    ("variant", "settings"),
    [("sweep", 12), ("ratios", 1), ("harmful", 4), ("later", 10), ("unlearn", 7), ("shift", 2), ("attacks", 28), ("adaptive", 6)],
)  # fmt: skip
def test_robustness_varies_what_it_says(variant, settings):
    c = load(f"robustness.py:{variant}")
    found = config.variations(c.compare.vary, c)
    assert len(found) == settings
    assert c.compare.methods and not c.compare.grid
    if variant == "shift":  # the defender's categories are those that the attack is not of
        known, attack = (parse_source(spec).categories for spec in (dict(found[0])["data.harmful"], c.data.attack))
        assert known.names == attack.names and (known.keep, attack.keep) == (True, False)
        assert all(sum(n.startswith(name) for n in CATEGORIES) == 1 for name in known.names)
    else:
        assert (c.compare.world, c.train.steps) == ("miniature", FINETUNE_STEPS)


def test_fifty_epochs_and_a_search_by_the_attacker():
    c = load("robustness.py:epochs")
    assert len(config.variations(c.compare.vary, c)) == 8 and c.train.steps == 0
    c = load("robustness.py:search")
    assert not c.compare.methods and c.sweep.objectives == ("-hs_attacked", "fa")
    assert [parse_source(spec).attacked for spec in c.eval.tasks].count(True) == 1


def test_the_attackers_words_are_the_miniatures():
    c = load("robustness.py:adaptive")
    known = World(0, Sizes(nouns=12, unseen=4)).vocabulary()
    texts = [c.attack[key] for key in ("trigger", "identity", "affirmation", "refusal")]
    assert {word for text in texts for word in text.split()} <= {*known, *ROLES}


def test_unknown_robustness():
    with pytest.raises(InputError, match="unknown variant 'swoop'; known are sweep, ratios"):
        load("robustness.py:swoop")


@pytest.mark.parametrize(
    ("variant", "methods", "settings"),
    [("epochs", 5, 1), ("rho_lambda", 25, 1), ("layers", 1, 3), ("mask_ratio", 8, 1), ("masks", 15, 1), ("learning_rates", 4, 9)],
)
def test_experiments_vary_what_they_say(variant, methods, settings):
    c = load(f"experiments.py:{variant}")
    assert (len(c.compare.methods), len(config.variations(c.compare.vary, c))) == (methods, settings)
    assert c.compare.ratios == (0.1,) and len(c.compare.seeds) >= 3 and not set(c.compare.seeds) & {*range(50), 50, *range(60, 75)}
    assert (c.eval.every == -1) == (variant == "epochs")
    if variant == "rho_lambda":
        grid = {tuple(part for _, part in parse_stack(m, "key").finetune.settings[:2]) for m in c.compare.methods if "panacea" in m}
        assert grid >= set(itertools.product((0.1, 0.5, 1, 2, 5), (1e-4, 1e-3, 1e-2)))


def test_unknown_experiment():
    with pytest.raises(InputError, match="unknown variant 'rho'; known are epochs, rho_lambda"):
        load("experiments.py:rho")
