"""Collect the contents of a run report from the runs' event files, qad.json and checkpoints.

Runs no model. Missing files of a run become notes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_qad.engine.errors import QADError
from megatron_qad.engine.run_directory.iterations import smoothing_record
from megatron_qad.engine.run_directory.run_files import JOB_FILE
from megatron_qad.models.checkpoint_config import read_config
from megatron_qad.models.families import family_of, text_config
from megatron_qad.quantization.scale_record import recorded_scales
from megatron_qad.report.compared_benchmarks import Benchmarks, compare_results
from megatron_qad.report.compared_records import compare_records
from megatron_qad.report.exports import Export, read_export
from megatron_qad.report.linear_grid import LinearGrid, linear_grid
from megatron_qad.report.run_policies import RunPolicy, run_policies
from megatron_qad.report.runs import Run
from megatron_qad.report.sensitivity_file import read_sensitivity
from megatron_qad.report.weight_errors import LinearError, have_same_linears, linear_errors, untied_linears

# Relative tolerance within which two means of the teacher's cross entropy are taken to be over the same tokens. At the
# same parallelism they are bitwise equal. With another, BF16 logits change by about 1e-2 at random, which over 20,000
# tokens and relative to a mean of 3 nats is 2e-5.
_CROSS_ENTROPY_TOLERANCE = 2e-5


@dataclass
class Results:
    """Contents of a run report."""

    title: str
    teacher: str
    """Path of the teacher's checkpoint as given by the user."""
    model: dict
    """Properties of the teacher's config: architecture, sizes, number of weights."""
    runs: list[Run]
    linears: list[LinearError]
    """Weight errors of the quantized linears; empty if no run has a qad.json."""
    notes: list[str]
    """Sentences about missing data and about limits of the comparison."""
    policies: list[RunPolicy] = field(default_factory=list)
    grid: LinearGrid | None = None
    """Places of ``linears``."""
    comparison: dict | None = None
    """Comparison of evaluation records (``evaluation.comparison``); None if none was given."""
    exports: list[Export] = field(default_factory=list)
    sensitivity: dict | None = None
    """Contents of sensitivity.json; None if it was not given."""
    benchmarks: Benchmarks | None = None


@dataclass(frozen=True)
class Inputs:
    """What a report may show besides the runs."""

    evaluations: Sequence[str] = ()
    """Evaluation records: RECORD or NAME=RECORD."""
    tokenizer: str | None = None
    """Hugging Face directory for the texts of tokens. None: that of the teacher."""
    exports: Sequence[str] = ()
    """Exported directories."""
    sensitivity: str | None = None
    """Output directory of megatron-qad sensitivity, or its sensitivity.json."""
    benchmarks: Sequence[str] = ()
    """Benchmark results, NAME=RESULTS with the teacher first."""


def collect(
    runs: Mapping[str, str | Path],
    teacher: str | Path,
    title: str,
    inputs: Inputs | None = None,
    *,
    accept_gaps: bool = False,
) -> Results:
    """Read and measure everything; write nothing. Arguments and errors as in ``write_report``."""
    if not runs:
        raise QADError("a report needs at least one run. Give --run NAME=DIR.")
    config = read_config(teacher)
    loaded_runs = [Run.read(name, directory, accept_gaps) for name, directory in runs.items()]
    notes = [note for run in loaded_runs for note in _run_notes(run)] + _comparison_notes(loaded_runs)
    formats, checkpoints, scales = {}, {}, {}
    for run in loaded_runs:
        if run.job is None:
            continue
        if not have_same_linears(read_config(run.directory), config):
            notes.append(
                f"{run.name}: its linears differ from the teacher's in names or shapes, so weights are not compared."
            )
            continue
        if smoothing_record(run.directory) != smoothing_record(teacher):
            notes.append(
                f"{run.name}: its weights are smoothed differently from the teacher's (megatron-qad smooth), so "
                "weights are not compared."
            )
            continue
        formats[run.name] = run.job["formats"]
        scales[run.name] = recorded_scales(run.job, str(Path(run.directory) / JOB_FILE))
        if run.checkpoint_iteration is not None:
            checkpoints[run.name] = run.directory
    if not formats:
        notes.append("No run has a qad.json with its quantized linears, so no weight errors are reported.")
    linears = linear_errors(teacher, formats, checkpoints, scales) if formats else []
    inputs = inputs or Inputs()
    measured = {linear.name for linear in linears}
    grid = linear_grid(linear for linear in untied_linears(config) if linear.megatron in measured) if measured else None
    tokenizer = inputs.tokenizer or Path(teacher) / "hf"
    return Results(
        title,
        str(teacher),
        _model_facts(config),
        loaded_runs,
        linears,
        notes,
        run_policies(loaded_runs),
        grid,
        compare_records(inputs.evaluations, tokenizer, inputs.tokenizer is not None, notes),
        [read_export(directory) for directory in inputs.exports],
        None if inputs.sensitivity is None else read_sensitivity(inputs.sensitivity),
        compare_results(inputs.benchmarks),
    )


def _model_facts(config: dict) -> dict:
    text = text_config(config)
    return {
        "architecture": config["architectures"][0],
        "num_hidden_layers": text.get("num_hidden_layers"),
        "hidden_size": text.get("hidden_size"),
        "vocab_size": text.get("vocab_size"),
        "num_weights": sum(math.prod(tensor.shape) for tensor in family_of(config).all_tensors(config)),
        "num_linears": len(untied_linears(config)),
    }


def _run_notes(run: Run) -> list[str]:
    """Return notes about missing or inconsistent data of one run."""
    notes = list(run.event_notes)
    evaluated_iteration = run.validation.get("iteration")
    if evaluated_iteration is None:
        notes.append("no evaluation is recorded (--eval-iters 0, or no validation share in --split).")
    else:
        if "kl_to_teacher" not in run.validation:
            notes.append("evaluated without a teacher, so KL and agreement were not measured.")
        if evaluated_iteration < run.num_iterations:
            notes.append(
                f"its last evaluation is at iteration {evaluated_iteration}, but training continued to iteration "
                f"{run.num_iterations}."
            )
    if run.has_no_counted_tokens:
        notes.append("no token counted in its last evaluation, so no metric was measured (null in results.json).")
    elif bad := [name for name, value in run.validation.items() if not math.isfinite(value)]:
        notes.append(f"not finite in the last evaluation: {', '.join(bad)} (null in results.json).")
    if run.job is None:
        notes.append("no qad.json, so its policy and quantized linears are unknown.")
    if run.checkpoint_iteration is None:
        notes.append("no saved checkpoint, so weight distances and input amaxes are omitted.")
    elif evaluated_iteration is not None and run.checkpoint_iteration != str(evaluated_iteration):
        notes.append(
            f"its checkpoint is of iteration {run.checkpoint_iteration}, its last evaluation of {evaluated_iteration}."
        )
    return [f"{run.name}: {note}" for note in notes]


def _comparison_notes(runs: list[Run]) -> list[str]:
    """Return a note if the runs were not evaluated on the same held-out tokens."""
    tokens = {run.validation["num_tokens"] for run in runs if run.validation.get("num_tokens")}
    entropies = [run.validation["teacher_cross_entropy"] for run in runs if "teacher_cross_entropy" in run.validation]
    entropies = [entropy for entropy in entropies if math.isfinite(entropy)]
    if len(tokens) > 1:
        return [
            "The runs were evaluated on different numbers of held-out tokens (different data, --split, --seq-length or "
            "--eval-iters). Compare them with care."
        ]
    if entropies and max(entropies) - min(entropies) > _CROSS_ENTROPY_TOLERANCE * abs(max(entropies)):
        return [
            "The teacher's cross entropy differs between the runs, so they were evaluated on different held-out tokens "
            "(different data, --split or --seq-length; otherwise every evaluation reads the same tokens) or with "
            "different teachers. Compare them with care."
        ]
    return []
