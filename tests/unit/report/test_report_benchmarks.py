"""report.html, report.md and results.json show benchmark results and the advice of a run."""

import pytest

from megatron_qad.engine.errors import QADError
from megatron_qad.evaluation import benchmark_results
from megatron_qad.report.collect import Results
from megatron_qad.report.compared_benchmarks import compare_results
from megatron_qad.report.html_page.document import html
from megatron_qad.report.markdown import markdown
from megatron_qad.report.runs import Run

EVIL = "<script>PTQ"
MODEL = {"architecture": "X", "num_hidden_layers": 2, "hidden_size": 8, "vocab_size": 99, "num_weights": 10**6}
SAMPLING = {"chat": False, "temperature": 0.6, "top_p": 0.95, "max_new_tokens": 8, "seed": 1}


def write_results(directory, right: int):
    """Write results of 100 problems, of which the first ``right`` are solved."""
    task = {"runs": 1, "sampled": True, "files": {}, "higher_is_better": {"acc": True}}
    benchmark_results.start(directory, {"model": {}, "sampling": SAMPLING, "tasks": {"sums": task}})
    scores = [{"acc,none": float(i < right)} for i in range(100)]
    lines = [{"id": i, "problem": str(i), "prompt": "p", "scores": score} for i, score in enumerate(scores)]
    benchmark_results.write_run(directory, "sums", 0, lines)
    return directory


def make_run(**scalars) -> Run:
    return Run("QAD", "runs/qad", {"learning-rate": [(1, 1e-4)], **scalars}, {"iteration": 300}, None, None)


def test_benchmarks_are_shown_with_their_conclusions(tmp_path):
    files = {"BF16": write_results(tmp_path / "a", 80), EVIL: write_results(tmp_path / "b", 50)}
    found = compare_results([f"{name}={directory}" for name, directory in files.items()])
    assert found.teacher == "BF16" and found.record()["means"]["sums"]["BF16"]["value"] == pytest.approx(0.8)
    (sentence,) = found.conclusions
    assert "0.3000 below BF16 on sums" in sentence and "larger than noise" in sentence
    page = html(Results("t", "teacher", MODEL, [make_run()], [], [], benchmarks=found))
    assert '<h2 id="benchmarks">' in page and "-0.3000" in page and "<script>" not in page
    assert "&lt;script&gt;PTQ is 0.3000 below BF16" in page
    text = markdown(Results("t", "teacher", MODEL, [make_run()], [], [], benchmarks=found))
    assert "## Benchmarks" in text and "0.3000 below BF16 on sums" in text
    assert '<h2 id="benchmarks">' not in html(Results("t", "teacher", MODEL, [make_run()], [], []))


def test_benchmarks_without_a_name_are_refused(tmp_path):
    directory = write_results(tmp_path / "a", 80)
    for texts in ([str(directory)], [f"A={directory}"] * 2):
        with pytest.raises(QADError, match="expected NAME=RESULTS, with a different name"):
            compare_results(texts)
    assert compare_results([]) is None


def test_advice_of_the_last_validation():
    kls = [(100, 0.2), (200, 0.17), (300, 0.169)]
    curves = {"validation/kl_to_teacher": kls, "validation/teacher_cross_entropy": [(i, 2.0) for i, _ in kls]}
    trained = {"kl loss": [(i, 0.1) for i in range(1, 301)], **curves}
    run = make_run(**trained, **{"advice/kl_change_noise": [(200, 0.001), (300, 0.002)]})
    assert run.advice.startswith("KL fell by 0.6 % since iteration 200, within its noise of 1.2 %")
    assert run.advice in html(Results("t", "teacher", MODEL, [run], [], []))
    assert "its noise is unknown" in make_run(**trained).advice  # a job of an earlier version
    assert make_run(**curves).advice is None  # PTQ
