"""Everything that a report says, read and measured from what the runs left behind: events, qad.json, checkpoints.

Runs no model. What a run did not leave becomes a note in words.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_qad.engine.errors import QADError
from megatron_qad.engine.run_directory.iterations import smoothing_record
from megatron_qad.models.checkpoint_config import read_config
from megatron_qad.models.families import family_of, text_config
from megatron_qad.report.runs import Run
from megatron_qad.report.weight_errors import LinearError, have_same_linears, linear_errors, untied_linears

# Two means of the teacher's cross entropy closer than this (relative) count as one: on the same tokens they are equal
# bits in the same parallel layout, and in another a BF16 logit moves by some 1e-2 at random, which over 20,000 tokens
# and beside a mean of 3 nats leaves 2e-5.
_SAME_TOKENS = 2e-5


@dataclass
class Results:
    """Everything that the report says."""

    title: str
    teacher: str
    """As the user wrote it."""
    model: dict
    """Facts of the teacher's config: architecture, sizes, number of weights."""
    runs: list[Run]
    linears: list[LinearError]
    """Empty if no run says which linears are NVFP4."""
    notes: list[str]
    """What is missing, or what a reader must know to compare; sentences."""


def collect(runs: Mapping[str, str | Path], teacher: str | Path, title: str, *, accept_gaps: bool = False) -> Results:
    """Read and measure everything, write nothing. Arguments and errors as for ``write_report``."""
    if not runs:
        raise QADError("a report needs at least one run: --run NAME=DIR")
    config = read_config(teacher)
    read = [Run.read(name, directory, accept_gaps) for name, directory in runs.items()]
    notes = [note for run in read for note in _notes_of(run)] + _comparison_notes(read)
    formats, checkpoints, rules = {}, {}, {}
    for run in read:
        if run.job is None:
            continue
        if not have_same_linears(read_config(run.directory), config):
            notes.append(f"{run.name}: its model has other layers than the teacher; its weights are not compared.")
            continue
        if smoothing_record(run.directory) != smoothing_record(teacher):
            notes.append(
                f"{run.name}: its weights and the teacher's are not smoothed alike (tools/smooth.py), so they are not "
                "compared."
            )
            continue
        formats[run.name] = run.job["formats"]
        rules[run.name] = run.job.get("scale_rule", "max")
        if run.checkpoint_iteration is not None:
            checkpoints[run.name] = run.directory
    if not formats:
        notes.append("No run says which linears are quantized, so no weight error is reported.")
    linears = linear_errors(teacher, formats, checkpoints, rules) if formats else []
    return Results(title, str(teacher), _model_facts(config), read, linears, notes)


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


def _notes_of(run: Run) -> list[str]:
    """What one run lacks, or what in it does not belong together."""
    notes = list(run.event_notes)
    evaluated = run.validation.get("iteration")
    if evaluated is None:
        notes.append("no evaluation is recorded (--eval-iters 0, or no validation part in --split).")
    else:
        if "kl_to_teacher" not in run.validation:
            notes.append("evaluated without a teacher, so KL and agreement are not measured.")
        if evaluated < run.num_iterations:
            notes.append(f"its last evaluation is of iteration {evaluated}, training went on to {run.num_iterations}.")
    if run.has_no_counted_tokens:
        notes.append("no token counted in its last evaluation, so nothing was measured (null in results.json).")
    elif bad := [name for name, value in run.validation.items() if not math.isfinite(value)]:
        notes.append(f"not finite in the last evaluation: {', '.join(bad)} (null in results.json).")
    if run.job is None:
        notes.append("no qad.json, so its policy and its NVFP4 linears are not known.")
    if run.checkpoint_iteration is None:
        notes.append("no saved checkpoint, so its weights' distance and input amaxes are left out.")
    elif evaluated is not None and run.checkpoint_iteration != str(evaluated):
        notes.append(f"its checkpoint is of iteration {run.checkpoint_iteration}, its last evaluation of {evaluated}.")
    return [f"{run.name}: {note}" for note in notes]


def _comparison_notes(runs: list[Run]) -> list[str]:
    """Whether the rows of the table were measured on the same held-out tokens."""
    tokens = {run.validation["num_tokens"] for run in runs if run.validation.get("num_tokens")}
    entropies = [run.validation["teacher_cross_entropy"] for run in runs if "teacher_cross_entropy" in run.validation]
    entropies = [entropy for entropy in entropies if math.isfinite(entropy)]
    if len(tokens) > 1:
        return [
            "The runs were evaluated on different numbers of held-out tokens (other data, --split, --seq-length or "
            "--eval-iters): compare them with care."
        ]
    if entropies and max(entropies) - min(entropies) > _SAME_TOKENS * abs(max(entropies)):
        return [
            "The teacher's cross entropy differs between the runs, so that they were evaluated on different held-out "
            "tokens (other data, --split or --seq-length; with the same ones every evaluation reads the same tokens) "
            "or beside different teachers. Compare them with care."
        ]
    return []
