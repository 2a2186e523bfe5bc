"""Panels of a run report: one quantity each, drawn as lines, as points with intervals, or as bars.

``panels`` decides what is shown, ``draw`` draws a panel with matplotlib, for report.png and report.html.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from megatron_qad.report.runs import Run
from megatron_qad.report.scalars import Curve

RUN_COLORS = ("#0072b2", "#d55e00", "#009e73", "#b3589a", "#a07a00", "#3f9bd6", "#7a5af8", "#6b7280")
"""Colors of the runs, in their order, then again from the first. Distinguishable with color vision deficiencies."""
MANY_POINTS = 25
"""Curves with more points have no markers."""
_LOG_RATIO = 5
"""Values whose largest is this many times the smallest get a log axis: from there on it has at least two labels."""
_LOG_RATIO_OF_BARS = 30
"""The same for single values. From there on the shortest bar would be hardly visible, so points replace the bars."""
_SAME_TOKENS = 1e-2
"""Relative difference up to which an evaluation record and a job's validation are of the same iteration and tokens. The
same tokens differ by less than 1e-3, by rounding errors (docs/evaluate.md)."""

METRICS = {
    "kl_to_teacher": ("KL to the teacher", "nats per token"),
    "cross_entropy": ("cross entropy of the text", "nats per token"),
    "top1_agreement": ("top-1 agreement with the teacher", "share of tokens"),
}
"""Validation metrics that are drawn: name for readers and unit."""


@dataclass(frozen=True)
class Series:
    """One run or model in a panel."""

    label: str
    color: str
    points: Curve
    interval: tuple[float, float] | None = None
    """95 % interval of the last point."""


@dataclass(frozen=True)
class Panel:
    """One quantity of several runs."""

    title: str
    unit: str
    series: tuple[Series, ...]
    x_label: str = "iteration"
    reference: tuple[str, float] | None = None
    """Name and value of a line for comparison."""
    ticks: tuple[str, ...] = ()
    """Labels of x, if it counts categories."""

    @property
    def is_single(self) -> bool:
        """Whether every series has one value, so that bars are drawn."""
        return not self.ticks and all(len(series.points) == 1 for series in self.series)

    @property
    def is_log(self) -> bool:
        values = [value for series in self.series for _, value in series.points]
        ratio = _LOG_RATIO_OF_BARS if self.is_single else _LOG_RATIO
        return min(values) > 0 and max(values) / min(values) >= ratio


def colors_of(runs: Sequence[Run]) -> dict[str, str]:
    return {run.name: RUN_COLORS[i % len(RUN_COLORS)] for i, run in enumerate(runs)}


def training_panels(runs: Sequence[Run]) -> list[Panel]:
    """Return one panel for each loss that a run was trained with or that is a term of it."""
    colors = colors_of(runs)
    names = list(dict.fromkeys(name for run in runs for name in run.training_losses))
    found = []
    for name in names:
        series = (Series(run.name, colors[run.name], _finite(run.training_losses.get(name, []))) for run in runs)
        found.append(_panel(f"Training: {name}", "per token, mean of a step", series))
    return [panel for panel in found if panel is not None]


def validation_panels(runs: Sequence[Run], comparison: Mapping | None = None) -> list[Panel]:
    """Return one panel for each validation metric.

    Args:
        comparison: of evaluation records (``evaluation.comparison``); the last point of a run gets the interval of the
            record with its name.
    """
    colors = colors_of(runs)
    found = []
    for metric, (name, unit) in METRICS.items():
        series = []
        for run in runs:
            points = _finite(run.validation_curve(metric))
            series.append(Series(run.name, colors[run.name], points, _interval(run.name, metric, points, comparison)))
        reference = None
        if metric == "cross_entropy":
            values = [run.validation.get("teacher_cross_entropy", math.nan) for run in runs]
            reference = next((("teacher", value) for value in values if math.isfinite(value)), None)
        found.append(_panel(f"Validation: {name}", unit, series, reference))
    return [panel for panel in found if panel is not None]


def _panel(title: str, unit: str, series, reference: tuple[str, float] | None = None) -> Panel | None:
    shown = tuple(one for one in series if one.points)
    return Panel(title, unit, shown, reference=reference) if shown else None


def _finite(curve: Curve) -> Curve:
    return [(step, value) for step, value in curve if math.isfinite(value)]


def _interval(name: str, metric: str, points: Curve, comparison: Mapping | None) -> tuple[float, float] | None:
    for evaluation in comparison["evaluations"] if comparison and points else ():
        mean, value = evaluation["means"][metric], points[-1][1]
        is_same = abs(mean["value"] - value) <= _SAME_TOKENS * abs(value)
        if evaluation["name"] == name and is_same and mean["low"] is not None:
            return mean["low"], mean["high"]
    return None


# Drawing ---------------------------------------------------------------------------------------------------------


def draw(axes: Axes, panel: Panel, *, text_color: str = "black", grid_color: str = "0.85") -> None:
    """Draw a panel. The series have their own colors; the legend is the caller's."""
    axes.set_title(panel.title, loc="left", fontsize="medium")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if panel.is_single:
        _draw_bars(axes, panel, text_color)
        axes.grid(axis="x", color=grid_color, linewidth=0.8)
    else:
        _draw_curves(axes, panel, text_color)
        axes.grid(color=grid_color, linewidth=0.8)
    axes.set_axisbelow(True)


def _draw_bars(axes: Axes, panel: Panel, text_color: str) -> None:
    """Draw horizontal bars from 0, or points on a logarithmic axis, which has no 0. The values stand next to them."""
    values = [series.points[0][1] for series in panel.series]
    positions = range(len(values))
    if panel.is_log:
        axes.set_xscale("log")
        axes.scatter(values, positions, color=[series.color for series in panel.series], s=40)
    else:
        axes.barh(positions, values, color=[series.color for series in panel.series], height=0.6)
    tops = list(values)
    for i, series in enumerate(panel.series):
        if series.interval is not None:
            axes.plot(series.interval, [i, i], color=text_color, linewidth=1.2, marker="|", markersize=6)
            tops[i] = max(series.interval[1], values[i])
    limit = max([*tops, panel.reference[1] if panel.reference else 0.0, 1e-12])
    for i, value in enumerate(values):
        place = 1.2 * tops[i] if panel.is_log else max(tops[i], 0) + 0.02 * limit
        axes.text(place, i, format_value(value, panel.unit), va="center", fontsize="small")
    if panel.reference is not None:
        axes.axvline(panel.reference[1], color=text_color, linestyle="--", linewidth=1)
    axes.set_yticks(positions, [shortened(series.label) for series in panel.series])
    axes.invert_yaxis()
    if panel.is_log:
        axes.set_xlim(min(values) / 2, 8 * limit)  # room for the value next to the largest point
        axes.set_ylim(len(values) - 0.5, -0.5)
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.set_xlim(min([0.0, *values]), 1.3 * limit)
        axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(_formatter(panel.unit))
    reference = f"; dashed: {panel.reference[0]}, {panel.reference[1]:.4g}" if panel.reference else ""
    axes.set_xlabel(panel.unit + reference)


def _draw_curves(axes: Axes, panel: Panel, text_color: str) -> None:
    for series in panel.series:
        steps, values = zip(*series.points, strict=True)
        marker = "o" if len(values) <= MANY_POINTS else None
        axes.plot(steps, values, color=series.color, marker=marker, markersize=4, linewidth=1.4)
        if series.interval is not None:
            low, high = series.interval
            axes.plot([steps[-1]] * 2, [low, high], color=series.color, linewidth=1.2, marker="_", markersize=8)
    if panel.reference is not None:
        axes.axhline(panel.reference[1], color=text_color, linestyle="--", linewidth=1)
    if panel.is_log:
        axes.set_yscale("log")
        values = [value for series in panel.series for _, value in series.points]
        subs = (1, 2, 5) if max(values) / min(values) < 1000 else (1,)
        axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(_formatter(panel.unit))
    if panel.ticks:
        step = max(1, math.ceil(len(panel.ticks) / 7))
        axes.set_xticks(range(0, len(panel.ticks), step), panel.ticks[::step])
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    reference = f"; dashed: {panel.reference[0]}" if panel.reference else ""
    axes.set(xlabel=panel.x_label, ylabel=panel.unit + reference)


def _formatter(unit: str) -> FuncFormatter:
    if unit.startswith("share"):
        # Axes of bars are longer than 100 %, to have room for the values.
        return FuncFormatter(lambda value, _: f"{100 * value:.4g} %" if value < 1 + 1e-9 else "")
    return FuncFormatter(lambda value, _: f"{value:.4g}")


def format_value(value: float, unit: str) -> str:
    """Format a value of a panel for readers: shares in percent."""
    return f"{value:.2%}" if unit.startswith("share") else f"{value:.4g}"


def shortened(name: str, length: int = 16) -> str:
    """Shorten a name in the middle, so that it fits next to a panel."""
    return name if len(name) <= length else f"{name[: length // 2 - 1]}...{name[-(length // 2 - 2) :]}"
