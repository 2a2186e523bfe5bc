"""The report of one or several runs from one teacher: report.md, report.png and results.json in a directory.

Left out: benchmarks, and anything about the machine.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path

from megatron_qad.engine.run_directory import locks
from megatron_qad.report.collect import Results, collect
from megatron_qad.report.markdown import markdown
from megatron_qad.report.plot import write_png

DEFAULT_TITLE = "NVFP4 quantization: report"


def write_report(
    runs: Mapping[str, str | Path],
    teacher: str | Path,
    output: str | Path,
    title: str = DEFAULT_TITLE,
    *,
    accept_gaps: bool = False,
) -> Results:
    """Write report.md, report.png and results.json into ``output`` (made if need be; an earlier report is replaced).

    torch.distributed must be initialized (``engine.distributed.init_process_group``).

    Args:
        runs: name -> directory, in the order of the table's rows; the first is what the others' KL is compared with.
        teacher: checkpoint directory of the BF16 teacher.
        accept_gaps: damaged and missing event files become notes.

    Raises:
        QADError: a run without events, a damaged or missing event file, a damaged checkpoint, a teacher that is no
            checkpoint.
    """
    results = collect(runs, teacher, title, accept_gaps=accept_gaps)
    output = Path(output)
    with locks.lock_output(output):
        output.mkdir(parents=True, exist_ok=True)
        write_png(output / "report.png", results.title, results.runs, results.linears)
        (output / "report.md").write_text(markdown(results))
        (output / "results.json").write_text(json.dumps(_plain(results), indent=1, allow_nan=False) + "\n")
    return results


def _plain(results: Results) -> dict:
    """``results`` as JSON knows it: numbers that are not finite become null, of the scalars only the drawn curves."""
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
            "training_loss": {"name": loss_name, "curve": loss} if run.is_trained else None,
            "experts": {"layers": run.experts.layers, "few_tokens": run.experts.few_tokens},
            "validation_curves": {metric: run.validation_curve(metric) for metric in metrics},
        }
    linears = [dataclasses.asdict(linear) for linear in results.linears]
    return _finite(
        {
            "title": results.title,
            "teacher": results.teacher,
            "model": results.model,
            "runs": runs,
            "linears": linears,
            "notes": results.notes,
        }
    )


def _finite(value):
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
