"""Reports as HTML files that need nothing else: no scripts, nothing that is fetched, plots as part of the page."""

import io
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure

_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
)


def render(template: str, **values: Any) -> str:
    """The page that `template`, a file beside this one, makes of `values`; text in them is escaped."""
    return _TEMPLATES.get_template(template).render(**values)


def svg(figure: Figure) -> Markup:
    """The plot as an element of the page: our own text alone, names escaped by matplotlib."""
    content = io.StringIO()
    figure.savefig(content, format="svg", bbox_inches="tight", metadata={"Date": None})
    return Markup(content.getvalue()[content.getvalue().index("<svg") :])
