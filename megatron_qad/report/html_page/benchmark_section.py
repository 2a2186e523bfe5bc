"""Benchmark results: means with intervals, and what they allow to conclude."""

from megatron_qad.report.compared_benchmarks import Benchmarks
from megatron_qad.report.html_page.comparison_section import interval
from megatron_qad.report.html_page.markup import Markup, element, paragraph, table


def benchmark_section(benchmarks: Benchmarks) -> list[Markup]:
    """Return a table of all tasks and models, and one sentence for each model and task."""
    compared, teacher = benchmarks.compared, benchmarks.teacher
    rows = [
        [
            task,
            f"{compared.problems[task]:,}",
            *(interval(compared.means[task][name].record(), ".4f") for name in compared.names),
        ]
        for task in compared.means
    ]
    others = compared.names[1:]
    differences = [
        [task, *(interval(compared.differences[task][name, teacher].record(), "+.4f", zero=0) for name in others)]
        for task in compared.means
    ]
    parts = [
        paragraph(
            "Means over problems and runs. Below each value: its 95 % interval from draws of problems. Differences are "
            "paired: all models answered the same problems.",
            class_="note",
        ),
        table(["task", "problems", *compared.names], rows),
    ]
    if others:
        parts.append(table(["task", *(f"{name} - {teacher}" for name in others)], differences))
        parts.append(element("ul", [element("li", sentence) for sentence in benchmarks.conclusions]))
    return parts
