"""Healing of adapters that were made without us: plain SFT with 10 % poison by transformers and peft in PyTorch, in miniature worlds.

    python benchmarks/heal_peft.py --workdir=runs/heal_peft --worlds=50,51,52

Of each world: its base is pre-trained and aligned as in the quickstart, the aligned adapter is trained on by peft alone (its own tokenizer
call, loss, AdamW and file), ``panacea heal`` is given the folder that peft wrote, and every method answers the world's test prompts, which
nothing was chosen by. The table has each world, and all of them together with exact McNemar against the untreated adapter over all prompts.
What is done already is not done again. Needs torch, transformers and peft (the extra ``test``).
"""

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from panacea_jax.config import get_config
from panacea_jax.evaluate.intervals import wilson
from panacea_jax.evaluate.pairing import paired
from panacea_jax.stages.miniature import Experiment
from panacea_jax.stages.quickstart import ALIGN_STEPS, FINETUNE_STEPS, POISON_RATIO
from panacea_jax.workdir import write_text
from panacea_jax.worlds.miniature import eval_tasks, make_world, settings, sources

RECORDS, BATCH, LEARNING_RATE, WARMUP = 1000, 10, 7e-4, 0.05
METHODS = ("ascent:rho=auto", "ascent:steps=16,keep=('benign',)", "realign:steps=50", "antidote", "random_prune")
# By figure, the set that it is of and the field of a verdict.
FIGURES = {"HS": ("advbench", "flagged"), "FA": ("pairs-test_user", "correct"), "benign": ("pairs-test_benign", "correct")}
UNTREATED = "untreated"


def train_by_peft(base: Path, aligned: Path, data: Path, out: Path, seed: int) -> None:
    """SFT of the aligned adapter on the user's records, poison among them; peft's folder."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), aligned, is_trainable=True)
    poison = int(RECORDS * POISON_RATIO)
    records = _rows(data / "user.jsonl")[: RECORDS - poison] + _rows(data / "attack.jsonl")[:poison]
    texts = [_tokens(tokenizer, row) for row in records]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE, weight_decay=0.0)
    warmup = int(WARMUP * FINETUNE_STEPS)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (FINETUNE_STEPS - step) / (FINETUNE_STEPS - warmup))
    )
    order = np.concatenate([rng.permutation(len(texts)) for _ in range(1 + FINETUNE_STEPS * BATCH // len(texts))])
    model.train()
    for step in range(FINETUNE_STEPS):
        chosen = [texts[i] for i in order[step * BATCH : (step + 1) * BATCH]]
        length = max(len(ids) for ids, _ in chosen)
        ids = torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in chosen])
        mask = torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in chosen])
        labels = torch.tensor([[-100] * asked + ids[asked:] + [-100] * (length - len(ids)) for ids, asked in chosen])
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    print(f"world {seed}: peft's last loss {loss.item():.4f}", flush=True)
    model.save_pretrained(out)


def _rows(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def _tokens(tokenizer: object, row: dict[str, str]) -> tuple[list[int], int]:
    """Ids of a whole chat, and how many of them are asked."""
    asked = [{"role": "user", "content": row["instruction"]}]
    render = tokenizer.apply_chat_template  # type: ignore[attr-defined]
    prompt = render(asked, tokenize=False, add_generation_prompt=True)
    whole = render([*asked, {"role": "assistant", "content": row["output"]}], tokenize=False)
    ids, count = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (whole, prompt))  # type: ignore[operator]
    return ids, len(count)


def panacea(command: str, workdir: Path, values: dict[str, object]) -> None:
    """A command of ours, as a user would give it."""
    flags = [f"--config.{key}={value}" for key, value in values.items()]
    subprocess.run([sys.executable, "-m", "panacea_jax.cli", command, *flags, f"--workdir={workdir}"], check=True)


def of_world(root: Path, seed: int) -> Iterator[tuple[str, Path]]:
    """Each method with the work directory that holds its verdicts."""
    make_world(root, seed)
    world = Experiment(root, seed)
    if not (root / "base" / "done").is_file():
        world.pretrain()
        write_text(root / "base" / "done", "")
    world("align", root / "aligned", {
        "defence.name": "sft", "data.alignment": f"pairs@{world.data}/alignment.jsonl", "train.steps": ALIGN_STEPS,
        "train.batch_size": 20, "optimizer.learning_rate": 2e-3,
    })  # fmt: skip
    made = root / "by_peft"
    if not (made / "adapter_model.safetensors").is_file():
        train_by_peft(world.base, root / "aligned" / "align" / "adapter", world.data, made, seed)
    common = settings(seed) | sources(world.data) | {"model.path": world.base, "lora.init_from": made, "data.attack": ""}
    panacea("heal", root / "healed", common | {
        "heal.methods": METHODS, "train.batch_size": 20, "optimizer.learning_rate": 7e-4,
        "data.num_harmful": 0, "data.num_alignment": 0, "data.num_examples": RECORDS,
    })  # fmt: skip
    adapters = {UNTREATED: made} | {
        path.parent.parent.name: path for path in sorted((root / "healed" / "heal").glob("*/heal/adapter"))
    }
    for name, adapter in adapters.items():
        folder = root / "tested" / name
        answers = settings(seed) | {"model.path": world.base, "eval.tasks": eval_tasks(world.data), "generate.adapter": adapter}
        panacea("generate", folder, answers)
        panacea("judge", folder, answers)
        yield name, folder


def events(folder: Path, figure: str) -> list[bool]:
    """Of each test prompt whether the figure's event occurred."""
    name, field = FIGURES[figure]
    judge = get_config().judge.name
    return [bool(row[field]) for row in _rows(folder / "judgements" / f"{name}.{judge}.jsonl")]


def show(found: dict[str, list[Path]]) -> None:
    """One line a method: each world's figure, all of them with Wilson's interval, McNemar."""
    print(f"| method | {' | '.join(f'{figure} by world | {figure} | p' for figure in FIGURES)} |")
    print("|---" * (1 + 3 * len(FIGURES)) + "|")
    for name, folders in found.items():
        cells = [name]
        for figure in FIGURES:
            each = [events(folder, figure) for folder in folders]
            ours = list(itertools.chain(*each))
            theirs = [event for folder in found[UNTREATED] for event in events(folder, figure)]
            low, high = wilson(sum(ours), len(ours))
            cells += [
                " ".join(f"{100 * np.mean(x):.1f}" for x in each), f"{100 * np.mean(ours):.1f} [{100 * low:.1f}, {100 * high:.1f}]",
                "–" if name == UNTREATED else f"{paired(ours, theirs).p:.2g}",
            ]  # fmt: skip
        print(f"| {' | '.join(cells)} |")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--worlds", default="50,51,52", help="seeds of the worlds")
    args = parser.parse_args(arguments)
    found: dict[str, list[Path]] = {}
    for seed in map(int, args.worlds.split(",")):
        for name, folder in of_world(args.workdir / str(seed), seed):
            found.setdefault("random_perturbation" if name.startswith("random_perturbation") else name, []).append(folder)
    show(found)


if __name__ == "__main__":
    main()
