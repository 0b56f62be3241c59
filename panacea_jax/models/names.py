"""Hugging Face tensor names and ours: one table, read in both directions."""

import re

# (Hugging Face name, our path, transform). A field in braces stands for the same text on both
# sides; {layer} is a number and, on our side, an index on the stacked axis 0. "transpose" swaps the
# two axes: torch keeps [out, in], we keep [in, out].
TABLE: tuple[tuple[str, str, str], ...] = (
    ("model.embed_tokens.weight", "embed_tokens/embedding", "none"),
    (
        "model.layers.{layer}.{block}.{projection}.weight",
        "layers/{block}/{projection}/kernel",
        "transpose",
    ),
    ("model.layers.{layer}.{block}.{projection}.bias", "layers/{block}/{projection}/bias", "none"),
    ("model.layers.{layer}.{norm}.weight", "layers/{norm}/scale", "none"),
    ("model.layers.{layer}.self_attn.{head_norm}.weight", "layers/self_attn/{head_norm}/scale", "none"),
    ("model.norm.weight", "norm/scale", "none"),
    ("lm_head.weight", "lm_head/kernel", "transpose"),
    ("score.weight", "score/kernel", "transpose"),
)

_FIELDS = {
    "layer": r"\d+",
    "block": r"self_attn|mlp",
    "projection": r"[a-z]+_proj",
    "norm": r"[a-z_]+_layernorm",
    "head_norm": r"[qk]_norm",
}

# Tensors that some exporters write and that hold nothing to load: rotary frequencies follow from
# config.json.
HARMLESS = re.compile(r"(.*\.)?rotary_emb\.inv_freq$")

# What a vision-language model has beside its decoder.
VISION = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\..*")
# Where it has the decoder: in files as published, and in transformers since 4.52.
_NESTED = re.compile(r"^(language_model\.model|model\.language_model)\.")


def alone(name: str) -> str:
    """The name that a decoder's tensor has without a vision tower beside it."""
    return _NESTED.sub("model.", name).removeprefix("language_model.")


def _pattern(template: str) -> re.Pattern[str]:
    """Regular expression of a template, a named group for each field."""
    parts = re.split(r"\{(\w+)\}", template)
    groups = [f"(?P<{p}>{_FIELDS[p]})" if i % 2 else re.escape(p) for i, p in enumerate(parts)]
    return re.compile("".join(groups))


_ROWS = [(_pattern(hf), _pattern(ours), hf, ours, how) for hf, ours, how in TABLE]


def to_ours(name: str) -> tuple[str, int | None, str] | None:
    """``(path, layer, transform)`` of a Hugging Face tensor name; None if it is not one of a
    decoder's.
    """
    for hf_pattern, _, _, ours, how in _ROWS:
        match = hf_pattern.fullmatch(name)
        if match:
            fields = match.groupdict()
            layer = fields.pop("layer", None)
            return ours.format(**fields), None if layer is None else int(layer), how
    return None


def to_hf(path: str, layer: int | None = None) -> tuple[str, str]:
    """``(Hugging Face name, transform)`` of our path, and of one layer of it where the array is
    stacked.

    Raises:
        KeyError: no row of the table has such a path (a defect of ours).
    """
    for _, our_pattern, hf, _, how in _ROWS:
        match = our_pattern.fullmatch(path)
        if match and ("{layer}" in hf) == (layer is not None):
            return hf.format(layer=layer, **match.groupdict()), how
    raise KeyError(path)
