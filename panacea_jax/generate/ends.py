"""Which tokens end an answer."""

from pathlib import Path

from panacea_jax.data.template import Template
from panacea_jax.errors import InputError
from panacea_jax.untrusted import read_object


def eos_ids(template: Template, folder: Path | None) -> list[int]:
    """End-of-sequence ids: the tokenizer's, the template's own mark of an answer's end, and those that ``generation_config.json`` adds
    or, where there is none, ``config.json`` (chat models end turns with another), as transformers does.

    Raises:
        InputError: that file cannot be read, or its ``eos_token_id`` is no id and no list of ids.
    """
    ids = {int(template.tokenizer.eos_token_id), *template.end_ids()}
    if folder is not None:
        own = folder / "generation_config.json"
        path = own if own.is_file() else folder / "config.json"
        found = read_object(path)
        text = found.get("text_config")
        extra = found.get("eos_token_id", text.get("eos_token_id") if isinstance(text, dict) else None)
        listed = extra if isinstance(extra, list) else [] if extra is None else [extra]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in listed):
            raise InputError(f"{path}: eos_token_id = {extra!r}: must be an id or a list of ids")
        ids |= set(listed)
    return sorted(ids)
