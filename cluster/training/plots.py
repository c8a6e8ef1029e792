"""Plots as part of a page."""

import io

from markupsafe import Markup
from matplotlib.figure import Figure


def svg(figure: Figure) -> Markup:
    """The plot as an element of the page: our own text alone, names escaped by matplotlib."""
    content = io.StringIO()
    figure.savefig(content, format="svg", bbox_inches="tight", metadata={"Date": None})
    return Markup(content.getvalue()[content.getvalue().index("<svg") :])
