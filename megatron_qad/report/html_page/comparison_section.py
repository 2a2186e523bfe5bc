"""Comparison of models token by token, from evaluation records: means, differences, percentiles, positions, classes."""

from collections.abc import Mapping, Sequence

from megatron_qad.evaluation.bootstrap import FEW_ROWS
from megatron_qad.report.html_page.markup import Content, Markup, element, paragraph, table
from megatron_qad.report.html_page.svg_figure import VARIABLES, panel_grid
from megatron_qad.report.panels import RUN_COLORS, Panel, Series

METRICS = (
    ("kl_to_teacher", "KL to the teacher", ".4g"),
    ("cross_entropy", "cross entropy", ".4f"),
    ("entropy", "entropy", ".4f"),
    ("top1_agreement", "top-1 agreement", ".2%"),
    ("top5_agreement", "top-5 agreement", ".2%"),
)
"""Metric of a record, its name for readers, format."""
_BAR_PIXELS = 110


def comparison_section(comparison: Mapping, colors: Mapping[str, str]) -> list[Markup]:
    """Return tables and panels of a comparison.

    Args:
        comparison: from ``evaluation.comparison.compare``.
        colors: of the runs with the same names; other models get the remaining colors.
    """
    evaluations, base = comparison["evaluations"], comparison["baseline"]
    colors = _all_colors(evaluations, colors)
    means = evaluations[0]["means"]
    parts = [
        paragraph(
            f"{comparison['num_tokens']:,} held-out tokens in {comparison['num_rows']:,} rows of text, the same for "
            "every model. KL, cross entropy and entropy are in nats per token. Below each value: its 95 % interval "
            f"from {comparison['num_samples']:,} draws of rows. The teacher's cross entropy is "
            f"{means['teacher_cross_entropy']['value']:.4f}, its entropy {means['teacher_entropy']['value']:.4f}."
        ),
        *_few_rows(comparison),
        *(paragraph(note, class_="note") for note in comparison["notes"]),
        _means(evaluations),
    ]
    if others := [one for one in evaluations if "differences" in one]:
        parts += [
            element("h3", f"Differences from {base}"),
            _differences(others, base),
            paragraph(
                f"Paired: the same draws of text for both models. Bold: the interval excludes 0, so the difference "
                f"from {base} is not due to the choice of text.",
                class_="note",
            ),
        ]
    parts += [element("h3", "Where the KL comes from"), _percentiles(evaluations)]
    parts.append(panel_grid(_panels(comparison, colors), "kl"))
    if "class" in comparison["groups"]:
        parts += [element("h3", "KL by class of the predicted token"), _classes(comparison, colors)]
    return parts


def _all_colors(evaluations: Sequence[Mapping], colors: Mapping[str, str]) -> dict[str, str]:
    free = [color for color in RUN_COLORS if color not in colors.values()] or list(RUN_COLORS)
    unknown = [one["name"] for one in evaluations if one["name"] not in colors]
    return dict(colors) | {name: free[i % len(free)] for i, name in enumerate(unknown)}


def _few_rows(comparison: Mapping) -> list[Markup]:
    if comparison["num_rows"] >= FEW_ROWS:
        return []
    return [
        paragraph(
            f"With {comparison['num_rows']} rows the intervals are rough and usually too narrow. Evaluate on more text."
        )
    ]


def _means(evaluations: Sequence[Mapping]) -> Markup:
    rows = [
        [element("b", one["name"]), one.get("formats") or "unknown"]
        + [interval(one["means"][metric], spec) for metric, _, spec in METRICS]
        for one in evaluations
    ]
    return table(["model", "linears", *(name for _, name, _ in METRICS)], rows, left=2)


def _differences(evaluations: Sequence[Mapping], base: str) -> Markup:
    has_ratios = any(one["kl_ratio"] is not None for one in evaluations)  # not if the baseline is the teacher
    rows = []
    for one in evaluations:
        ratio = "not defined" if one["kl_ratio"] is None else interval(one["kl_ratio"], ".3f", zero=1.0)
        cells = [interval(one["differences"][metric], f"+{spec}", zero=0.0) for metric, _, spec in METRICS]
        rows.append([element("b", one["name"]), *([ratio] * has_ratios), *cells])
    heads = [*([f"KL / {base}'s KL"] * has_ratios), *(name for _, name, _ in METRICS)]
    return table(["model", *heads], rows)


def interval(value: Mapping, spec: str, zero: float | None = None) -> Content:
    """Return a value with its interval below it.

    Args:
        zero: value of no difference; the number is bold if the interval excludes it.
    """
    text = format(value["value"], spec)
    if value["low"] is None:
        return text
    excludes = zero is not None and not value["low"] <= zero <= value["high"]
    low, high = format(value["low"], spec), format(value["high"], spec)
    return [
        element("span", text, class_="best" if excludes else None),
        element("span", f"{low} to {high}", class_="interval"),
    ]


def _percentiles(evaluations: Sequence[Mapping]) -> Markup:
    names = list(evaluations[0]["kl_percentiles"])
    heads = [
        "largest" if name == "max" else "median" if name == "50" else f"{name} % of tokens below" for name in names
    ]
    rows = [
        [element("b", one["name"]), f"{one['means']['kl_to_teacher']['value']:.4g}"]
        + [f"{value:.4g}" for value in one["kl_percentiles"].values()]
        for one in evaluations
    ]
    return table(["KL of a token", "mean", *heads], rows)


def _panels(comparison: Mapping, colors: Mapping[str, str]) -> list[Panel]:
    evaluations = [one for one in comparison["evaluations"] if one["means"]["kl_to_teacher"]["value"] > 0]
    if not evaluations:
        return []
    bars = tuple(
        Series(one["name"], colors[one["name"]], [(0, mean["value"])], _ends(mean))
        for one in evaluations
        if (mean := one["means"]["kl_to_teacher"])
    )
    names = tuple(comparison["groups"]["position"])
    lines = tuple(
        Series(one["name"], colors[one["name"]], [(i, one["kl_by_position"][name]) for i, name in enumerate(names)])
        for one in evaluations
    )
    return [
        Panel("KL to the teacher, 95 % interval", "nats per token", bars),
        Panel("KL by position in the text", "nats per token", lines, x_label="position of the token", ticks=names),
    ]


def _ends(mean: Mapping) -> tuple[float, float] | None:
    return None if mean["low"] is None else (mean["low"], mean["high"])


def _classes(comparison: Mapping, colors: Mapping[str, str]) -> Markup:
    evaluations = comparison["evaluations"]
    largest = max(value for one in evaluations for value in one["kl_by_class"].values()) or 1.0
    rows = []
    for name, count in comparison["groups"]["class"].items():
        cells = [_class_bar(one["kl_by_class"][name], largest, colors[one["name"]]) for one in evaluations]
        rows.append([name, f"{count:,}", *cells])
    return table(["class of the token", "tokens", *(one["name"] for one in evaluations)], rows)


def _class_bar(value: float, largest: float, color: str) -> Content:
    width = _BAR_PIXELS * max(value, 0) / largest
    bar = element("span", class_="bar", style=f"width: {width:.0f}px; background: {VARIABLES[color]}")
    return [
        f"{value:.4g} ",
        element("span", bar, style=f"display: inline-block; width: {_BAR_PIXELS}px; text-align: left"),
    ]
