"""Training steps on real rows: ours beside PyTorch's on this CPU, the same records in the same run, in turns.

    python benchmarks/torch_reference.py --model=FOLDER --user=gsm8k@train.jsonl --harmful=pairs@harmful.jsonl --template=alpaca

Two peers, of transformers and peft, both written here. ``reference``: what a research script does: float32, each batch padded to its
longest row, AdamW. ``tuned``: the fastest of float32 and bfloat16 autocast, as it is and by torch.compile, tried on the first batches,
with fused AdamW. Before anything is timed, ours and theirs must have the same loss on the first batch. They have the cores one after the
other; ``GLIBC_TUNABLES`` as `panacea` sets it for itself (docs/memory.md) holds for both, or with ``--plain_pages`` for neither.

Methods: SFT; Panacea (three passes); Vaccine (two, with ρ g/‖g‖ added to what each attention puts out); T-Vaccine (the same for some
layers, and only those are trained; ours draws others each time).
"""

import argparse
import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from panacea_jax.cli.huge_pages import TUNABLES, in_huge_pages
from panacea_jax.data.batches import Batch, Stream, length_buckets
from panacea_jax.data.encode import encode
from panacea_jax.data.sources import load_records
from panacea_jax.data.template import Template
from panacea_jax.data.tokenizer import load_tokenizer
from panacea_jax.defences import Panacea, Sft, TVaccine, Vaccine
from panacea_jax.models import lora
from panacea_jax.models.model import Model, load
from panacea_jax.train.optimizer import make_optimizer
from panacea_jax.train.step import init_state, make_step

TARGETS = ("q", "k", "v")
RATE, DECAY, CLIP = 2e-5, 0.1, 1.0
ACTIVE = 8  # layers of T-Vaccine
OURS: dict[str, Callable[[int], Any]] = {
    "sft": lambda layers: Sft(), "panacea": lambda layers: Panacea(rho=1.0, lam=1e-3), "vaccine": lambda layers: Vaccine(rho=3.0),
    "t_vaccine": lambda layers: TVaccine(rho=3.0, layers=min(ACTIVE, layers)),
}  # fmt: skip
Batches = Sequence[dict[str, Batch]]


def read_batches(args: argparse.Namespace) -> Batches:
    """The first steps' batches of both streams, as training makes them."""
    template = Template(args.template, load_tokenizer(args.tokenizer or args.model))
    streams = {}
    for name in ("user", "harmful"):
        records = load_records(getattr(args, name), f"--{name}")
        examples = [encode(record, template, args.length) for record in records[: args.steps * args.batch]]
        streams[name] = Stream(name, examples, args.batch, 0, True, length_buckets(args.length), fixed_length=name != "user")
    return [{name: stream.batch(step) for name, stream in streams.items()} for step in range(args.steps)]


# ---- ours


def ours(model: Model, name: str, batches: Batches, args: argparse.Namespace, losses: list[Any]) -> Callable[[], float]:
    """Seconds of going once through the batches; the first time they are compiled. Each step's loss is added to ``losses``."""
    defence = OURS[name](model.config.num_layers)
    params = lora.init(model, args.rank, args.rank, TARGETS, key=jax.random.key(1))
    optimizer = make_optimizer(RATE, weight_decay=DECAY, clip_norm=CLIP, partial=name == "t_vaccine")
    state = init_state(params, defence, optimizer)
    step = make_step(model, defence, optimizer, jax.tree.map(lambda x: x.sharding, state))
    given = [{"user": b["user"], **{n: b[n] for n in defence.streams}} for b in batches]
    held = [state]

    def once() -> float:
        start = time.perf_counter()
        for number, batch in enumerate(given):
            held[0], metrics = step(held[0], model.weights, jax.device_put(batch), jax.random.key(number))
            losses.append(metrics["loss"])
        jax.block_until_ready(losses)
        return time.perf_counter() - start

    return once


# ---- theirs


class Peer:
    """SFT, Panacea, Vaccine and T-Vaccine in PyTorch."""

    def __init__(self, folder: str, rank: int, autocast: bool = False, compiled: bool = False, fused: bool = False) -> None:
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        targets = [f"{t}_proj" for t in TARGETS]
        self.model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))
        self.layers = base.model.layers
        self.torch, self.autocast = torch, autocast
        self.call = torch.compile(self.model, dynamic=True) if compiled else self.model
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.params, lr=RATE, weight_decay=DECAY, fused=fused)

    def loss(self, batch: Batch, hooked: bool = False) -> Any:
        """Mean over the tokens that are to be predicted, of rows cut to the longest of them.

        Args:
            batch: ours.
            hooked: what attention puts out is looked at, which a compiled model would not call for.
        """
        torch, width = self.torch, int(batch.valid.sum(1).max())
        tokens, valid, wanted = (torch.from_numpy(np.array(x[:, :width])) for x in (batch.tokens, batch.valid, batch.loss_mask))
        labels = torch.where(wanted, tokens, -100).long()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            return (self.model if hooked else self.call)(input_ids=tokens.long(), attention_mask=valid.long(), labels=labels).loss

    def gradient(self, batch: Batch, among: Sequence[Any] | None = None) -> list[Any]:
        """By the parameters ``among``, by default all that are trained."""
        return list(self.torch.autograd.grad(self.loss(batch), among or self.params))

    def step(self, name: str, batches: dict[str, Batch]) -> None:
        """One step of a method."""
        params, user = self.params, batches["user"]
        if name == "panacea":
            grads = self._panacea(batches)
        elif name == "sft":
            grads = self.gradient(user)
        else:
            active = self.layers if name == "vaccine" else self.layers[:: max(1, len(self.layers) // ACTIVE)][:ACTIVE]
            params = [p for layer in active for p in layer.parameters() if p.requires_grad]
            grads = self._vaccine(user, active, params)
        for p in self.params:
            p.grad = None
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        self.torch.nn.utils.clip_grad_norm_(params, CLIP)
        self.optimizer.step()

    def _panacea(self, batches: dict[str, Batch]) -> list[Any]:
        g, h = self.gradient(batches["user"]), self.gradient(batches["harmful"])
        scale = 1.0 / (self._norm(h) + 1e-7)
        with self._moved(h, scale):
            there = self.gradient(batches["harmful"])
        return [a - 1e-3 * (c - b) for a, b, c in zip(g, h, there)]

    def _vaccine(self, batch: Batch, active: Sequence[Any], params: Sequence[Any]) -> list[Any]:
        seen: list[Any] = []
        with self._hooked(active, lambda n, out: seen.append(out.retain_grad() or out) or out):
            self.loss(batch, hooked=True).backward()
        found = [x.grad for x in seen]
        scale = 3.0 / (self._norm(found) + 1e-7)
        with self._hooked(active, lambda n, out: out + scale * found[n]):
            return list(self.torch.autograd.grad(self.loss(batch, hooked=True), params))

    @contextlib.contextmanager
    def _hooked(self, active: Sequence[Any], act: Callable[[int, Any], Any]) -> Iterator[None]:
        """With what each active layer's attention puts out handed through ``act``."""
        hooks = [
            layer.self_attn.register_forward_hook(lambda _, __, out, n=n: (act(n, out[0]), *out[1:])) for n, layer in enumerate(active)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextlib.contextmanager
    def _moved(self, direction: Sequence[Any], scale: Any) -> Iterator[None]:
        with self.torch.no_grad():
            self.torch._foreach_add_(self.params, [scale * x for x in direction])
        try:
            yield
        finally:
            with self.torch.no_grad():
                self.torch._foreach_sub_(self.params, [scale * x for x in direction])

    def _norm(self, tensors: Sequence[Any]) -> Any:
        return self.torch.sqrt(sum((x**2).sum() for x in tensors))

    def seconds(self, name: str, batches: Batches) -> float:
        """Of going once through the batches."""
        start = time.perf_counter()
        for batch in batches:
            self.step(name, batch)
        return time.perf_counter() - start


def tuned(args: argparse.Namespace, batches: Batches) -> tuple[Peer, str]:
    """The fastest of four ways at SFT's first two batches, and what it is."""
    best: tuple[float, Peer | None, str] = (float("inf"), None, "")
    for autocast in (False, True):
        for compiled in (False, True):
            name = f"{'bfloat16 autocast' if autocast else 'float32'}{', torch.compile' * compiled}, fused AdamW"
            try:
                peer = Peer(args.model, args.rank, autocast, compiled, fused=True)
                peer.seconds("sft", batches[:2])
                taken = peer.seconds("sft", batches[:2])
            except Exception as error:  # whatever torch.compile meets on this machine
                print(f"tuned, {name}: {type(error).__name__}", flush=True)
                continue
            print(f"tuned, {name}: {taken / 2:.2f} s an SFT step", flush=True)
            if taken < best[0]:
                best = (taken, peer, name)
    assert best[1] is not None
    return best[1], best[2]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face folder")
    parser.add_argument("--tokenizer", default="", help="folder; by default the model's")
    parser.add_argument("--user", required=True, help="TASK@FILE")
    parser.add_argument("--harmful", required=True, help="TASK@FILE")
    parser.add_argument("--template", default="alpaca")
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--steps", type=int, default=4, help="batches of a turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--methods", nargs="*", default=list(OURS))
    parser.add_argument("--plain_pages", action="store_true")
    args = parser.parse_args()
    if args.plain_pages:
        os.environ.setdefault("GLIBC_TUNABLES", "")
    in_huge_pages()
    import torch

    batches = read_batches(args)
    model = load(Path(args.model), dtype="float32")
    reference = Peer(args.model, args.rank)
    fast, how = tuned(args, batches)
    theirs = float(reference.loss(batches[0]["user"]))
    pages = "2 MiB" if os.environ.get("GLIBC_TUNABLES") == TUNABLES else "as they are"
    print(f"jax {jax.__version__}, torch {torch.__version__}, {os.cpu_count()} cores, pages {pages}; tuned: {how}; "
          f"{args.steps} batches of {args.batch}, {[b['user'].tokens.shape[1] for b in batches]} tokens")  # fmt: skip
    for name in args.methods:
        losses: list[Any] = []
        mine = ours(model, name, batches, args, losses)
        compiling = mine()
        if name != "t_vaccine" and abs(float(losses[0]) - theirs) > 1e-3 * theirs:
            raise RuntimeError(f"{name}: the first losses differ, {float(losses[0])} and PyTorch's {theirs}")
        times: dict[str, list[float]] = {"ours": [], "reference": [], "tuned": []}
        for _ in range(args.turns):
            times["ours"].append(mine())
            times["reference"].append(reference.seconds(name, batches))
            times["tuned"].append(fast.seconds(name, batches))
        each = {side: statistics.median(found) / args.steps for side, found in times.items()}
        ratios = ", ".join(f"{each['ours'] / each[side]:.2f} × {side}" for side in ("reference", "tuned"))
        told = ", ".join(f"{side} {seconds:.2f} s" for side, seconds in each.items())
        print(f"{name}: {told} a step; ours is {ratios} (compiled in {compiling - each['ours'] * args.steps:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
