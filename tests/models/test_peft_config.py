"""The table of peft's keys against peft's own dataclass, and each kind of setting against what peft makes of it."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file

from panacea_jax.errors import InputError
from panacea_jax.models import lora
from panacea_jax.models.model import load
from panacea_jax.models.peft import WEIGHTS_FILE, adapter_tensors, save_adapter
from panacea_jax.models.peft_config import CONFIG_FILE, HANDLED, HARMLESS, REFUSED, read_peft_config
from tests.families import build, save
from tests.models.made_by_peft import TOKENS, logits, peft_adapter, reloaded, torch_model

QV = ["q_proj", "v_proj"]


@pytest.fixture(scope="module")
def ours(model):
    """Our logits with an adapter merged, compiled once for all."""
    forward = jax.jit(lambda weights, tokens: model.apply(weights, None, tokens)[0])

    def run(adapter=None):
        weights = model.weights if adapter is None else lora.merge(model.weights, adapter)
        return np.asarray(forward(weights, jnp.asarray(TOKENS)))

    return run


def assert_same(found, wanted):
    """To 1e-5 of their norm: peft's own decompositions of the base, in float32, are worth no more."""
    assert np.linalg.norm(found - wanted) < 1e-5 * np.linalg.norm(wanted)


# ---- the table


def test_every_key_of_peft_is_in_one_group():
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    groups = [set(HANDLED), set(HARMLESS), set(REFUSED)]
    assert fields - set().union(*groups) == set(), "new in peft: handle it, or say why not"
    assert set().union(*groups) - fields == set(), "gone from peft"
    assert sum(map(len, groups)) == len(fields), "in two groups"


def test_the_defaults_of_peft_pass(tmp_path):
    peft.LoraConfig(target_modules=QV).save_pretrained(str(tmp_path))
    assert read_peft_config(tmp_path).rank("model.layers.0.self_attn.q_proj") == 8


def test_the_documentation_has_the_same_table():
    text = (Path(__file__).parents[2] / "docs" / "weights.md").read_text("utf-8")
    for group in (HANDLED, HARMLESS, REFUSED):
        for key, why in group.items():
            assert f"| `{key}` | {why} |" in text, key


def write(folder, **changes):
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": QV} | changes
    folder.mkdir(exist_ok=True)
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("key", REFUSED)
def test_what_is_refused_is_named_and_may_be_off(tmp_path, key):
    with pytest.raises(InputError, match=f"{key} = .* is not supported: "):
        read_peft_config(write(tmp_path / "on", **{key: {"some": 1}}))
    for off in (None, False, [], {}):
        read_peft_config(write(tmp_path / "off", **{key: off}))


def test_a_key_of_a_later_peft(tmp_path):
    for off in (None, False, "", [], {}):
        read_peft_config(write(tmp_path, new_trick=off))
    for on in (True, 0, 0.5, "fast", {"k": None}):
        with pytest.raises(InputError, match="new_trick = .*: a key that is not known here"):
            read_peft_config(write(tmp_path, new_trick=on))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft_type": "IA3", "r": None}, "peft_type = 'IA3'"),
        ({"peft_type": "LOHA"}, "peft_type = 'LOHA'"),
        ({"target_modules": None}, "target_modules = None: expected names or a regular expression"),
        ({"target_modules": "(q_proj"}, "target_modules = "),
        ({"exclude_modules": [1]}, "exclude_modules = "),
        ({"layers_to_transform": [True]}, "layers_to_transform = "),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern = "),
        ({"alpha_pattern": {"*": 3}}, "alpha_pattern = "),
        ({"target_modules": "all-linear", "layers_to_transform": [0]}, "layers_to_transform goes"),
        ({"layers_pattern": "layers"}, "layers_pattern needs layers_to_transform"),
        *(
            ({"init_lora_weights": init}, f"init_lora_weights = '{init}' changes the base")
            for init in ("pissa_niter_4", "corda", "loftq", "lora_ga", "new_init")
        ),
    ],
    ids=str,
)
def test_one_line_for_what_cannot_be(tmp_path, changes, said):
    with pytest.raises(InputError, match=r"adapter_config\.json: ") as caught:
        read_peft_config(write(tmp_path, **changes))
    assert said in str(caught.value) and "\n" not in str(caught.value)


# ---- kinds of settings, each against peft on a base of its own

KINDS = {
    "regex": {"target_modules": r".*layers\.1\.self_attn\.(q|v)_proj"},
    "regex_two_blocks": {"target_modules": r"model\.layers\.[02]\.(mlp\.up|self_attn\.o)_proj"},
    "regex_every_layer": {"target_modules": r".*_proj"},
    "all_linear": {"target_modules": "all-linear", "use_rslora": True},
    "layers": {"target_modules": QV, "layers_to_transform": [1]},
    "one_layer": {"target_modules": QV, "layers_to_transform": 2, "layers_pattern": "layers"},
    "layers_pattern": {
        "target_modules": ["down_proj"], "layers_to_transform": [0, 2], "layers_pattern": ["h", "layers"],
    },
    "exclude_head": {"target_modules": QV, "exclude_modules": ["lm_head"]},
    "exclude_names": {
        "target_modules": QV, "exclude_modules": ["layers.0.self_attn.q_proj", "2.self_attn.v_proj"],
    },
    "exclude_regex": {"target_modules": "all-linear", "exclude_modules": r".*layers\.2\..*"},
    "rank_and_alpha": {"target_modules": QV, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 32}},
    "rank_by_layer": {"target_modules": QV, "rank_pattern": {r"layers\.[01]\..*": 6, "q_proj": 1}},
    "rank_rslora": {
        "target_modules": ["o_proj", "up_proj"], "use_rslora": True, "rank_pattern": {r"^model\.layers\.0\.mlp\.up_proj": 9},
    },
    "alpha_only": {"target_modules": QV, "alpha_pattern": {r"2\.self_attn\.v_proj": 1, "v_proj": 3.5}},
    "save_head": {"target_modules": QV, "modules_to_save": ["lm_head"]},
    "save_embedding": {"target_modules": QV, "modules_to_save": ["embed_tokens", "lm_head"]},
    "save_norm": {"target_modules": QV, "modules_to_save": ["norm", "input_layernorm"]},
    "gaussian": {"target_modules": QV, "init_lora_weights": "gaussian"},
    "orthogonal": {"target_modules": QV, "init_lora_weights": "orthogonal"},
    "mica": {"target_modules": QV, "init_lora_weights": "mica"},
    "eva": {"target_modules": QV, "init_lora_weights": "eva", "eva_config": peft.EvaConfig()},
    "random": {"target_modules": QV, "init_lora_weights": False},
    "pissa": {"target_modules": QV, "init_lora_weights": "pissa"},
    "pissa_rslora": {"target_modules": "all-linear", "init_lora_weights": "pissa", "use_rslora": True},
    "pissa_ranks": {
        "target_modules": QV, "init_lora_weights": "pissa", "rank_pattern": {"v_proj": 2}, "layers_to_transform": [0, 1],
    },
    "olora": {"target_modules": ["k_proj", "down_proj"], "init_lora_weights": "olora"},
    "olora_alpha": {"target_modules": QV, "init_lora_weights": "OLoRA", "alpha_pattern": {"v_proj": 2}},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:lora with eva initialization")
@pytest.mark.parametrize("kind", KINDS)
def test_equals_peft(base, model, ours, tmp_path, kind):
    """Loaded here and by peft the same logits; written again as a plain adapter, peft still says so."""
    peft_adapter(base, tmp_path / "a", r=4, lora_alpha=8, **KINDS[kind])
    theirs = reloaded(base, tmp_path / "a")
    adapter = lora.load(tmp_path / "a", model, frozen=True)
    assert_same(ours(adapter), theirs)
    assert np.abs(theirs - ours()).max() > 1e-2
    save_adapter(adapter, tmp_path / "b", str(base))
    assert_same(reloaded(base, tmp_path / "b"), theirs)


def test_the_form_that_foreign_adapters_take(base, model, tmp_path):
    """Equal ranks in some layers or all stay as they are, and can be trained; zeros fill what is uneven, for a frozen adapter only."""
    for kind, rank, even in (
        ("regex_every_layer", 4, True), ("alpha_only", 4, True), ("pissa", 8, True), ("save_head", 4, True),
        ("layers", 4, True), ("layers_pattern", 4, True), ("exclude_names", 4, False), ("rank_and_alpha", 4, False),
        ("rank_by_layer", 6, False), ("pissa_ranks", 8, False),
    ):  # fmt: skip
        folder = tmp_path / kind
        peft_adapter(base, folder, r=4, lora_alpha=8, **KINDS[kind])
        adapter = lora.load(folder, model, frozen=True)
        assert adapter.rank == rank
        empty = sum(int((~np.any(x, axis=(1, 2))).sum()) for x in jax.tree.leaves(adapter))
        assert (empty > 0) == (kind == "exclude_names")
        if even:
            lora.load(folder, model)
        else:
            with pytest.raises(InputError, match="layers or ranks differ .*`panacea convert`"):
                lora.load(folder, model)


def test_without_weights_only_shapes_are_known(base, model, tmp_path):
    """What `doctor` counts bytes of: nobody can compute with it by mistake."""
    peft_adapter(base, tmp_path / "a", r=4, lora_alpha=8, **KINDS["pissa"])
    shapes = lora.load(tmp_path / "a", dataclasses.replace(model, weights=None))
    for x, y in zip(jax.tree.leaves(shapes), jax.tree.leaves(lora.load(tmp_path / "a", model))):
        assert x.shape == y.shape and np.isnan(x).any() and not np.isnan(y).any()


def test_adapters_without_patterns_are_loaded_bit_for_bit(base, model, tmp_path):
    peft_adapter(base, tmp_path / "a", r=4, lora_alpha=8, target_modules=QV, use_rslora=True)
    adapter = lora.load(tmp_path / "a", model)
    assert (adapter.rank, adapter.alpha, adapter.rslora, adapter.scale) == (4, 8.0, True, 4.0)
    theirs = load_file(tmp_path / "a" / WEIGHTS_FILE)
    again = adapter_tensors(adapter)
    assert again.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(again[name], tensor)


def test_fewer_bits(base, model, ours, tmp_path):
    """bfloat16 factors, as in case 07: what peft makes of them, which widens them too."""
    peft_adapter(base, tmp_path / "a", r=4, lora_alpha=16, target_modules="all-linear")
    path = tmp_path / "a" / WEIGHTS_FILE
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    halves = {name: x.to(torch.bfloat16) for name, x in load_torch(path).items()}
    save_torch(halves, path, {"format": "pt"})
    adapter = lora.load(tmp_path / "a", model)
    assert_same(ours(adapter), reloaded(base, tmp_path / "a"))


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights")
def test_pissa_made_plain_by_peft(base, model, ours, tmp_path):
    """peft's own way to a plain adapter, of the same rank and scale."""
    torch.manual_seed(1)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=QV, init_lora_weights="pissa"
    )
    adapted = peft.get_peft_model(torch_model(base), config)
    adapted.peft_config[
        "default"
    ].init_lora_weights = True  # or it would be taken for a start of its own
    adapted.save_pretrained(str(tmp_path / "start"))
    adapted.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    live = logits(adapted)
    adapted.save_pretrained(str(tmp_path / "pissa"))
    adapted.save_pretrained(
        str(tmp_path / "plain"), path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    for name in ("pissa", "plain"):
        adapter = lora.load(tmp_path / name, model)
        assert (adapter.rank, adapter.scale) == (8, 2.0)
        assert_same(ours(adapter), live)


def test_a_quantised_base_cannot_lose_a_part(base, tmp_path):
    peft_adapter(base, tmp_path / "a", r=4, lora_alpha=8, **KINDS["pissa"])
    few_bits = load(base, dtype="float32", quantization="int8")
    with pytest.raises(InputError, match="init_lora_weights=pissa needs whole weights"):
        lora.load(tmp_path / "a", few_bits)
    peft_adapter(base, tmp_path / "b", r=4, lora_alpha=8, **KINDS["save_embedding"])
    lora.load(tmp_path / "b", few_bits)


def test_copies_that_are_not_the_base_s_are_refused(base, model, tmp_path):
    peft_adapter(base, tmp_path / "a", r=4, lora_alpha=8, **KINDS["save_head"])
    path = tmp_path / "a" / WEIGHTS_FILE
    name = "base_model.model.lm_head.weight"
    good = load_file(path)
    save_file({**good, "base_model.model.model.layers.9.input_layernorm.weight": good[name][0]}, path)  # fmt: skip
    with pytest.raises(InputError, match="layers.9.input_layernorm.weight is not a LoRA factor"):
        lora.load(tmp_path / "a", model)
    for wrong in (good[name] + 1e-3, good[name][:-1].copy()):
        save_file({**good, name: wrong}, path)
        with pytest.raises(InputError, match=f"{name} is not the base's: .*modules_to_save"):
            lora.load(tmp_path / "a", model)


def test_tied_heads(tmp_path):
    """The head of a tied base is its embedding."""
    tied = save(build("qwen2_tied"), tmp_path / "tied")
    settings = {"target_modules": QV, "modules_to_save": ["lm_head"], "ensure_weight_tying": True}
    peft_adapter(tied, tmp_path / "a", r=4, lora_alpha=8, **settings)
    model = load(tied, dtype="float32")
    lora.load(tmp_path / "a", model)
    path = tmp_path / "a" / WEIGHTS_FILE
    tensors = load_file(path)
    assert "base_model.model.lm_head.weight" in tensors
    save_file({n: x + 1e-3 if "lm_head" in n else x for n, x in tensors.items()}, path)
    with pytest.raises(InputError, match="lm_head.weight is not the base's"):
        lora.load(tmp_path / "a", model)


def test_factors_that_the_configuration_does_not_ask_for(base, model, tmp_path):
    """peft would leave them out; a file that says two things is refused."""
    peft_adapter(base, tmp_path / "a", r=4, lora_alpha=8, target_modules=QV)
    path = tmp_path / "a" / CONFIG_FILE
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"target_modules": ["q_proj"]}))
    with pytest.raises(InputError, match=r"v_proj.*does not adapt that module"):
        lora.load(tmp_path / "a", model)
    path.write_text(json.dumps(config | {"target_modules": [*QV, "k_proj"]}))
    with pytest.raises(InputError, match=r"k_proj\.lora_A is missing"):
        lora.load(tmp_path / "a", model)
