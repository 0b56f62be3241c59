"""The command ``try``: prompts that a person types or a pipe brings, answered by two models side by side."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from absl import logging
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table
from rich.text import Text

from panacea_jax.data.encode import check_ids, encode_prompt
from panacea_jax.data.sources import Record
from panacea_jax.data.template import Template
from panacea_jax.errors import InputError
from panacea_jax.generate.decode import generate
from panacea_jax.generate.ends import eos_ids
from panacea_jax.models.model import Model
from panacea_jax.models.vocabulary import open_vocabulary
from panacea_jax.progress import say, table_console
from panacea_jax.stages import lineage
from panacea_jax.stages.generate import sampling
from panacea_jax.stages.lineage import BARE_BASE, Start
from panacea_jax.stages.rendering import make_template
from panacea_jax.stores import stand_in
from panacea_jax.terminal import safe_line, safe_text
from panacea_jax.workdir import manifest_if_any

MAX_NEW_TOKENS = 256  # unless config.generate.max_new_tokens says otherwise
WIDTH = 110  # of the table in a file


class _Model(NamedTuple):
    """One of the two: its name, and what it takes to let it answer."""

    name: str
    model: Model
    params: Any
    template: Template
    vocab_size: int
    ends: list[int]


def ask_stage(config: ConfigDict, workdir: Path | None, adapter: str = "", against: str = "") -> None:
    """Answer each line of stdin, each for itself, until the input ends; writes no file.

    Args:
        config: names base, template and decoding, as for ``generate``.
        workdir: what answers there is tried, unless an adapter is named.
        adapter: PEFT folder on the base.
        against: what stands beside it, as ``lineage.to_compare`` takes it; by default the bare base.

    Raises:
        InputError: nothing to try, or anything about models, adapters or a prompt.
    """
    # ---- what is asked for
    named = adapter or config.generate.adapter
    if workdir is None and not named:
        raise InputError("--adapter is not set: name a PEFT folder to try, or a work directory with --workdir")
    config = config.copy_and_resolve_references()
    config.generate.adapter = named
    tried = lineage.to_answer(config, workdir or Path())
    if tried == lineage.named(config) and not tried.adapter:
        raise InputError(f"--workdir={workdir}: no adapter or model to try there")
    other = lineage.to_compare(config, against or BARE_BASE, "--against")
    other.inputs()  # raises where there is no base

    # ---- models
    model = other.open_model(config)
    left = _open(config, workdir, other, model)
    right = _open(config, workdir, tried, model if tried.base == other.base else tried.open_model(config, model.mesh))
    say("one prompt a line, each for itself; Ctrl-D ends")

    # ---- answers
    console = table_console(WIDTH)
    with contextlib.suppress(KeyboardInterrupt):
        for number, prompt in enumerate(_prompts()):
            _show(console, prompt, [(m.name, _answer(config, m, prompt, number)) for m in (left, right)])


def _open(config: ConfigDict, workdir: Path | None, start: Start, model: Model) -> _Model:
    _, tokenizer, vocab_size = open_vocabulary(start.base)
    template = make_template(config, tokenizer, workdir)
    trained = _template_of_training(start)
    if trained not in ("", template.id):
        what = start.adapter or start.base
        logging.warning("%s: trained with the template %s, asked with %s (config.data.template)", what, trained, template.id)
    params = lineage.finished_adapter(start.adapter, model, "answering with") if start.adapter else None
    return _Model(start.adapter or start.base, model, params, template, vocab_size, eos_ids(template, model.folder))


def _template_of_training(start: Start) -> str:
    """Id of the template that a stage of ours trained with; "" where there is none."""
    made = manifest_if_any(stand_in(start.adapter or start.base).parent)
    return str(made.get("outcome", {}).get("template", ""))


def _prompts() -> Iterator[str]:
    """Lines of stdin that are not empty.

    Raises:
        InputError: something that is no text.
    """
    try:
        for line in _typed() if sys.stdin.isatty() else sys.stdin:
            if prompt := line.strip():
                yield prompt
    except UnicodeDecodeError as error:
        raise InputError("stdin: not text in UTF-8") from error


def _typed() -> Iterator[str]:
    """Lines of a person, who gets a mark where to type."""
    import readline  # noqa: F401 - arrow keys and history for ``input``

    with contextlib.suppress(EOFError):
        while True:
            yield input("> ")


def _answer(config: ConfigDict, asked: _Model, prompt: str, number: int) -> str:
    """What a model says, with a word where there is more, or nothing, to say."""
    record = Record(prompt, input="", output="", reference="", extra={})
    ids = encode_prompt(record, asked.template)
    check_ids([ids], asked.vocab_size, "prompt")
    most = config.generate.max_new_tokens or MAX_NEW_TOKENS
    (how, seed), kept = sampling(config), config.generate.cache_dtype
    [(_, tokens, finished)] = generate(
        asked.model, asked.model.weights, asked.params, [ids], batch_size=1, max_new_tokens=most, eos_ids=asked.ends, pad_id=0,
        sampling=how, seed=seed, indices=[number], slots=config.data.max_length + most, cache_dtype=None if kept == "auto" else kept,
    )  # fmt: skip
    text = safe_text(asked.template.tokenizer.decode(tokens, skip_special_tokens=True)).strip()
    return (text or "(empty)") + ("" if finished else f" … (cut at {most} tokens)")


def _show(console: Console, prompt: str, answers: list[tuple[str, str]]) -> None:
    """The prompt above its answers, a column a model."""
    table = Table(title=Text(safe_line(prompt)), title_justify="left", expand=True)
    for name, _ in answers:
        table.add_column(Text(safe_line(name)), ratio=1, overflow="fold")
    table.add_row(*(Text(answer) for _, answer in answers))
    console.print(table)
