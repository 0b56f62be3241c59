"""The command ``perplexity``: how surprised the model is by a test set's own answers.

A figure without a judge and without decoding: a defence that ruins the model shows here even where
its answers still pass for refusals or labels.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from panacea_jax.data.batches import Stream, length_buckets
from panacea_jax.data.encode import Example, encode_all
from panacea_jax.data.sources import fingerprint, parse_source
from panacea_jax.data.template import template_id
from panacea_jax.data.tokenizer import load_tokenizer
from panacea_jax.defences import Loss
from panacea_jax.errors import InputError
from panacea_jax.evaluate.tasks import find_task, set_names
from panacea_jax.models import lora
from panacea_jax.models.model import Model
from panacea_jax.parallel import batch_sharding, processes
from panacea_jax.parallel.sharding import batch_rows
from panacea_jax.progress import Progress, say
from panacea_jax.stages import lineage
from panacea_jax.stages.generate import adapter_sha256, eval_records
from panacea_jax.stages.lineage import Start
from panacea_jax.workdir import StageFolder, write_json

_KEY = "config.eval.tasks"

# exp of more does not fit a float; such a perplexity, and NaN, are null in the file.
LARGEST = 700.0

_summed = jax.jit(Loss.summed)


def has_answers(spec: str) -> bool:
    """Whether a set's records hold an answer that a good model gives: not those of harmful prompts,
    and XSTest has none."""
    return find_task(parse_source(spec).task).role in ("accuracy", "generation")


def sum_nll(
    model: Model, params: Any, examples: Sequence[Example], batch_size: int, title: str
) -> tuple[float, int]:
    """Negative log-likelihood in nats, summed over all response tokens (EOS included), and their
    number.

    Args:
        model: base.
        params: adapter, complete weights, or None.
        examples: tokenised as for training.
        batch_size: rows a batch, rounded up to what the mesh divides.
        title: of the progress bar.
    """
    by_length = sorted(examples, key=lambda example: len(example.tokens))  # little padding
    stream = Stream(
        name="perplexity", examples=by_length, batch_size=batch_size, seed=0, shuffle=False,
        buckets=length_buckets(len(by_length[-1].tokens)), row_multiple=batch_rows(model.mesh),
    )  # fmt: skip
    loss, total, tokens = Loss.of(model), 0.0, 0
    with Progress(title, stream.steps_per_epoch) as bar:
        for batch in stream.once():
            placed = jax.device_put(batch, batch_sharding(model.mesh))
            found, count = jax.device_get(_summed(loss, params, placed))
            total, tokens = total + float(found), tokens + int(count)
            bar.advance()
    return total, tokens


def perplexity_stage(config: ConfigDict, workdir: Path, start: Start | None = None) -> Path:
    """Write ``WORKDIR/perplexity.json`` for the sets of ``config.eval.tasks`` that have answers.

    By set: "perplexity" = exp("nll"), the mean negative log-likelihood in nats per response token
    given the prompt; "tokens" that it is the mean of; "records"; and how many of these were "cut" at
    ``config.data.max_length``. Rendering, masking and cutting are those of training, the weights
    those that ``generate`` decodes with.

    Raises:
        InputError: no set has answers, or anything about model, adapter, sources or work directory.
    """
    # ---- what is asked for
    specs = list(config.eval.tasks)
    names = dict(zip(specs, set_names(specs)))
    chosen = [spec for spec in specs if has_answers(spec)]
    if not chosen:
        raise InputError(f"{_KEY}: no set with answers to take the perplexity of: {specs}")
    start = start or lineage.to_answer(config, workdir)
    inputs = start.inputs() | {spec: fingerprint(spec, _KEY) for spec in chosen}
    decisive = {
        "model": {"path": start.base, "dtype": config.model.dtype},
        "adapter": start.adapter,
        "template": config.data.template,
        "max_length": config.data.max_length,
        "tasks": chosen,
        "num_examples": config.eval.num_examples,
    }
    out = workdir / "perplexity.json"
    with StageFolder(workdir, "perplexity", decisive, inputs) as stage:
        if stage.done and out.is_file():
            say(f"{out}: done already, skipped")
            return out

        # ---- records, model
        tokenizer = load_tokenizer(start.base)
        data = config.data
        encoded = {
            names[spec]: encode_all(
                eval_records(spec, config.eval.num_examples),
                *(tokenizer, data.template, data.max_length, _KEY),
            )
            for spec in chosen
        }
        model = start.open_model(config)
        params = lora.load(start.adapter, model, frozen=True) if start.adapter else None
        stage.begin()

        # ---- figures
        size = config.train.batch_size  # fits, as training held the same logits
        sets = {}
        for name, examples in encoded.items():
            total, tokens = sum_nll(model, params, examples, size, f"perplexity {name}")
            nll = total / tokens
            cut = (int(example.tokens[-1]) != tokenizer.eos_token_id for example in examples)
            sets[name] = {
                "perplexity": math.exp(nll) if nll < LARGEST else None,
                "nll": nll if math.isfinite(nll) else None,
                "tokens": tokens,
                "records": len(examples),
                "cut": sum(cut),
            }
        result = {
            "sets": sets,
            "template": template_id(data.template, tokenizer),
            "max_length": data.max_length,
            "model": start.base,
            "adapter": start.adapter,
        }
        if processes.first():
            write_json(out, result)
        stage.finish({"adapter_sha256": adapter_sha256(start)})
    return out
