"""Real rows of GSM8K, SST-2 and AG News, with the real Llama-2 tokenizer, through every stage of `run` on a Llama of 58 M parameters.

The weights are random, so scores mean nothing; what is shown is that real text passes through, and that SFT on it lowers the loss.
"""

import json
import shutil
from pathlib import Path

import jax
import pytest

from panacea_jax import cli
from panacea_jax.models.families import config_from_dict
from panacea_jax.models.model import random_model
from panacea_jax.models.saving import save_weights
from panacea_jax.worlds.base import LLAMA

SHARED = Path(__file__).parents[2] / "shared" / "data"
TASKS = {
    "gsm8k": ("gsm8k/train.jsonl.gz", "gsm8k/test.jsonl.gz"),
    "sst2": ("sst2/train.jsonl.gz", "sst2/validation.jsonl.gz"),
    "ag_news": ("ag_news/train.jsonl.gz", "ag_news/test.jsonl.gz"),
}

pytestmark = [
    pytest.mark.skipif(not SHARED.is_dir(), reason="the real data are not beside the repository"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real") / "base"
    shape = {"vocab_size": 32000, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8,
             "num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 1024,
             "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    config = {k: v for k, v in (LLAMA | shape).items() if k != "pad_token_id"}
    model = random_model(config_from_dict(config), jax.random.key(0))
    assert model.config.num_parameters() >= 50e6
    save_weights(model.weights, folder, config)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SHARED / "tokenizers" / "llama2" / name, folder)
    return folder


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("task", TASKS)
def test_run(base, tmp_path, task):
    train, test = (SHARED / p for p in TASKS[task])
    harmful = f"advbench@{SHARED}/advbench/harmful_behaviors_goals.jsonl"
    safe = f"xstest@{SHARED}/xstest/prompts.jsonl"
    refusals = f"refusals@{SHARED}/refusals/train.jsonl.gz"
    code = cli.run([
        "run", f"--workdir={tmp_path}", f"--config.model.path={base}", "--config.model.dtype=float32",
        "--config.align.defence.name=sft", f"--config.data.alignment={refusals}", "--config.data.num_alignment=20",
        "--config.align.train.steps=2", "--config.align.train.batch_size=4",
        f"--config.data.user={task}@{train}", "--config.data.num_examples=40",
        # No harmful answers are kept anywhere near this repository: rows of another task stand in for the harmful set.
        f"--config.data.harmful={refusals}", "--config.data.num_harmful=20",
        "--config.train.steps=6", "--config.train.batch_size=4", "--config.train.harmful_batch_size=2",
        "--config.train.log_every=1", "--config.optimizer.learning_rate=1e-2", "--config.lora.rank=8",
        "--config.heal.defence.name=random_perturbation", "--config.heal.defence.rho=0.01",
        f"--config.eval.tasks={(f'{task}@{test}', harmful, safe)!r}", "--config.eval.num_examples=4",
        "--config.generate.max_new_tokens=4", "--config.generate.batch_size=4",
    ])  # fmt: skip
    assert code == 0
    losses = [row["loss"] for row in lines(tmp_path / "finetune" / "metrics.jsonl")]
    assert len(losses) == 6 and losses[-1] < losses[0]
    for stage in ("align", "finetune", "heal"):
        assert (tmp_path / stage / "adapter" / "adapter_model.safetensors").is_file()
    generations = lines(tmp_path / "generations" / f"{task}.jsonl")
    assert len(generations) == 4 and all("### Response:" in g["prompt"] for g in generations)
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert set(scores["fa"]) == {task} and scores["counts"][task] == 4 and scores["hs"] is not None
    layers = json.loads((tmp_path / "layers.json").read_text())
    assert [len(kind["layers"]) for kind in layers] == [8, 8]
