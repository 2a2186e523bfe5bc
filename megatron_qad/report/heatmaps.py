"""Quantities of layers as grids of numbers: weight errors, sensitivities and the load of experts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from megatron_qad.report.expert_table import Experts
from megatron_qad.report.linear_grid import OUTSIDE, LinearGrid
from megatron_qad.report.runs import Run
from megatron_qad.report.weight_errors import LinearError


@dataclass(frozen=True)
class Heatmap:
    """Numbers of one quantity in rows and columns; not every cell has one."""

    title: str
    rows: Sequence[tuple[str, str]]
    """Group and label of each row."""
    columns: Sequence[str]
    values: Mapping[tuple[int, int], float]
    """(row, column) -> value."""
    spec: str
    """Format of a value, such as ".2%"."""
    is_log: bool = False
    x_label: str = "layer"


def weight_heatmaps(linears: Sequence[LinearError], grid: LinearGrid | None, runs: Sequence[Run]) -> list[Heatmap]:
    """Return the error of rounding the teacher, and for each trained run the distance of its weights from it.

    Experts of a layer share a cell, which has their mean.
    """
    if grid is None or not linears:
        return []
    by_name = {linear.name: linear for linear in linears}

    def of(title: str, value: Callable[[LinearError], float | None]) -> Heatmap:
        values = {}
        for (row, column), names in grid.cells.items():
            found = [value(by_name[name]) for name in names if name in by_name]
            if found := [one for one in found if one is not None]:
                values[grid.rows.index(row), grid.columns.index(column)] = sum(found) / len(found)
        return Heatmap(title, [(row.kind, row.label) for row in grid.rows], grid.columns, values, ".2%")

    maps = [of("Error of rounding the teacher's weights (PTQ), relative to their norm", lambda one: one.ptq_error)]
    for run in runs:
        if run.is_trained and any(run.name in linear.runs for linear in linears):
            title = f"{run.name}: distance of the quantized weights from the teacher's, relative to their norm"
            maps.append(of(title, lambda one, name=run.name: one.runs[name].distance if name in one.runs else None))
    return maps


def sensitivity_heatmap(sensitivity: Mapping) -> Heatmap:
    """Return KL(unquantized || one layer quantized), from the contents of sensitivity.json."""
    formats = list(sensitivity["everything"])
    names = list(dict.fromkeys(unit["name"] for unit in sensitivity["units"]))
    columns = [name.split(".")[2] if name.startswith("decoder.layers.") else OUTSIDE for name in names]
    values = {(formats.index(unit["format"]), names.index(unit["name"])): unit["kl"] for unit in sensitivity["units"]}
    title = "KL in nats per token with only this layer quantized"
    return Heatmap(title, [("format", fmt) for fmt in formats], columns, values, ".2g", is_log=True)


def expert_heatmaps(name: str, experts: Experts) -> list[Heatmap]:
    """Return the load of each expert of a run in its last evaluation, relative to the mean, in teacher and student."""
    layers = sorted(experts.layers)
    maps = []
    for model, title in (("teacher", "Teacher: load of the experts"), ("student", f"{name}: load of the experts")):
        loads = {layer: experts.layers[layer][model] for layer in layers}
        shown = [layer for layer in layers if loads[layer] is not None]
        if not shown:
            continue
        values = {
            (i, expert): load * len(loads[layer]) / max(sum(loads[layer]), 1)
            for i, layer in enumerate(shown)
            for expert, load in enumerate(loads[layer])
        }
        columns = [str(i) for i in range(max(len(loads[layer]) for layer in shown))]
        rows = [("layer", str(layer)) for layer in shown]
        maps.append(Heatmap(f"{title} relative to the layer's mean", rows, columns, values, ".2f", x_label="expert"))
    return maps
