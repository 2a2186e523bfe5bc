"""Text of a comparison of evaluations: tables in Markdown."""

from collections.abc import Mapping, Sequence

from megatron_qad.evaluation.bootstrap import FEW_ROWS

_METRICS = {
    "cross_entropy": ("cross entropy", ".4f"),
    "entropy": ("entropy", ".4f"),
    "top1_agreement": ("top-1 agreement", ".2%"),
    "top5_agreement": ("top-5 agreement", ".2%"),
}


def markdown(comparison: Mapping, level: int = 1) -> str:
    """Return the contents of comparison.md, from those of comparison.json.

    Args:
        level: of the first heading; the others are one level below it.
    """
    evaluations, base = comparison["evaluations"], comparison["baseline"]
    below = "#" * (level + 1)
    parts = [
        f"{'#' * level} Evaluation",
        f"{comparison['num_tokens']:,} counted tokens of {comparison['num_rows']:,} rows, the same for all. KL, cross "
        "entropy and entropy are in nats per token. Brackets: 95 % intervals from "
        f"{comparison['num_samples']:,} draws of rows.",
        _means(evaluations),
        _teacher_line(evaluations[0]),
    ]
    if comparison["num_rows"] < FEW_ROWS:
        parts.append(
            f"With {comparison['num_rows']} rows the intervals are rough and usually too narrow. Evaluate on more text."
        )
    parts += map(_escape, comparison["notes"])
    if others := [e for e in evaluations if e["name"] != base]:
        parts += [f"{below} Differences to {_escape(base)}", _differences(others, base)]
    parts += [f"{below} KL by percentile of tokens", _percentiles(evaluations)]
    for kind, counts in comparison["groups"].items():
        parts += [f"{below} KL by {'position' if kind == 'position' else 'class of the token'}"]
        parts += [_groups(evaluations, kind, counts)]
    for evaluation in evaluations:
        if evaluation["worst"] and evaluation["worst"][0]["kl"] > 0:
            parts += [f"{below} Tokens with the largest KL: {_escape(evaluation['name'])}", _worst(evaluation["worst"])]
    return "\n\n".join(parts) + "\n"


def _means(evaluations: Sequence[Mapping]) -> str:
    rows = [
        [e["name"], e["formats"], interval(e["means"]["kl_to_teacher"], ".4g")]
        + [interval(e["means"][metric], spec) for metric, (_, spec) in _METRICS.items()]
        for e in evaluations
    ]
    return table(["model", "linears", "KL to teacher", *(head for head, _ in _METRICS.values())], rows, left=2)


def _teacher_line(evaluation: Mapping) -> str:
    means = evaluation["means"]
    return (
        f"The teacher's cross entropy is {means['teacher_cross_entropy']['value']:.4f}, its entropy "
        f"{means['teacher_entropy']['value']:.4f}."
    )


def _differences(evaluations: Sequence[Mapping], base: str) -> str:
    rows = []
    for e in evaluations:
        cells = [interval(e["differences"]["kl_to_teacher"], "+.4g")]
        cells += ["-" if e["kl_ratio"] is None else interval(e["kl_ratio"], ".3f")]
        cells += [interval(e["differences"][metric], f"+{spec}") for metric, (_, spec) in _METRICS.items()]
        rows.append([e["name"], *cells])
    return table(["model", "KL", f"KL / {base}'s", *(head for head, _ in _METRICS.values())], rows, left=1)


def _percentiles(evaluations: Sequence[Mapping]) -> str:
    heads = [name if name == "max" else f"{name} %" for name in evaluations[0]["kl_percentiles"]]
    rows = [[e["name"], *(f"{value:.4g}" for value in e["kl_percentiles"].values())] for e in evaluations]
    return table(["model", *heads], rows, left=1)


def _groups(evaluations: Sequence[Mapping], kind: str, counts: Mapping[str, int]) -> str:
    rows = [
        [name, f"{count:,}", *(f"{e[f'kl_by_{kind}'][name]:.4g}" for e in evaluations)]
        for name, count in counts.items()
    ]
    return table([kind, "tokens", *(e["name"] for e in evaluations)], rows, left=1)


def _worst(tokens: Sequence[Mapping]) -> str:
    rows = [
        [
            f"{t['kl']:.3g}",
            f"{t['row']}:{t['column']}",
            *(repr(t[k]) for k in ("context", "token", "teacher", "student")),
        ]
        for t in tokens
    ]
    return table(["KL", "row:column", "text before", "token", "teacher's first", "student's first"], rows, left=6)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> str:
    """Return a Markdown table; the first ``left`` columns are left-aligned, the others right-aligned."""
    rule = ["---" if i < left else "---:" for i in range(len(heads))]
    return "\n".join("| " + " | ".join(map(_escape, row)) + " |" for row in (heads, rule, *rows))


def interval(value: Mapping, spec: str) -> str:
    """Return a value with its interval in brackets, from ``Interval.record``."""
    text = format(value["value"], spec)
    if value["low"] is None:
        return text
    return f"{text} [{format(value['low'], spec)}, {format(value['high'], spec)}]"


def _escape(text: str) -> str:
    """Return the text on one line, with ``|`` escaped for table cells."""
    return " ".join(str(text).split()).replace("|", "\\|")
