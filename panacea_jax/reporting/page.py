"""The page: everything is in it, and its policy forbids all else. And its charts as pictures in files."""

import base64
import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from panacea_jax.errors import InputError
from panacea_jax.reporting.charts import Spec
from panacea_jax.reporting.parts import Chart, Section

VEGA_LITE = "6.4"
GENERATOR = "panacea_jax report"
"""What a page says that it was made by."""
WIDTH = 560
"""Of a picture in a file, in pixels."""
_LINES = {"domainColor": "#888888", "tickColor": "#888888", "gridColor": "#888888", "gridOpacity": 0.25, "titleFontWeight": "normal"}


def _library() -> Any:
    """vl-convert, which brings Vega, Vega-Lite and vega-embed with it.

    Raises:
        InputError: it is not installed.
    """
    try:
        import vl_convert
    except ImportError as error:
        raise InputError("report: needs vl-convert-python; pip install 'panacea_jax[report]'") from error
    return vl_convert


@functools.cache
def _scripts() -> str:
    """Vega, Vega-Lite and vega-embed as one script; seconds to make."""
    return str(_library().javascript_bundle(vl_version=VEGA_LITE))


def as_page(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """One HTML page without a request: styles, scripts, data and pictures are in it, and its policy forbids all else.

    Args:
        title: of the page.
        subtitle: below it.
        sections: harmless ones.

    Raises:
        InputError: vl-convert-python is missing.
    """
    here = Path(__file__).parent
    style, script = ((here / name).read_text("utf-8") for name in ("page.css", "page.js"))
    _library()  # that it is there
    library = _scripts()
    specs = {c.name: {**_complete(c, "currentColor"), "width": "container"} for s in sections for c in s.charts}
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string((here / "page.html").read_text("utf-8"))
    policy = (
        f"default-src 'none'; script-src {_hash(library)} {_hash(script)}; style-src {_hash(style)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    return template.render(
        title=title, subtitle=subtitle, sections=sections, policy=policy, generator=GENERATOR, style=style, script=script, library=library,
        # "<" would end the element, or begin a comment in it
        specs=json.dumps(specs, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c"),
    )  # fmt: skip


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _complete(chart: Chart, ink: str) -> Spec:
    """A chart's specification with what all have in common; ``ink`` is the colour of its words."""
    words = {"labelColor": ink, "titleColor": ink}
    config = {
        "background": None, "font": "system-ui, sans-serif", "view": {"stroke": None},
        "axis": {**words, **_LINES, "labelFontSize": 11, "titleFontSize": 12},
        "legend": {**words, "orient": "bottom", "columns": 1, "labelLimit": 300, "title": None, "symbolOpacity": 1},
    }  # fmt: skip
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json", "description": chart.says,
        "autosize": {"type": "fit-x", "contains": "padding"}, "config": config, **chart.spec,
    }  # fmt: skip


def as_picture(chart: Chart) -> str:
    """A chart as SVG on white, for documents."""
    spec = _complete(chart, "black")
    spec["config"] |= {"background": "white", "font": "sans-serif"}
    return str(_library().vegalite_to_svg({**spec, "width": WIDTH}, vl_version=VEGA_LITE))
