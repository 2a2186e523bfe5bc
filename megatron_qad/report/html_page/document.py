"""Assembles report.html: sections in the order in which a user decides."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_qad.report.collect import Results
from megatron_qad.report.heatmaps import sensitivity_heatmap, weight_heatmaps
from megatron_qad.report.html_page.benchmark_section import benchmark_section
from megatron_qad.report.html_page.comparison_section import comparison_section
from megatron_qad.report.html_page.grid_table import heatmap_table
from megatron_qad.report.html_page.markup import Content, Markup, element, paragraph
from megatron_qad.report.html_page.overview import overview
from megatron_qad.report.html_page.policy_section import policy_section
from megatron_qad.report.html_page.run_sections import cost_section, expert_section, validation_table
from megatron_qad.report.html_page.stylesheet import STYLE
from megatron_qad.report.html_page.svg_figure import panel_grid
from megatron_qad.report.html_page.worst_tokens import worst_section
from megatron_qad.report.panels import colors_of, training_panels, validation_panels


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading."""

    title: str
    body: Content


def html(results: Results, more: Sequence[Section] = ()) -> str:
    """Return report.html: one file that refers to no other and needs no network.

    Args:
        more: sections before the notes.
    """
    sections = [section for section in (*_sections(results), *more, *_notes(results)) if section.body]
    links = [element("a", section.title, href=f"#{_anchor(section.title)}") for section in sections]
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", results.title),
        element("style", Markup(STYLE)),
    )
    body = element(
        "body",
        overview(results),
        element("nav", links),
        [_rendered(section) for section in sections],
    )
    return f'<!DOCTYPE html>\n<html lang="en">\n{head}\n{body}\n</html>\n'


def _rendered(section: Section) -> Markup:
    heading = element("h2", section.title, id=_anchor(section.title))
    return element("section", heading, section.body, Markup("\n"))


def _anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def _sections(results: Results) -> list[Section]:
    runs, comparison = results.runs, results.comparison
    compared: list[Content] = []
    if comparison is not None:
        compared += [*comparison_section(comparison, colors_of(runs)), element("h3", "The jobs' own validation")]
    compared += validation_table(runs)
    if comparison is None:
        compared.append(
            paragraph(
                "Intervals, percentiles and the worst tokens need evaluation records: megatron-qad evaluate for each "
                "run, then megatron-qad report --evaluations (docs/evaluate.md).",
                class_="note",
            )
        )
    return [
        Section("Comparison", compared),
        Section("Tokens with the largest KL", worst_section(comparison) if comparison else None),
        Section("Policy and size", policy_section(results.policies)),
        Section("Cost", cost_section(runs)),
        Section("Curves", _curves(results)),
        Section("Benchmarks", benchmark_section(results.benchmarks) if results.benchmarks else None),
        Section("Errors by layer", _errors(results)),
        Section("Experts", expert_section(runs) if any(run.experts.layers for run in runs) else None),
    ]


def _curves(results: Results) -> Content:
    panels = [*training_panels(results.runs), *validation_panels(results.runs, results.comparison)]
    if not panels:
        return paragraph("No run recorded a loss or a validation.")
    given = [element("li", element("b", run.name), ": ", run.advice) for run in results.runs if run.advice]
    return [panel_grid(panels, "curve"), *([element("h3", "Advice"), element("ul", given)] if given else [])]


def _errors(results: Results) -> Content:
    maps = weight_heatmaps(results.linears, results.grid, results.runs)
    parts: list[Content] = []
    if results.sensitivity is not None:
        parts += [
            heatmap_table(sensitivity_heatmap(results.sensitivity)),
            paragraph(
                f"From megatron-qad sensitivity, on {results.sensitivity['num_tokens']:,} held-out tokens. Layers are "
                "numbered as in Megatron, where attention and MLP are layers of their own.",
                class_="note",
            ),
        ]
    if maps:
        parts += [heatmap_table(heatmap) for heatmap in maps]
        parts.append(
            paragraph(
                "||quantized weight - teacher's weight|| / ||teacher's weight||. Training moves weights away from the "
                "teacher's, so a trained run may have larger distances and a smaller KL. The experts of a layer share "
                "a cell, which shows their mean.",
                class_="note",
            )
        )
    return parts or paragraph("Nothing measured: no run has comparable weights.")


def _notes(results: Results) -> list[Section]:
    notes = [element("li", note) for note in results.notes]
    body = element("ul", notes) if notes else paragraph("Nothing was skipped or missing.")
    return [Section("Skipped or missing", body)]
