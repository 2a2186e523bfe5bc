"""The report's text: tables and notes in Markdown. It formats numbers and computes none but ratios and counts."""

import math
from collections import Counter
from collections.abc import Sequence

from megatron_qad.report.collect import Results
from megatron_qad.report.expert_table import expert_rows
from megatron_qad.report.runs import Run
from megatron_qad.report.weight_errors import LinearError

NUM_WORST = 10


def markdown(results: Results) -> str:
    """The whole of report.md, newline at the end."""
    parts = [f"# {_text(results.title)}", _model(results), "## Held-out text", _validation_table(results.runs)]
    parts += [
        "KL(teacher || student) and cross entropies in nats per token, agreement: share of tokens on which teacher and "
        "student have the same most likely token; each weighted by tokens, from the last evaluation of the run.",
        "![curves and weight errors](report.png)",
        "## Jobs",
        _job_table(results.runs),
        "A linear is one of Megatron's weights: q, k, v are one, gate and up are one. Formats are those that the job "
        "resolved from its policy and its added rules.",
    ]
    if any(run.experts.layers or run.experts.few_tokens for run in results.runs):
        parts += ["## Experts", *_experts(results.runs)]
    if results.linears:
        parts += ["## Weights", *_weights(results)]
    if results.notes:
        parts += ["## Notes", "\n".join(f"- {_text(note)}" for note in results.notes)]
    return "\n\n".join(parts) + "\n"


def _model(results: Results) -> str:
    model = results.model
    return (
        f"Teacher `{results.teacher}`: {model['architecture']}, {model['num_hidden_layers']} blocks, hidden size "
        f"{model['hidden_size']}, vocabulary {model['vocab_size']:,}, {_count(model['num_weights'])} weights in BF16."
    )


def _validation_table(runs: Sequence[Run]) -> str:
    first = runs[0]
    base = first.validation.get("kl_to_teacher")
    against = base is not None and math.isfinite(base) and base > 0 and len(runs) > 1
    heads = ["run", "KL to teacher", *([f"KL / {first.name}'s"] if against else [])]
    heads += ["cross entropy", "teacher's cross entropy", "top-1 agreement", "held-out tokens", "training iterations"]
    rows = []
    for run in runs:
        get = run.validation.get
        kl = get("kl_to_teacher")

        def cell(value: float | None, spec: str, run: Run = run) -> str:
            return "no token counted" if run.has_no_counted_tokens and value is not None else _number(value, spec)

        row = [run.name, cell(kl, ".4g")]
        if against:
            row.append(cell(None if kl is None else kl / base, ".3f"))
        row += [
            cell(get("cross_entropy"), ".4f"),
            cell(get("teacher_cross_entropy"), ".4f"),
            cell(get("top1_agreement"), ".2%"),
            _number(get("num_tokens"), ",.0f"),
            f"{run.num_iterations:,}" if run.is_trained else "none",
        ]
        rows.append(row)
    return _table(heads, rows, left=1)


def _job_table(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        if run.job is None:
            rows.append([run.name, *["not known"] * 4])
            continue
        counts = Counter(fmt for fmt in run.job["formats"].values() if fmt != "bf16")
        rules = ", ".join(f"`{rule}`" for rule in run.job.get("rules") or []) or "none"
        loss = {"kl": "KL to the teacher", "ce": "cross entropy"}.get(run.job.get("loss"), str(run.job.get("loss")))
        if not run.is_trained:
            loss = "not trained"
        number = ", ".join(f"{n} {fmt}" for fmt, n in counts.items()) or "none"
        number += f" of {len(run.job['formats'])}"
        rows.append([run.name, f"`{run.job.get('policy')}`", rules, loss, number])
    return _table(["run", "policy", "added rules", "training loss", "quantized linears"], rows, left=4)


def _experts(runs: Sequence[Run]) -> list[str]:
    """Load against the teacher's, and which experts calibration hardly reached."""
    rows = [row for run in runs for row in expert_rows(run.name, run.experts)]
    heads = [
        "run",
        "layer",
        "tokens whose experts changed",
        "teacher's busiest",
        "teacher's idlest",
        "busiest",
        "idlest",
    ]
    parts = []
    if rows:
        parts = [
            "Of the tokens of the last evaluation: how many went to other experts than the teacher's, and the load of "
            "the busiest and of the idlest expert over the mean load of the layer.",
            _table(heads, rows, left=1),
        ]
    for run in runs:
        if few := run.experts.few_tokens:
            fewest = sorted(few, key=lambda name: few[name]["tokens"])[:NUM_WORST]
            named = ", ".join(f"`{name}` ({few[name]['tokens']} tokens)" for name in fewest)
            parts.append(
                f"{_text(run.name)}: {len(few)} linears of experts saw too few tokens in calibration and took the "
                f"largest input amax of their layer's experts; the fewest: {named}."
            )
    return parts


def _weights(results: Results) -> list[str]:
    """What the columns mean, the worst linears, and which runs are left out."""
    linears = results.linears
    measured = [run.name for run in results.runs if any(run.name in linear.runs for linear in linears)]
    errors = [linear.ptq_error for linear in linears]
    intro = (
        "Weight errors are ||fake_quant(W) - W|| / ||W|| of the teacher's weight W, which is what post-training "
        f"quantization does to it: {min(errors):.2%} to {max(errors):.2%} over {len(linears)} quantized linears. "
    )
    if measured:
        intro += (
            f"Under {', '.join(map(_text, measured))}: ||W_run - W|| / ||W||, the distance of the run's quantized "
            f"weight from the teacher's. Input amaxes are those that {_text(measured[0])} calibrated."
        )
    else:
        intro += "No run has a checkpoint that could be compared: distances and input amaxes are left out."
    worst = sorted(linears, key=lambda linear: -linear.ptq_error)[:NUM_WORST]
    return [intro, f"The {len(worst)} largest errors; all are in results.json.", _weights_table(worst, measured)]


def _weights_table(linears: Sequence[LinearError], measured: Sequence[str]) -> str:
    heads = ["linear", "shape", "PTQ error", *measured, *(["input amax"] if measured else [])]
    rows = []
    for linear in linears:
        row = [
            f"`{linear.name.removesuffix('.weight')}`",
            " x ".join(map(str, linear.shape)),
            f"{linear.ptq_error:.2%}",
        ]
        of_runs = [linear.runs.get(run) for run in measured]
        row += ["not quantized" if weight is None else f"{weight.distance:.2%}" for weight in of_runs]
        if measured:
            row.append("not saved" if of_runs[0] is None else _number(of_runs[0].input_amax, ".4g"))
        rows.append(row)
    return _table(heads, rows, left=1)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> str:
    """A Markdown table whose first ``left`` columns are text and the others numbers, aligned right."""
    rule = ["---" if i < left else "---:" for i in range(len(heads))]
    return "\n".join("| " + " | ".join(map(_text, row)) + " |" for row in (heads, rule, *rows))


def _text(text: str) -> str:
    """One line that breaks no table."""
    return " ".join(str(text).split()).replace("|", "\\|")


def _number(value: float | None, spec: str) -> str:
    if value is None:
        return "not measured"
    return format(value, spec) if math.isfinite(value) else str(value)


def _count(number: int) -> str:
    """135,000,000 -> "135 M"; below a million all digits."""
    for size, letter in ((10**9, "B"), (10**6, "M")):
        if number >= size:
            return f"{number / size:.4g} {letter}"
    return f"{number:,}"
