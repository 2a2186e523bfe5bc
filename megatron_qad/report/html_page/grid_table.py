"""Grids of many small cells as HTML tables: the policy map and heatmaps. They scale to a hundred layers."""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby

from megatron_qad.report.heatmaps import Heatmap
from megatron_qad.report.html_page.markup import Markup, element, paragraph

_WIDE = 12
"""Number of columns up to which a cell has room for its value."""
_MOST_LABELS = 26
"""Number of columns up to which each has a label."""
_CELL_PIXELS = 74
"""Largest width of a cell."""
_PALEST = 0.06


def grid_table(
    rows: Sequence[tuple[str, str]],
    columns: Sequence[str],
    cell: Callable[[int, int], Markup | None],
    *,
    x_label: str = "layer",
) -> Markup:
    """Return a grid with grouped rows.

    Args:
        rows: group and label of each row; neighbors of one group share its name.
        cell: (row, column) -> a ``<td>``, or None for an empty place.
    """
    sizes = [element("col", class_="group"), element("col", class_="label"), *(element("col") for _ in columns)]
    heads = [element("th", x_label, colspan=2, style="text-align: right; padding-right: 8px")]
    step = 1 if len(columns) <= _MOST_LABELS else 5 if len(columns) <= 60 else 10
    for name in columns:
        heads.append(element("th", name if not name.isdigit() or int(name) % step == 0 else None))
    body, position = [], 0
    for group, members in groupby(rows, key=lambda row: row[0]):
        members = list(members)
        for i, (_, label) in enumerate(members):
            names = [element("th", group, rowspan=len(members), class_="kind")] if i == 0 else []
            names.append(element("th", label, title=label))
            cells = (cell(position, column) or element("td") for column in range(len(columns)))
            body.append(element("tr", names, list(cells)))
            position += 1
    width = 306 + _CELL_PIXELS * len(columns)
    table = element(
        "table",
        element("colgroup", sizes),
        element("thead", element("tr", heads)),
        element("tbody", body),
        class_="grid",
        style=f"max-width: {width}px",
    )
    return element("div", table, class_="keep")


def heatmap_table(heatmap: Heatmap) -> Markup:
    """Return a heatmap with its title and color scale; each cell names its value when the pointer is on it."""
    position = _positions(heatmap)
    is_wide = len(heatmap.columns) <= _WIDE

    def cell(row: int, column: int) -> Markup | None:
        value = heatmap.values.get((row, column))
        if value is None:
            return None
        text = format(value, heatmap.spec)
        shade = position(value)
        group, label = heatmap.rows[row]
        title = f"{heatmap.x_label} {heatmap.columns[column]}, {group} {label}: {text}"
        kind = "heat hot" if shade > 0.6 else "heat"
        style = f"--a: {_PALEST + (1 - _PALEST) * shade:.2f}"
        return element("td", text if is_wide else None, class_=kind, title=title, style=style)

    finite = _finite(heatmap.values.values())
    scale = None
    if finite:
        low, high = (format(value, heatmap.spec) for value in (min(finite), max(finite)))
        unit = " (logarithmic)" if heatmap.is_log else ""
        scale = paragraph(low, element("span", class_="scale"), high, unit, class_="note")
    table = grid_table(heatmap.rows, heatmap.columns, cell, x_label=heatmap.x_label)
    return element("div", element("h3", heatmap.title), table, scale, class_="keep")


def _positions(heatmap: Heatmap) -> Callable[[float], float]:
    """Return the function from a value to its place between the smallest (0) and the largest (1)."""
    scale = (lambda value: math.log(max(value, smallest))) if heatmap.is_log else (lambda value: value)
    finite = _finite(heatmap.values.values())
    # A KL of 0 or below, from rounding errors, has no logarithm; it gets the color of the smallest.
    smallest = min((value for value in finite if value > 0), default=1.0)
    ends = [scale(value) for value in finite] or [0.0]
    low, high = min(ends), max(ends)

    def position(value: float) -> float:
        if not math.isfinite(value):
            return 1.0
        return 0.5 if high == low else (scale(value) - low) / (high - low)

    return position


def _finite(values: Iterable[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]
