"""Figure of a run report: the panels of losses and validations, and heatmaps of weight errors, in one PNG."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot: this draws with Agg and needs no display
from matplotlib.patches import Patch

from megatron_qad.engine.system_errors import naming
from megatron_qad.report.heatmaps import Heatmap
from megatron_qad.report.panels import Panel, draw, shortened

_COLUMNS = 3
_MOST_LABELS = 16
"""Number of layers up to which each has a label."""


def write_png(file: Path, title: str, panels: Sequence[Panel], heatmaps: Sequence[Heatmap]) -> None:
    """Draw the panels in rows of three, and each heatmap in a row of its own."""
    num_rows = math.ceil(len(panels) / _COLUMNS)
    heights = [3.2] * num_rows + [1.2 + 0.22 * len(heatmap.rows) for heatmap in heatmaps]
    with rc_context({"text.parse_math": False}):  # a name may hold a dollar sign
        figure = Figure(figsize=(14, 0.9 + sum(heights or [1.0])), layout="constrained")
        figure.suptitle(title)
        if heights:
            layout = figure.add_gridspec(len(heights), _COLUMNS, height_ratios=heights)
            for i, panel in enumerate(panels):
                draw(figure.add_subplot(layout[i // _COLUMNS, i % _COLUMNS]), panel)
            for i, heatmap in enumerate(heatmaps):
                _draw_heatmap(figure, figure.add_subplot(layout[num_rows + i, :]), heatmap)
        else:
            figure.text(0.5, 0.4, "nothing recorded", ha="center", color="0.4")
        if series := {one.label: one.color for panel in panels for one in panel.series}:
            # A space: matplotlib leaves labels that begin with an underscore out of legends.
            handles = [Patch(color=color, label=f" {shortened(label, 40)}") for label, color in series.items()]
            figure.legend(handles=handles, loc="outside upper right", ncols=len(handles), frameon=False)
        with naming(file):
            figure.savefig(file, dpi=100)


def _draw_heatmap(figure: Figure, axes: Axes, heatmap: Heatmap) -> None:
    values = np.full((len(heatmap.rows), len(heatmap.columns)), np.nan)
    for place, value in heatmap.values.items():
        values[place] = value
    image = axes.imshow(values, aspect="auto", cmap="YlOrRd", interpolation="nearest")
    axes.set_title(heatmap.title, loc="left", fontsize="medium")
    axes.set_yticks(range(len(heatmap.rows)), [" ".join(row) for row in heatmap.rows], fontsize="small")
    step = math.ceil(len(heatmap.columns) / _MOST_LABELS)
    axes.set_xticks(range(0, len(heatmap.columns), step), heatmap.columns[::step])
    axes.set_xlabel(heatmap.x_label)
    bar = figure.colorbar(image, ax=axes, pad=0.01, aspect=12)
    bar.ax.yaxis.set_major_formatter(lambda value, _: format(value, heatmap.spec))
