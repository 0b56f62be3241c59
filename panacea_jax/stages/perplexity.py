"""The command ``perplexity``: how surprised the model is by a test set's own answers.

A figure without a judge and without decoding: a defence that ruins the model shows here even where
its answers still pass for refusals or labels.
"""

import contextlib
import math
from pathlib import Path

from ml_collections import ConfigDict

from panacea_jax.data.encode import check_ids, encode_all
from panacea_jax.data.sources import fingerprint, parse_source
from panacea_jax.errors import InputError
from panacea_jax.evaluate.tasks import find_task, set_names
from panacea_jax.models.vocabulary import open_vocabulary
from panacea_jax.parallel import processes
from panacea_jax.progress import Progress, say
from panacea_jax.stages import lineage
from panacea_jax.stages.generate import adapter_sha256, decisive_for_weights, eval_records
from panacea_jax.stages.lineage import Start
from panacea_jax.stages.rendering import decisive_for_prompts, make_template
from panacea_jax.stages.room import MESH, advised
from panacea_jax.train.held_out import sum_nll
from panacea_jax.workdir import StageFolder, write_json

_KEY = "config.eval.tasks"

# exp of more does not fit a float; such a perplexity, and NaN, are null in the file.
LARGEST = 700.0


def has_answers(spec: str) -> bool:
    """Whether a set's records hold an answer that a good model gives: not those of harmful prompts,
    and XSTest has none."""
    return find_task(parse_source(spec).scored_as).role in ("accuracy", "generation")


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
        "model": decisive_for_weights(config, start),
        "adapter": start.adapter,
        **decisive_for_prompts(config),
        **({} if config.data.loss_on == "all" else {"loss_on": config.data.loss_on}),
        "max_length": config.data.max_length,
        "tasks": chosen,
        "num_examples": config.eval.num_examples,
    }
    out = workdir / "perplexity.json"
    with StageFolder(workdir, "perplexity", decisive, inputs) as stage, contextlib.ExitStack() as stack:
        if stage.done and out.is_file():
            say(f"{out}: done already, skipped")
            return out

        # ---- records, model
        _, tokenizer, vocab_size = open_vocabulary(start.base)
        template, data = make_template(config, tokenizer, workdir), config.data
        encoded = {
            names[spec]: encode_all(
                eval_records(config, spec), template, data.max_length, _KEY, loss_on=data.loss_on
            )
            for spec in chosen
        }
        for spec in chosen:
            found = (example.tokens for example in encoded[names[spec]])
            check_ids(found, vocab_size, f"{_KEY}: {spec}")
        model = start.open_model(config)
        params = lineage.finished_adapter(start.adapter, model, "measuring") if start.adapter else None
        stage.begin()

        # ---- figures
        stack.enter_context(advised("perplexity", f"a smaller config.train.batch_size or config.data.max_length, {MESH}"))
        size = config.train.batch_size  # fits, as training held the same logits
        sets = {}
        for name, examples in encoded.items():
            with Progress(f"perplexity {name}", -(-len(examples) // size)) as bar:
                total, tokens = sum_nll(model, params, examples, size, bar.advance)
            nll = total / tokens
            sets[name] = {
                "perplexity": math.exp(nll) if nll < LARGEST else None,
                "nll": nll if math.isfinite(nll) else None,
                "tokens": tokens,
                "records": len(examples),
                "cut": sum(example.cut for example in examples),
            }
        result = {
            "sets": sets,
            "template": template.id,
            "max_length": data.max_length,
            "model": start.base,
            "adapter": start.adapter,
        }
        if processes.first():
            write_json(out, result)
        stage.finish({"adapter_sha256": adapter_sha256(start)})
    return out
