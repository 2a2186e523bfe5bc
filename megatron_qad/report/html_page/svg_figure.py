"""Panels as inline SVG, whose colors and font are those of the page, also in dark mode."""

import io
import re
from collections.abc import Sequence
from xml.etree import ElementTree

from matplotlib import rc_context
from matplotlib.figure import Figure  # not pyplot: no display

from megatron_qad.report.html_page.markup import Markup, element
from megatron_qad.report.panels import RUN_COLORS, Panel, draw

_TEXT, _GRID = "#010203", "#040506"
"""Colors that nothing else has; they are replaced by variables of the stylesheet."""
VARIABLES = {_TEXT: "var(--text)", _GRID: "var(--grid)"} | {
    color: f"var(--run-{i})" for i, color in enumerate(RUN_COLORS)
}
_SETTINGS = {
    "svg.fonttype": "none",  # text stays text: it can be searched and copied
    "text.parse_math": False,  # a name may hold a dollar sign
    "font.size": 9.5,
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), _TEXT),
}
_FONT = re.compile(r"font: (?:[a-z0-9]+ )*?([0-9.]+)px [^;]*")
_REFERENCE = re.compile(r"url\(#([^)]*)\)")


def panel_figure(panel: Panel, identifier: str, width: float = 4.7, height: float = 3.0) -> Markup:
    """Return a panel as an ``<svg>`` element. Equal panels give equal text.

    Args:
        identifier: prefix of the ids in the SVG, which must be unique in the page.
        width, height: in inches; the SVG takes the width of its place in the page.
    """
    if panel.is_single:
        height = 1.15 + 0.34 * len(panel.series)
    buffer = io.BytesIO()
    with rc_context(_SETTINGS | {"svg.hashsalt": identifier}):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure.add_subplot(), panel, text_color=_TEXT, grid_color=_GRID)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return Markup(_inline(buffer.getvalue(), identifier, panel.title))


def panel_grid(panels: Sequence[Panel], prefix: str) -> Markup:
    """Return several panels side by side, with a legend if lines of several runs are drawn."""
    figures = [element("figure", panel_figure(panel, f"{prefix}-{i}")) for i, panel in enumerate(panels)]
    return element("div", legend(panels), element("div", figures, class_="panels"))


def legend(panels: Sequence[Panel]) -> Markup:
    """Return a legend of the lines; bars have their names next to them."""
    series = {one.label: one.color for panel in panels if not panel.is_single for one in panel.series}
    entries = [
        element("span", element("span", class_="swatch", style=f"background: {VARIABLES[color]}"), label)
        for label, color in sorted(series.items(), key=lambda item: RUN_COLORS.index(item[1]))
    ]
    return element("p", entries, class_="legend") if entries else Markup("")


def _inline(svg: bytes, prefix: str, title: str) -> str:
    """Return matplotlib's SVG without namespaces and metadata, with unique ids and the page's colors and font."""
    root = ElementTree.fromstring(svg)
    for parent in root.iter():
        for child in list(parent):
            if child.tag.endswith("}metadata"):
                parent.remove(child)
    for node in root.iter():
        node.tag = _local(node.tag)
        given = {_local(name): value for name, value in node.attrib.items()}
        node.attrib.clear()
        for name, value in given.items():
            node.set(name, _attribute(name, value, prefix))
        # Empty lines between the elements of matplotlib's file. Text of a <text> element is kept.
        node.tail = None
        if node.tag not in ("text", "tspan", "style"):
            node.text = None
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.set("role", "img")
    root.set("aria-label", title)
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=False)


def _local(name: str) -> str:
    return name.rsplit("}", 1)[-1]


def _attribute(name: str, value: str, prefix: str) -> str:
    if name == "id":
        return f"{prefix}-{value}"
    if name == "href":
        return f"#{prefix}-{value.removeprefix('#')}"
    value = _REFERENCE.sub(rf"url(#{prefix}-\1)", value)
    if name in ("style", "fill", "stroke"):
        value = _FONT.sub(r"font-size: \1px", value)
        for color, variable in VARIABLES.items():
            value = value.replace(color, variable)
    return value
