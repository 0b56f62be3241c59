"""How a stage reads its sources and renders their records: what ``config.data`` says of it, and the work directory's date."""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from panacea_jax.config import attack_of, get_config
from panacea_jax.data.sources import parse_source
from panacea_jax.data.template import Template
from panacea_jax.workdir import first_day

# Keys of config.data that decide what a prompt is, beside the template.
_KEYS = ("special_tokens", "thinking", "date", "format", "columns")


def make_template(config: ConfigDict, tokenizer: Any, workdir: Path | None = None) -> Template:
    """The template of training, generation and evaluation in one work directory.

    One that writes the date writes ``config.data.date``, else that of the work directory's first stage, else today's; so a directory has
    one form of prompts however long its stages take.

    Args:
        config: names template and date.
        tokenizer: of the base.
        workdir: the work directory, None for none.

    Raises:
        InputError: unknown template, none there, or a manifest that is not ours.
    """
    data = config.data
    date = data.date or (first_day(workdir) if workdir else "")
    return Template(data.template, tokenizer, special_tokens=data.special_tokens, thinking=data.thinking, date=date)


def of_one_day(config: ConfigDict, workdir: Path) -> ConfigDict:
    """With the work directory's date, for folders of their own in it."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.data.date = config.data.date or first_day(workdir)
    return config


def decisive_for_prompts(config: ConfigDict) -> dict[str, Any]:
    """What a manifest of answers is compared by, as far as prompts go; keys at their default are left out."""
    before = get_config().data
    changed = {key: config.data[key] for key in _KEYS if config.data[key] != before[key]}
    asked = {"attack": attack_of(config).decisive()} if any(parse_source(spec).attacked for spec in config.eval.tasks) else {}
    return {"template": config.data.template, **changed, **asked}
