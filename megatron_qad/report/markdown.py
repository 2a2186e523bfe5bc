"""Text of a run report: tables and notes in Markdown. Apart from ratios and counts, it only formats numbers."""

import math
import shlex
from collections import Counter
from collections.abc import Sequence

from megatron_qad.evaluation import benchmark_comparison, comparison_tables
from megatron_qad.report.collect import Results
from megatron_qad.report.expert_table import expert_rows
from megatron_qad.report.exports import Export
from megatron_qad.report.runs import Run
from megatron_qad.report.weight_errors import LinearError

NUM_WORST = 10


def markdown(results: Results) -> str:
    """Return the contents of report.md."""
    parts = [f"# {_escape(results.title)}", _model_line(results), "## Held-out text", _validation_table(results.runs)]
    parts += [
        "KL(teacher || student) and cross entropies are in nats per token. Agreement is the share of tokens on which "
        "teacher and student have the same most likely token. Each value is a mean over tokens from the run's last "
        "evaluation.",
        "![curves and weight errors](report.png)",
        "## Jobs",
        _job_table(results.runs),
        "A linear is one of Megatron's weights: q, k and v are one weight, gate and up are one weight. Formats are "
        "those that the job resolved from its policy and added rules.",
    ]
    if any(run.experts.layers for run in results.runs):
        parts += ["## Experts", *_experts_section(results.runs)]
    if results.linears:
        parts += ["## Weights", *_weights_section(results)]
    if results.exports:
        parts += ["## Exports", "\n".join(_export_line(export) for export in results.exports)]
    if results.comparison is not None:
        parts.append(comparison_tables.markdown(results.comparison, level=2).rstrip())
    if results.benchmarks is not None:
        compared, teacher = results.benchmarks.compared, results.benchmarks.teacher
        parts += ["## Benchmarks", benchmark_comparison.report(compared, teacher, None).rstrip()]
    if results.notes:
        parts += ["## Notes", "\n".join(f"- {_escape(note)}" for note in results.notes)]
    return "\n\n".join(parts) + "\n"


def _export_line(export: Export) -> str:
    return (
        f"- iteration {export.iteration} of {_escape(export.checkpoint)}, layout {export.layout}, "
        f"{export.num_bytes:,} bytes of weights: `{shlex.join(export.command)}`"
    )


def _model_line(results: Results) -> str:
    model = results.model
    return (
        f"Teacher `{results.teacher}`: {model['architecture']}, {model['num_hidden_layers']} blocks, hidden size "
        f"{model['hidden_size']}, vocabulary {model['vocab_size']:,}, "
        f"{format_count(model['num_weights'])} weights in BF16."
    )


def _validation_table(runs: Sequence[Run]) -> str:
    first = runs[0]
    base = first.validation.get("kl_to_teacher")
    has_ratio = base is not None and math.isfinite(base) and base > 0 and len(runs) > 1
    heads = ["run", "KL to teacher", *([f"KL / {first.name}'s"] if has_ratio else [])]
    heads += ["cross entropy", "teacher's cross entropy", "top-1 agreement", "held-out tokens", "training iterations"]
    rows = []
    for run in runs:
        get = run.validation.get
        kl = get("kl_to_teacher")

        def cell(value: float | None, spec: str, run: Run = run) -> str:
            return (
                "no token counted" if run.has_no_counted_tokens and value is not None else _format_number(value, spec)
            )

        row = [run.name, cell(kl, ".4g")]
        if has_ratio:
            row.append(cell(None if kl is None else kl / base, ".3f"))
        row += [
            cell(get("cross_entropy"), ".4f"),
            cell(get("teacher_cross_entropy"), ".4f"),
            cell(get("top1_agreement"), ".2%"),
            _format_number(get("num_tokens"), ",.0f"),
            f"{run.num_iterations:,}" if run.is_trained else "none",
        ]
        rows.append(row)
    return _table(heads, rows, left=1)


def _job_table(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        if run.job is None:
            rows.append([run.name, *["unknown"] * 4])
            continue
        counts = Counter(fmt for fmt in run.job["formats"].values() if fmt != "bf16")
        rules = ", ".join(f"`{rule}`" for rule in run.job.get("rules") or []) or "none"
        loss = {"kl": "KL to the teacher", "ce": "cross entropy"}.get(run.job.get("loss"), str(run.job.get("loss")))
        if not run.is_trained:
            loss = "not trained"
        num_linears = ", ".join(f"{n} {fmt}" for fmt, n in counts.items()) or "none"
        num_linears += f" of {len(run.job['formats'])}"
        rows.append([run.name, f"`{run.job.get('policy')}`", rules, loss, num_linears])
    return _table(["run", "policy", "added rules", "training loss", "quantized linears"], rows, left=4)


def _experts_section(runs: Sequence[Run]) -> list[str]:
    """Return the table of expert loads."""
    rows = [row for run in runs for row in expert_rows(run.name, run.experts)]
    heads = [
        "run",
        "layer",
        "tokens whose experts changed",
        "teacher: busiest",
        "teacher: least busy",
        "busiest",
        "least busy",
    ]
    return [
        "For the tokens of the last evaluation: the share that was routed to other experts than in the teacher, and "
        "the load of the busiest and the least busy expert relative to the mean load of the layer.",
        _table(heads, rows, left=1),
    ]


def _weights_section(results: Results) -> list[str]:
    """Return the explanation of the columns and the table of the linears with the largest errors."""
    linears = results.linears
    measured = [run.name for run in results.runs if any(run.name in linear.runs for linear in linears)]
    errors = [linear.ptq_error for linear in linears]
    intro = (
        "The PTQ error of a teacher weight W is ||fake_quant(W) - W|| / ||W||: "
        f"{min(errors):.2%} to {max(errors):.2%} over {len(linears)} quantized linears. "
    )
    if measured:
        intro += (
            f"Columns {', '.join(map(_escape, measured))}: ||W_run - W|| / ||W||, the distance of the run's quantized "
            f"weight from the teacher's. Input amaxes are from the calibration of {_escape(measured[0])}."
        )
    else:
        intro += "No run has a comparable checkpoint, so distances and input amaxes are omitted."
    worst = sorted(linears, key=lambda linear: -linear.ptq_error)[:NUM_WORST]
    return [
        intro,
        f"The {len(worst)} linears with the largest errors; results.json has all of them.",
        _weights_table(worst, measured),
    ]


def _weights_table(linears: Sequence[LinearError], measured: Sequence[str]) -> str:
    heads = ["linear", "shape", "PTQ error", *measured, *(["input amax"] if measured else [])]
    rows = []
    for linear in linears:
        row = [
            f"`{linear.name.removesuffix('.weight')}`",
            " x ".join(map(str, linear.shape)),
            f"{linear.ptq_error:.2%}",
        ]
        run_weights = [linear.runs.get(run) for run in measured]
        row += ["not quantized" if weight is None else f"{weight.distance:.2%}" for weight in run_weights]
        if measured:
            row.append("not saved" if run_weights[0] is None else _format_number(run_weights[0].input_amax, ".4g"))
        rows.append(row)
    return _table(heads, rows, left=1)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> str:
    """Return a Markdown table; the first ``left`` columns are left-aligned, the others right-aligned."""
    rule = ["---" if i < left else "---:" for i in range(len(heads))]
    return "\n".join("| " + " | ".join(map(_escape, row)) + " |" for row in (heads, rule, *rows))


def _escape(text: str) -> str:
    """Return the text on one line, with ``|`` escaped for table cells."""
    return " ".join(str(text).split()).replace("|", "\\|")


def _format_number(value: float | None, spec: str) -> str:
    if value is None:
        return "not measured"
    return format(value, spec) if math.isfinite(value) else str(value)


def format_count(count: int) -> str:
    """Format 135,000,000 as "135 M" and counts below a million with all digits."""
    for size, letter in ((10**9, "B"), (10**6, "M")):
        if count >= size:
            return f"{count / size:.4g} {letter}"
    return f"{count:,}"
