"""The command ``generate --prompts_only``: what we would ask, for a server that answers in our place. Loads no weights.

``score --generations`` takes the answers back (``records/elsewhere.py``).
"""

from pathlib import Path

from ml_collections import ConfigDict

from panacea_jax.data.sources import fingerprint
from panacea_jax.errors import InputError
from panacea_jax.evaluate.lines import prompt_line
from panacea_jax.evaluate.tasks import answer_length, set_names
from panacea_jax.generate.ends import eos_ids
from panacea_jax.models.hub import local_folder
from panacea_jax.models.vocabulary import open_vocabulary
from panacea_jax.parallel import processes
from panacea_jax.progress import say
from panacea_jax.records.jsonl import encode_line
from panacea_jax.stages import lineage
from panacea_jax.stages.generate import read_prompts
from panacea_jax.stages.rendering import decisive_for_prompts, make_template
from panacea_jax.sums import sha256_folder
from panacea_jax.workdir import StageFolder, write_bytes

# What decides the ids of a prompt and where an answer ends; a hub id is fetched without its weights.
ASKED_WITH = ("*.json", "tokenizer*", "*.jinja")


def prompts_stage(config: ConfigDict, workdir: Path) -> Path:
    """Write ``WORKDIR/prompts/<set>.jsonl`` for every set of ``config.eval.tasks``; returns that folder.

    A line holds "prompt" (its text, special tokens included), "prompt_token_ids" (what we would read), "max_new_tokens" and
    "stop_token_ids", and what scoring needs of the record, so that with "response" added it is an answer.

    Raises:
        InputError: no tasks, or anything about the tokenizer, sources or work directory.
    """
    # ---- what is asked for
    specs = list(config.eval.tasks)
    if not specs:
        raise InputError("config.eval.tasks is empty: name at least one TASK@WHERE")
    names = set_names(specs)
    base = lineage.named(config).base
    if not base:
        raise InputError("config.model.path is not set: give a Hugging Face folder or a hub id")
    folder = local_folder(base, ASKED_WITH)
    asked = {
        "model": {"path": base},
        **decisive_for_prompts(config),
        "eval": {"tasks": specs, "num_examples": config.eval.num_examples},
        "max_new_tokens": config.generate.max_new_tokens,
    }
    inputs = {spec: fingerprint(spec, "config.eval.tasks") for spec in specs}
    inputs[base] = sha256_folder(folder, ASKED_WITH)
    with StageFolder(workdir, "prompts", asked, inputs) as stage:
        if stage.done:
            say(f"{stage.folder}: done already, skipped")
            return stage.folder

        # ---- prompts
        _, tokenizer, vocab_size = open_vocabulary(folder)
        template = make_template(config, tokenizer, workdir)
        ends = eos_ids(template, folder)
        sets = {}
        for name, spec in zip(names, specs):
            length = config.generate.max_new_tokens or answer_length(spec)
            sets[name] = [
                prompt_line(prompt.record, prompt=prompt.text, template=template.id)
                | {"prompt_token_ids": prompt.ids, "max_new_tokens": length, "stop_token_ids": ends}
                for prompt in read_prompts(config, spec, template, vocab_size)
            ]
        stage.begin()
        if processes.first():
            for name, lines in sets.items():
                write_bytes(stage.folder / f"{name}.jsonl", b"".join(map(encode_line, lines)))
        stage.finish({"records": {name: len(lines) for name, lines in sets.items()}})
    return stage.folder
