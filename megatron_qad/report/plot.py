"""Figure of a run report: training loss, validation KL, top-1 agreement and weight errors, in one PNG."""

import itertools
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot: this draws with Agg and needs no display
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from megatron_qad.engine.system_errors import naming
from megatron_qad.report.runs import Run
from megatron_qad.report.scalars import Curve
from megatron_qad.report.weight_errors import LinearError

_PROJECTION_COLORS = ("C4", "C5", "C6", "C7", "C8", "C9")
"""Colors of the projections; the first runs use C0 to C3."""


def write_png(file: Path, title: str, runs: Sequence[Run], linears: Sequence[LinearError]) -> None:
    """Draw the four panels; a panel without data shows "nothing recorded"."""
    figure = Figure(figsize=(12, 8.5), layout="constrained")
    figure.suptitle(title)
    loss, kl, agreement, weights = figure.subplots(2, 2).flat
    colors = {run.name: f"C{i}" for i, run in enumerate(runs)}

    losses = {f"{r.name} ({r.training_loss[0]})": (colors[r.name], r.training_loss[1]) for r in runs if r.is_trained}
    _curves(loss, "Training loss", "nats per token", losses, log=True)
    for axes, metric, heading, unit in (
        (kl, "kl_to_teacher", "Validation: KL to the teacher", "nats per token"),
        (agreement, "top1_agreement", "Validation: top-1 agreement with the teacher", "share of tokens"),
    ):
        curves = {run.name: (colors[run.name], run.validation_curve(metric)) for run in runs}
        _curves(axes, heading, unit, curves, log=metric == "kl_to_teacher")
    if agreement.lines:
        agreement.yaxis.set_major_formatter(PercentFormatter(1.0))
    _weights(weights, linears, [run.name for run in runs if run.is_trained])
    with naming(file):
        figure.savefig(file, dpi=110)


def _curves(axes: Axes, heading: str, unit: str, curves: dict[str, tuple[str, Curve]], *, log: bool) -> None:
    """Draw one line per run; a run with a single value is drawn as a dashed horizontal line."""
    axes.set(title=heading, xlabel="iteration", ylabel=unit)
    curves = {label: (color, curve) for label, (color, curve) in curves.items() if curve}
    if not curves:
        return _mark_empty(axes)
    for label, (color, curve) in curves.items():
        if len(curve) == 1:
            axes.axhline(curve[0][1], color=color, linestyle="--", label=label)
        else:
            marker = "o" if len(curve) <= 25 else None
            axes.plot(*zip(*curve, strict=True), color=color, marker=marker, markersize=3, linewidth=1.4, label=label)
    if log and all(value > 0 for _, curve in curves.values() for _, value in curve):
        axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()


def _weights(axes: Axes, linears: Sequence[LinearError], trained: Sequence[str]) -> None:
    """Draw weight errors: color is the projection, solid lines the quantized teacher, other lines trained runs."""
    axes.set(title="Quantized weights: distance from the teacher's weight", xlabel="layer", ylabel="relative RMS")
    if not linears:
        return _mark_empty(axes)
    head_position = 1 + max((m.layer for m in linears if m.layer is not None), default=-1)
    projections = list(dict.fromkeys(m.projection for m in linears))
    colors = dict(zip(projections, itertools.cycle(_PROJECTION_COLORS), strict=False))
    trained = [run for run in trained if any(run in m.runs for m in linears)]
    styles = dict(zip(trained, itertools.cycle(("--", ":", "-.")), strict=False))

    def line(projection: str, style: str, points: Curve) -> None:
        if points:
            style_args = {
                "color": colors[projection],
                "linestyle": style,
                "marker": "o",
                "markersize": 3,
                "linewidth": 1.2,
            }
            axes.plot(*zip(*points, strict=True), **style_args)

    for projection in projections:
        points = [(head_position if m.layer is None else m.layer, m) for m in linears if m.projection == projection]
        line(projection, "-", [(x, m.ptq_error) for x, m in points])
        for run, style in styles.items():
            line(projection, style, [(x, m.runs[run].distance) for x, m in points if run in m.runs])
    handles = [Line2D([], [], color=color, label=name) for name, color in colors.items()]
    handles.append(Line2D([], [], color="0.3", label="teacher, quantized (PTQ)"))
    handles += [Line2D([], [], color="0.3", linestyle=style, label=f"{run}, trained") for run, style in styles.items()]
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(handles=handles, fontsize="small", ncols=2)


def _mark_empty(axes: Axes) -> None:
    axes.text(0.5, 0.5, "nothing recorded", transform=axes.transAxes, ha="center", va="center", color="0.4")
    axes.set(xticks=[], yticks=[])
