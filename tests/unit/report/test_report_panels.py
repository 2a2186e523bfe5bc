"""Panels of the run report: labels of axes, bars for single evaluations, points and intervals."""

import pytest
from matplotlib.figure import Figure

from megatron_qad.report.html_page.svg_figure import panel_figure
from megatron_qad.report.panels import Panel, Series, draw, training_panels, validation_panels
from megatron_qad.report.runs import Run

RATE = {"learning-rate": [(1, 1e-4)]}


def make_run(name: str, scalars: dict) -> Run:
    validation = {"teacher_cross_entropy": 2.0}
    return Run(name, name, scalars | RATE, validation, None, None)


def drawn(panel: Panel):
    figure = Figure(layout="constrained")
    axes = figure.add_subplot()
    draw(axes, panel)
    figure.draw_without_rendering()
    return axes


@pytest.mark.parametrize("ends", [(1.0, 5.01), (0.9, 4.6), (0.0213, 0.11), (1e-4, 3.0), (1e-9, 1e3)])
def test_log_axis_has_at_least_two_labels(ends):
    panel = Panel("t", "nats per token", (Series("a", "#0072b2", [(1, ends[1]), (2, ends[0])]),))
    axes = drawn(panel)
    low, high = axes.get_ylim()
    ticks = zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)
    labels = [label.get_text() for tick, label in ticks if low <= tick <= high]
    assert axes.get_yscale() == "log" and len(labels) >= 2 and all(labels) and len(labels) <= 15


def test_narrow_range_has_a_linear_axis_around_it():
    axes = drawn(Panel("t", "share of tokens", (Series("a", "#0072b2", [(10, 0.91), (20, 0.93)]),)))
    low, high = axes.get_ylim()
    assert axes.get_yscale() == "linear" and low > 0.9 and high < 0.94
    assert "92 %" in [label.get_text() for label in axes.get_yticklabels()]


def test_single_evaluations_are_bars_with_values_and_intervals():
    runs = [
        make_run(n, {"validation/kl_to_teacher": [(i, kl)]}) for i, (n, kl) in enumerate([("PTQ", 0.4), ("QAD", 0.1)])
    ]
    mean = {"value": 0.1, "low": 0.08, "high": 0.13}
    (panel,) = validation_panels(runs, {"evaluations": [{"name": "QAD", "means": {"kl_to_teacher": mean}}]})
    assert panel.is_single and [series.interval for series in panel.series] == [None, (0.08, 0.13)]
    axes = drawn(panel)
    assert sorted(bar.get_width() for bar in axes.patches) == [0.1, 0.4] and axes.get_xlim()[0] == 0
    assert [text.get_text() for text in axes.texts] == ["0.4", "0.1"]
    assert [list(line.get_xdata()) for line in axes.lines] == [[0.08, 0.13]]


def test_single_values_of_different_magnitudes_are_points_on_a_logarithmic_axis():
    """A KL of 0.003 next to one of 0.6 would be a bar without a length."""
    values = {"PTQ": 0.007, "QAT": 0.6, "QAD": 0.003}
    runs = [make_run(name, {"validation/kl_to_teacher": [(1, kl)]}) for name, kl in values.items()]
    (panel,) = validation_panels(runs)
    axes = drawn(panel)
    assert not axes.patches and axes.get_xscale() == "log"
    assert axes.collections[0].get_offsets()[:, 0].tolist() == list(values.values())
    assert [text.get_text() for text in axes.texts] == [str(value) for value in values.values()]
    low, high = axes.get_xlim()
    assert sum(low <= tick <= high for tick in axes.get_xticks()) >= 2


def test_interval_of_another_iteration_is_not_drawn():
    run = make_run("QAD", {"validation/kl_to_teacher": [(9, 0.2)]})
    mean = {"value": 0.1, "low": 0.08, "high": 0.13}
    (panel,) = validation_panels([run], {"evaluations": [{"name": "QAD", "means": {"kl_to_teacher": mean}}]})
    assert panel.series[0].interval is None


def test_each_loss_has_a_panel_and_several_validations_are_points():
    losses = {"total loss": [(1, 3.0), (2, 2.0)], "kl loss": [(1, 1.0), (2, 0.5)], "ce loss": [(1, 2.0), (2, 1.5)]}
    points = {"validation/cross_entropy": [(0, 2.5), (10, 2.2), (20, 2.1)]}
    runs = [make_run("QAD", losses | points), make_run("QAT", {"ce loss": [(1, 2.0), (2, 1.9)]})]
    training = training_panels(runs)
    assert [panel.title for panel in training] == ["Training: total loss", "Training: kl loss", "Training: ce loss"]
    assert [len(panel.series) for panel in training] == [1, 1, 2]
    (panel,) = validation_panels(runs)
    axes = drawn(panel)
    line, reference = axes.lines
    assert line.get_marker() == "o" and list(line.get_xdata()) == [0, 10, 20]
    assert panel.reference == ("teacher", 2.0) and list(reference.get_ydata()) == [2.0, 2.0]


def test_svg_has_the_colors_of_the_page_and_keeps_names():
    panel = Panel("t <b>", "u", (Series("#0072b2 $x", "#0072b2", [(0, 1.0)]), Series("b", "#d55e00", [(0, 2.0)])))
    text = panel_figure(panel, "one")
    assert "var(--run-0)" in text and "#0072b2 $x</text>" in text and "<b>" not in text and "#010203" not in text
    assert panel_figure(panel, "one") == text and "xmlns" not in text
