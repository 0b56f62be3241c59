"""Adapters that peft made in less usual ways, through the commands, against what peft makes of the same folders."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import runs, torch_oracle

QV = ["q_proj", "v_proj"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return runs.make_place(tmp_path_factory.mktemp("foreign"))


def bare(place):
    return torch_oracle.load_full(place.base, torch.float32)


def trained_by_peft(place, folder, **settings):
    """A few steps of PyTorch from where peft starts."""
    torch.manual_seed(9)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **settings)
    model = peft.get_peft_model(bare(place), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    for _ in range(5):
        tokens = torch.randint(3, 40, (4, 12))
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(str(folder))


def nll_by_peft(place, folder):
    model = peft.PeftModel.from_pretrained(bare(place), str(folder)).eval()
    return nll(place, model)


def nll(place, model):
    total, tokens = torch_oracle.answers_loss(model, place.base, place.root / "test.jsonl")
    return total / tokens


def nll_by_us(place, workdir, *more):
    flags = place.flags(f"--config.eval.tasks=('{place.spec('test')}',)", *more)
    assert runs.panacea("perplexity", *flags, f"--workdir={workdir}") == 0
    return json.loads((workdir / "perplexity.json").read_text())["sets"]["pairs"]["nll"]


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_base_that_lost_a_part_through_every_command(place, tmp_path, init):
    folder = tmp_path / "adapter"
    trained_by_peft(place, folder, target_modules=QV, init_lora_weights=init)
    right = nll_by_peft(place, folder)
    assert abs(right - nll(place, bare(place))) > 0.01

    # ---- perplexity, merged
    found = nll_by_us(place, tmp_path / "p", f"--config.generate.adapter={folder}")
    assert found == pytest.approx(right, rel=1e-5)
    adapter = f"--config.lora.init_from={folder}"
    assert runs.panacea("convert", *place.flags(adapter), f"--out={tmp_path / 'merged'}") == 0
    from transformers import AutoModelForCausalLM

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert nll(place, merged) == pytest.approx(right, rel=1e-5)
    if init == "olora":
        return

    # ---- training starts there, and leaves a plain adapter
    for rate, moved in (("0.0", False), ("1e-2", True)):
        flags = place.flags(adapter, "--config.defence.name=sft", f"--config.optimizer.learning_rate={rate}")  # fmt: skip
        workdir = tmp_path / rate
        assert runs.panacea("finetune", *flags, f"--workdir={workdir}") == 0
        out = workdir / "finetune" / "adapter"
        config = json.loads((out / "adapter_config.json").read_text())
        assert (config["r"], config["init_lora_weights"]) == (8, True)
        theirs = nll_by_peft(place, out)
        assert (abs(theirs - right) > 1e-2) == moved
        if moved:
            found = nll_by_us(place, workdir, adapter)
            assert found == pytest.approx(theirs, rel=1e-5)
        else:
            assert theirs == pytest.approx(right, rel=1e-5)


def as_bfloat16(folder):
    path = folder / "adapter_model.safetensors"
    halves = {name: x.to(torch.bfloat16) for name, x in load_file(path).items()}
    save_file(halves, path, {"format": "pt"})


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True, "target_modules": "all-linear"},
        {"target_modules": r".*layers\.1\.self_attn\.(q|v)_proj"},
        {"target_modules": QV, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 16}},
    ],
    ids=["bf16", "regex", "ranks"],
)
def test_perplexity_equals_peft(place, tmp_path, settings):
    """Case 07."""
    folder = tmp_path / "adapter"
    trained_by_peft(place, folder, **settings)
    if settings.get("use_rslora"):
        as_bfloat16(folder)
    found = nll_by_us(place, tmp_path / "p", f"--config.generate.adapter={folder}")
    assert found == pytest.approx(nll_by_peft(place, folder), rel=1e-5)


def test_a_trained_head_is_refused(place, tmp_path, capsys):
    folder = tmp_path / "adapter"
    trained_by_peft(place, folder, target_modules=QV, modules_to_save=["lm_head"])
    flags = place.flags(f"--config.generate.adapter={folder}", f"--workdir={tmp_path / 'w'}")
    assert runs.panacea("perplexity", *flags) == 2
    assert "lm_head.weight is not the base's" in capsys.readouterr().err


def test_uneven_adapters_are_merged_before_training(place, tmp_path, capsys):
    folder = tmp_path / "adapter"
    trained_by_peft(place, folder, target_modules=r".*(layers\.1\.self_attn\.q|layers\.\d\.self_attn\.v)_proj")
    flags = place.flags(f"--config.lora.init_from={folder}", "--config.optimizer.learning_rate=0.0")
    assert runs.panacea("finetune", *flags, f"--workdir={tmp_path / 'w'}") == 2
    assert "layers or ranks differ" in capsys.readouterr().err
    merged = ("--config.lora.policy=merged", "--config.defence.name=sft")
    flags = place.flags(f"--config.lora.init_from={folder}", "--config.optimizer.learning_rate=0.0", *merged)  # fmt: skip
    assert runs.panacea("finetune", *flags, f"--workdir={tmp_path / 'm'}") == 0
    found = nll_by_us(place, tmp_path / "m")
    assert found == pytest.approx(nll_by_peft(place, folder), rel=1e-5)


def test_an_adapter_of_some_layers_is_gone_on_from(place, tmp_path):
    """Trained further here, then read by peft; nothing beside its layers is adapted."""
    folder = tmp_path / "adapter"
    trained_by_peft(place, folder, target_modules=QV, layers_to_transform=[1])
    flags = place.flags(f"--config.lora.init_from={folder}", "--config.defence.name=sft")
    assert runs.panacea("finetune", *flags, f"--workdir={tmp_path / 'w'}") == 0
    out = tmp_path / "w" / "finetune" / "adapter"
    assert json.loads((out / "adapter_config.json").read_text())["layers_to_transform"] == [1]
    found = nll_by_us(place, tmp_path / "w")
    assert found == pytest.approx(nll_by_peft(place, out), rel=1e-5)
    assert abs(found - nll_by_peft(place, folder)) > 1e-3


def test_rslora_of_our_own(place, tmp_path):
    """A fresh adapter scaled by α/√r: written so, and peft reads it so."""
    flags = place.flags("--config.defence.name=sft", "--config.lora.rslora=True", "--config.lora.rank=4")  # fmt: skip
    assert runs.panacea("finetune", *flags, f"--workdir={tmp_path}") == 0
    out = tmp_path / "finetune" / "adapter"
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["use_rslora"], config["lora_alpha"], config["r"]) == (True, 4, 4)
    found = nll_by_us(place, tmp_path)
    assert found == pytest.approx(nll_by_peft(place, out), rel=1e-5)
    assert abs(found - nll(place, bare(place))) > 1e-2
