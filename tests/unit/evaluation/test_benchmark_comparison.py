"""Conclusions from benchmark scores that the tests make: deficits, noise, refusals; presets."""

import numpy as np
import pytest

from megatron_qad.engine.errors import QADError
from megatron_qad.evaluation import benchmark_results
from megatron_qad.evaluation.benchmark_comparison import AVERAGE, compare_benchmarks, conclusion, report
from megatron_qad.evaluation.benchmark_presets import PRESETS, find_preset, preset_runs

PROBLEMS, RUNS = 200, 4


@pytest.fixture
def make_results(tmp_path):
    """Return a maker of results: (name, chance of a right answer to an easy problem, ...) -> results of two tasks."""

    def make(name: str, chance: float, seed: int, sampling=(), problems=PROBLEMS, runs=RUNS, prompt="p", better=True):
        directory, rng = tmp_path / name, np.random.default_rng(seed)
        easy = np.random.default_rng(0).random(problems) < 0.5  # the same for all: hard for one is hard for all
        right = rng.random((runs, problems)) < np.where(easy, chance, 0.05)
        settings = {"chat": False, "temperature": 0.6, "top_p": 0.95, "max_new_tokens": 8, "seed": 1} | dict(sampling)
        task = {"runs": runs, "sampled": True, "files": {}, "higher_is_better": {"acc": better}}
        benchmark_results.start(directory, {"model": {}, "sampling": settings, "tasks": {"a": task, "b": task}})
        for name_ in ("a", "b"):
            for run in range(runs):
                lines = [
                    {"id": i, "problem": f"{name_}{i}", "prompt": prompt, "scores": {"acc,none": float(right[run, i])}}
                    for i in range(problems)
                ]
                benchmark_results.write_run(directory, name_, run, lines)
        return benchmark_results.load(directory)

    return make


def test_a_deficit_larger_than_noise_is_told_from_none(make_results):
    results = {
        "BF16": make_results("bf16", 0.9, 1),
        "PTQ": make_results("ptq", 0.7, 2),
        "QAD": make_results("qad", 0.9, 3),
    }
    compared = compare_benchmarks(results)
    deficit = compared.differences[AVERAGE]["PTQ", "BF16"]
    assert deficit.high < 0 and deficit.value == pytest.approx(-0.1, abs=0.05)  # half of the problems lose 0.2
    assert "larger than noise" in conclusion(compared, "PTQ", "BF16", AVERAGE)
    text = conclusion(compared, "QAD", "BF16", AVERAGE)
    half = (lambda d: (d.high - d.low) / 2)(compared.differences[AVERAGE]["QAD", "BF16"])
    assert "within noise" in text and f"A difference below {half:.4f} could not have been seen" in text
    page = report(compared, "BF16", "PTQ")
    assert "Is the deficit of PTQ larger than noise?" in page and "Is QAD within noise of BF16?" in page


def test_pairing_leaves_out_the_choice_of_problems(make_results):
    compared = compare_benchmarks({"BF16": make_results("bf16", 0.9, 1), "PTQ": make_results("ptq", 0.7, 2)})
    mean, difference = compared.means["a"]["PTQ"], compared.differences["a"]["PTQ", "BF16"]
    assert difference.high - difference.low < 0.9 * (mean.high - mean.low)


def test_lower_may_be_better(make_results):
    results = {"BF16": make_results("bf16", 0.9, 1, better=False), "PTQ": make_results("ptq", 0.7, 2, better=False)}
    assert compare_benchmarks(results).differences["a"]["PTQ", "BF16"].low > 0


def test_equal_scores_say_what_could_be_missed(make_results):
    compared = compare_benchmarks({"BF16": make_results("x", 0.9, 1), "QAD": make_results("y", 0.9, 1)})
    assert "models that differ in up to 2% of such problems could look equal" in conclusion(
        compared, "QAD", "BF16", "a"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampling": {"temperature": 1.0}}, "temperature is 1.0 and 0.6"),
        ({"problems": 100}, "the problems of a are others"),
        ({"prompt": "q"}, "the prompts of a differ"),
        ({"runs": 3}, "3 and 4 runs"),
    ],
)
def test_other_conditions_are_refused(make_results, change, message):
    with pytest.raises(QADError, match=message):
        compare_benchmarks({"BF16": make_results("bf16", 0.9, 1), "QAD": make_results("qad", 0.9, 2, **change)})


def test_unfinished_results_are_refused(make_results):
    results = make_results("bf16", 0.9, 1)
    benchmark_results.run_file(results.directory, "b", 2).unlink()
    with pytest.raises(QADError, match="run 2 of 4 of b is missing"):
        benchmark_results.load(results.directory)


def test_presets():
    assert preset_runs(find_preset("nano-9b-v2"), "aime24") == preset_runs(PRESETS["super"], "AIME_2025") == 48
    assert preset_runs(PRESETS["acereason"], "gpqa_diamond") == 20
    nano = PRESETS["nemotron-3-nano"]
    assert [preset_runs(nano, t) for t in ("aime25", "lcb_v5", "gpqa", "aa_lcr", "scicode")] == [16, 8, 8, 5, 5]
    with pytest.raises(QADError, match="Rename the task, or give --runs mmlu=N"):
        preset_runs(nano, "mmlu")
    with pytest.raises(QADError, match="is not one of super"):
        find_preset("ultra")
