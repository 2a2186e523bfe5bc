"""Sections about the jobs: their last validation, settings, cost, and the load of experts."""

import math
from collections.abc import Sequence

from megatron_qad.report.expert_table import expert_rows
from megatron_qad.report.heatmaps import expert_heatmaps
from megatron_qad.report.html_page.grid_table import heatmap_table
from megatron_qad.report.html_page.markup import Markup, element, paragraph, table
from megatron_qad.report.panels import format_value
from megatron_qad.report.runs import Run

_COLUMNS = (
    ("kl_to_teacher", "KL to the teacher", ""),
    ("cross_entropy", "cross entropy", ""),
    ("teacher_cross_entropy", "teacher's cross entropy", ""),
    ("top1_agreement", "top-1 agreement", "share"),
)


def validation_table(runs: Sequence[Run]) -> list[Markup]:
    """Return the last validation of each job."""
    rows = []
    for run in runs:
        cells = [_metric(run, name, unit) for name, _, unit in _COLUMNS]
        tokens = run.validation.get("num_tokens")
        at = run.validation.get("iteration")
        rows.append([element("b", run.name), *cells, _count(tokens), _count(at)])
    return [
        table(["run", *(name for _, name, _ in _COLUMNS), "held-out tokens", "at iteration"], rows),
        paragraph(
            "From the job's own last validation: means over held-out tokens. KL and cross entropies are in nats per "
            "token; top-1 agreement is the share of tokens for which the run and the teacher have the same most likely "
            "token.",
            class_="note",
        ),
    ]


def _metric(run: Run, name: str, unit: str) -> str:
    value = run.validation.get(name)
    if value is None:
        return "not measured"
    if run.has_no_counted_tokens:
        return "no token counted"
    return format_value(value, unit) if math.isfinite(value) else str(value)


def cost_section(runs: Sequence[Run]) -> list[Markup]:
    """Return a table of iterations, tokens, hours and speed."""
    rows = []
    for run in runs:
        memory = [value for _, value in run.scalars.get("memory/peak_gb", [])]
        tokens = run.num_tokens if run.is_trained else 0
        rows.append(
            [
                element("b", run.name),
                f"{run.num_iterations:,}" if run.is_trained else "none",
                "not saved" if tokens is None else f"{tokens:,}" if tokens else "none",
                "unknown" if run.seconds is None else duration(run.seconds),
                f"{run.tokens_per_second:,.0f}" if run.tokens_per_second else "not recorded",
                f"{max(memory):.3g} GB" if memory and run.is_trained else "not recorded",
            ]
        )
    heads = ["run", "iterations", "training tokens", "wall time", "tokens per second (median)", "peak memory of a rank"]
    return [
        table(heads, rows),
        paragraph(
            "Training tokens are those that the saved checkpoint has read, counted in the loss or not. Wall time is "
            "from the first to the last event of every start of the job, with validations and saves; without the start "
            "of Python and the loading of checkpoints.",
            class_="note",
        ),
    ]


def duration(seconds: float) -> str:
    """Return a duration for readers.

    Example:
        >>> duration(42), duration(300), duration(9000)
        ('42 s', '5.0 min', '2.50 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.2f} h"


def expert_section(runs: Sequence[Run]) -> list[Markup]:
    """Return the table of expert loads of all runs, and the loads of every expert for the last one."""
    rows = [row for run in runs for row in expert_rows(run.name, run.experts)]
    heads = [
        *("run", "layer", "tokens with other experts than in the teacher"),
        *("teacher: busiest", "teacher: least busy", "run: busiest", "run: least busy"),
    ]
    last = [run for run in runs if run.experts.layers][-1]
    return [
        paragraph(
            "Tokens that each expert gets in the last validation, relative to the mean of its layer: 1 if all experts "
            "get the same number. Layers are numbered from 0."
        ),
        *(heatmap_table(heatmap) for heatmap in expert_heatmaps(last.name, last.experts)),
        element("h3", "Busiest and least busy expert, relative to the mean"),
        table(heads, rows),
    ]


def _count(value: float | None) -> str:
    return "not measured" if value is None else f"{value:,.0f}"
