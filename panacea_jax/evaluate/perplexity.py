"""The command ``perplexity``: how surprised the model is by a test set's own answers.

A figure without a judge and without decoding: a defence that ruins the model shows here even where
its answers still pass for refusals or labels.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from panacea_jax.data.batches import Stream, lengths
from panacea_jax.data.encode import Example, encode_all
from panacea_jax.data.sources import fingerprint, parse
from panacea_jax.data.template import template_id
from panacea_jax.data.tokenizer import load_tokenizer
from panacea_jax.defences import Loss
from panacea_jax.errors import InputError
from panacea_jax.evaluate.tasks import find_task, set_names
from panacea_jax.generate.stage import eval_records, find_params
from panacea_jax.models import lora
from panacea_jax.models.model import Model
from panacea_jax.parallel import batch_sharding, processes
from panacea_jax.parallel.sharding import batch_rows
from panacea_jax.progress import Progress, say
from panacea_jax.train.stage import model_inputs, open_model
from panacea_jax.workdir import Stage, sha256_folder, write_text

KEY = "config.eval.tasks"

# exp of more does not fit a float; such a perplexity, and NaN, are null in the file.
LARGEST = 700.0

_summed = jax.jit(Loss.summed)


def has_answers(spec: str) -> bool:
    """Whether a set's records hold an answer that a good model gives: not those of harmful prompts,
    and XSTest has none."""
    return find_task(parse(spec).task).role in ("accuracy", "generation")


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
        ladder=lengths(len(by_length[-1].tokens)), row_multiple=batch_rows(model.mesh),
    )  # fmt: skip
    loss, total, tokens = Loss.of(model), 0.0, 0
    with Progress(title, stream.steps_per_epoch) as bar:
        for batch in stream.once():
            placed = jax.device_put(batch, batch_sharding(model.mesh))
            found, count = jax.device_get(_summed(loss, params, placed))
            total, tokens = total + float(found), tokens + int(count)
            bar.advance()
    return total, tokens


def perplexity_stage(config: ConfigDict, workdir: Path) -> Path:
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
        raise InputError(f"{KEY}: no set with answers to take the perplexity of: {specs}")
    base, adapter = find_params(config, workdir)
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.model.path, config.lora.init_from = base, adapter
    inputs = model_inputs(config) | {spec: fingerprint(spec, KEY) for spec in chosen}
    decisive = {
        "model": {"path": base, "dtype": config.model.dtype},
        "adapter": adapter,
        "template": config.data.template,
        "max_length": config.data.max_length,
        "tasks": chosen,
        "num_examples": config.eval.num_examples,
    }
    stage = Stage(workdir, "perplexity", decisive, inputs)
    out = workdir / "perplexity.json"
    if stage.done and out.is_file():
        say(f"{out}: done already, skipped")
        return out

    # ---- records, model
    tokenizer = load_tokenizer(base)
    data = config.data
    encoded = {
        names[spec]: encode_all(
            eval_records(spec, config.eval.num_examples),
            *(tokenizer, data.template, data.max_length, KEY),
        )
        for spec in chosen
    }
    model = open_model(config)
    params = lora.load(adapter, model) if adapter else None
    stage.begin()

    # ---- figures
    size = config.train.batch_size  # fits, as training held the same logits
    sets = {}
    for name, examples in encoded.items():
        total, tokens = sum_nll(model, params, examples, size, f"perplexity {name}")
        nll = total / tokens
        sets[name] = {
            "perplexity": math.exp(nll) if nll < LARGEST else None,
            "nll": nll if math.isfinite(nll) else None,
            "tokens": tokens,
            "records": len(examples),
            "cut": sum(int(example.tokens[-1]) != tokenizer.eos_token_id for example in examples),
        }
    result = {
        "sets": sets,
        "template": template_id(data.template, tokenizer),
        "max_length": data.max_length,
        "model": base,
        "adapter": adapter,
    }
    if processes.first():
        write_text(out, json.dumps(result, indent=1) + "\n")
    stage.finish({"adapter_sha256": sha256_folder(Path(adapter), ("*",)) if adapter else ""})
    return out
