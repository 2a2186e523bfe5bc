"""Write the report of one or several runs from one teacher: report.html, report.md, report.png, results.json.

Not included: information about the machine.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path

from megatron_qad.engine.run_directory import locks, manifest
from megatron_qad.report.collect import Inputs, Results, collect
from megatron_qad.report.heatmaps import weight_heatmaps
from megatron_qad.report.html_page.document import html
from megatron_qad.report.markdown import markdown
from megatron_qad.report.panels import training_panels, validation_panels
from megatron_qad.report.plot import write_png

DEFAULT_TITLE = "NVFP4 quantization: report"


def write_report(
    runs: Mapping[str, str | Path],
    teacher: str | Path,
    output: str | Path,
    title: str = DEFAULT_TITLE,
    inputs: Inputs | None = None,
    *,
    accept_gaps: bool = False,
) -> Results:
    """Write report.html, .md, .png and results.json into ``output`` (created if missing; replaces a report).

    torch.distributed must be initialized (``engine.distributed.init_process_group``).

    Args:
        runs: name -> directory, in the order of the table's rows; the others' KL is compared with that of the first.
        teacher: checkpoint directory of the BF16 teacher.
        inputs: evaluation records, exports, benchmarks and a sensitivity result to show; None: nothing.
        accept_gaps: turn damaged and missing event files into notes.

    Raises:
        QADError: a run without events, a damaged or missing event file, a damaged checkpoint, a teacher that is not a
            checkpoint, or a damaged file of ``inputs``.

    Example::

        init_process_group()  # megatron_qad.engine.distributed
        results = write_report({"PTQ": "runs/ptq", "QAD": "runs/qad"}, "checkpoints/teacher", "reports/qad")
        print(results.notes)
    """
    results = collect(runs, teacher, title, inputs, accept_gaps=accept_gaps)
    output = Path(output)
    with locks.lock_output(output):
        output.mkdir(parents=True, exist_ok=True)
        panels = [*training_panels(results.runs), *validation_panels(results.runs, results.comparison)]
        heatmaps = weight_heatmaps(results.linears, results.grid, results.runs)
        write_png(output / "report.png", results.title, panels, heatmaps)
        manifest.write_atomically(output / "report.md", markdown(results))
        manifest.write_atomically(output / "report.html", html(results))
        text = json.dumps(_to_json(results), indent=1, allow_nan=False)
        manifest.write_atomically(output / "results.json", f"{text}\n")
    return results


def _to_json(results: Results) -> dict:
    """Return ``results`` as JSON data with only the plotted curves; non-finite numbers become null."""
    runs = {}
    for run in results.runs:
        loss_name, loss = run.training_loss
        metrics = ("kl_to_teacher", "cross_entropy", "teacher_cross_entropy", "top1_agreement")
        runs[run.name] = {
            "directory": run.directory,
            "validation": run.validation,
            "num_iterations": run.num_iterations,
            "checkpoint_iteration": run.checkpoint_iteration,
            "job": run.job,
            "num_tokens": run.num_tokens,
            "seconds": run.seconds,
            "training_loss": {"name": loss_name, "curve": loss} if run.is_trained else None,
            "experts": {"layers": run.experts.layers},
            "advice": run.advice,
            "validation_curves": {metric: run.validation_curve(metric) for metric in metrics},
        }
    linears = [dataclasses.asdict(linear) for linear in results.linears]
    return _replace_non_finite(
        {
            "title": results.title,
            "teacher": results.teacher,
            "model": results.model,
            "runs": runs,
            "linears": linears,
            "evaluation": results.comparison,
            "exports": [dataclasses.asdict(export) for export in results.exports],
            "sizes": [
                {"runs": policy.runs, "bytes_before": policy.bytes_before, "bytes_after": policy.bytes_after}
                for policy in results.policies
            ],
            "sensitivity": results.sensitivity,
            "benchmarks": None if results.benchmarks is None else results.benchmarks.record(),
            "notes": results.notes,
        }
    )


def _replace_non_finite(value):
    """Replace non-finite floats with None, recursively."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _replace_non_finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_replace_non_finite(item) for item in value]
    return value
