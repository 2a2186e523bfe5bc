"""Beginning of the page: what was compared, the result of each run in one number, and how to serve the export."""

import math
import shlex
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from megatron_qad.report.collect import Results
from megatron_qad.report.html_page.markup import Markup, code, element, paragraph
from megatron_qad.report.html_page.policy_section import size_text
from megatron_qad.report.html_page.svg_figure import VARIABLES
from megatron_qad.report.markdown import format_count
from megatron_qad.report.panels import colors_of
from megatron_qad.report.runs import Run


def overview(results: Results) -> list[Markup]:
    """Return title, facts, one card per run, and what was exported."""
    model = results.model
    facts = [
        (
            "Model",
            f"{model['architecture']}, {model['num_hidden_layers']} layers, hidden size {model['hidden_size']}, "
            f"vocabulary {model['vocab_size']:,}, {format_count(model['num_weights'])} weights",
        ),
        ("Teacher (BF16)", code(results.teacher)),
        ("Compared", [_described(run) for run in results.runs]),
        ("Last run ended", _date(results.runs)),
        ("Export", _exports(results)),
    ]
    return [
        element("h1", results.title),
        element("dl", [[element("dt", name), element("dd", text)] for name, text in facts], class_="facts"),
        *_serve(results),
        element("div", [_card(run, results) for run in results.runs], class_="cards"),
        paragraph(
            "KL to the teacher: mean over held-out tokens of KL(teacher || run), in nats per token. It is 0 if the "
            "quantized model predicts exactly as the BF16 model does; smaller is better.",
            class_="note",
        ),
    ]


def _described(run: Run) -> Markup:
    loss = run.job.get("loss") if run.job else None
    how = {"kl": "trained on the KL to the teacher", "ce": "trained on cross entropy"}.get(loss, f"trained on {loss}")
    if not run.is_trained:
        how = "not trained"
    elif run.job is None:
        how = "training loss unknown"
    return element("div", element("b", run.name), f": {how}, ", code(run.directory))


def _date(runs: Sequence[Run]) -> str:
    ended = [run.ended for run in runs if run.ended]
    return f"{datetime.fromtimestamp(max(ended), UTC):%Y-%m-%d %H:%M} UTC" if ended else "unknown"


def _exports(results: Results) -> Markup | str:
    if not results.exports:
        return "none named (--export DIR)"
    return element(
        "div",
        [
            element(
                "div",
                f"iteration {export.iteration} of {export.checkpoint}, layout {export.layout}, "
                f"{size_text(export.num_bytes)} of weights: ",
                code(export.directory),
            )
            for export in results.exports
        ],
    )


def _serve(results: Results) -> list[Markup]:
    if not results.exports:
        return []
    lines = "\n".join(shlex.join(export.command) for export in results.exports)
    return [
        element("pre", lines),
        paragraph(
            "vLLM reads formats and scales from config.json. NVFP4 weights and inputs (W4A4) need a Blackwell GPU; "
            "older ones decode the weights and compute in BF16, with slightly other results (docs/support.md).",
            class_="note",
        ),
    ]


def _card(run: Run, results: Results) -> Markup:
    kl, share, interval = _kl(run, results)
    details = []
    if share is not None:
        name = results.runs[0].name
        details.append(f"{share:.1%} of {name}'s" if share < 2 else f"{share:.3g} times {name}'s")
    if interval:
        details.append(interval)
    agreement = run.validation.get("top1_agreement")
    if agreement is not None and math.isfinite(agreement):
        details.append(f"same most likely token as the teacher: {agreement:.1%}")
    return element(
        "div",
        element("div", run.name, class_="name"),
        element("div", "not measured" if kl is None else f"{kl:.4g}", class_="value"),
        [element("div", detail, class_="detail") for detail in details],
        class_="card",
        style=f"border-top-color: {VARIABLES[colors_of(results.runs)[run.name]]}",
    )


def _kl(run: Run, results: Results) -> tuple[float | None, float | None, str | None]:
    """Return a run's KL, its share of the first run's, and its interval as text."""
    if (record := _record(run, results.comparison)) is not None:
        kl, base = record["means"]["kl_to_teacher"], _record(results.runs[0], results.comparison)
        text = None if kl["low"] is None else f"95 % interval {kl['low']:.4g} to {kl['high']:.4g}"
        base_kl = base["means"]["kl_to_teacher"]["value"] if base else None
        return kl["value"], _share(kl["value"], base_kl, run, results), text
    kl = run.validation.get("kl_to_teacher")
    if kl is None or not math.isfinite(kl):
        return None, None, None
    return kl, _share(kl, results.runs[0].validation.get("kl_to_teacher"), run, results), None


def _share(kl: float, base: float | None, run: Run, results: Results) -> float | None:
    if run is results.runs[0] or base is None or not math.isfinite(base) or base <= 0:
        return None
    return kl / base


def _record(run: Run, comparison: Mapping | None) -> Mapping | None:
    evaluations = comparison["evaluations"] if comparison else ()
    return next((one for one in evaluations if one["name"] == run.name), None)
