"""Comparison of benchmark results: means with intervals, paired differences, and what they allow to conclude.

The bootstrap draws problems. All models have answered the same problems, so a difference is computed problem by problem
and its interval is not widened by problems that are hard for all. The intervals contain the luck of sampling, which
more runs make smaller, and the choice of problems, which they do not.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from megatron_qad.engine.errors import QADError
from megatron_qad.engine.plural import count
from megatron_qad.evaluation.benchmark_results import Results, TaskScores
from megatron_qad.evaluation.bootstrap import FEW_ROWS, Interval, RowBootstrap
from megatron_qad.evaluation.comparison_tables import interval, table

AVERAGE = "average"
"""Name of the mean over the tasks, each with the same weight."""
_SAMPLING = ("chat", "temperature", "top_p", "max_new_tokens")


@dataclass(frozen=True)
class Compared:
    """Intervals of every task, and of the average if there are several tasks."""

    names: list[str]
    problems: dict[str, int]
    """Number of problems by task."""
    means: dict[str, dict[str, Interval]]
    """By task and model."""
    differences: dict[str, dict[tuple[str, str], Interval]]
    """By task, model and the model that it is compared with: positive if the first is better."""

    def record(self) -> dict:
        """Return problems, means and differences ("A - B") as JSON."""
        return {
            "problems": self.problems,
            "means": {task: {n: v.record() for n, v in by.items()} for task, by in self.means.items()},
            "differences": {
                task: {f"{a} - {b}": v.record() for (a, b), v in by.items()} for task, by in self.differences.items()
            },
        }


def compare_benchmarks(results: Mapping[str, Results], metric: str | None = None, num_samples: int = 2000) -> Compared:
    """Compare the results of several models on the same problems.

    Args:
        metric: "metric,filter" for all tasks. None: the first of each task.
        num_samples: draws of the bootstrap.

    Raises:
        QADError: other tasks, problems, sampling or numbers of runs, or no such metric.
    """
    check_comparable(results)
    names, first = list(results), next(iter(results.values()))
    samples: dict[str, dict[str, tuple[float, np.ndarray]]] = {}
    for number, task in enumerate(first.tasks):
        scores = {name: _scores(task, results[name].tasks[task], metric) for name in names}
        problems, runs = next(iter(scores.values())).shape
        # Another seed for each task: with the same draws, tasks of one size would vary together.
        bootstrap = RowBootstrap(np.repeat(np.arange(problems), runs), num_samples, seed=number)
        samples[task] = {name: (float(s.mean()), bootstrap.means(s.ravel())) for name, s in scores.items()}
    sizes = {task: len(scores.problems) for task, scores in first.tasks.items()}
    if len(samples) > 1:
        per_task = list(samples.values())
        samples[AVERAGE] = {
            name: (np.mean([s[name][0] for s in per_task]).item(), np.mean([s[name][1] for s in per_task], axis=0))
            for name in names
        }
        sizes[AVERAGE] = sum(sizes.values())
    enough = all(size > 1 for size in sizes.values())

    def estimate(value: float, draws: np.ndarray) -> Interval:
        return Interval.of(value, draws) if enough else Interval(value)

    means = {task: {name: estimate(*s[name]) for name in names} for task, s in samples.items()}
    signs = {task: 1 if _is_higher_better(task, first.tasks.get(task), metric) else -1 for task in samples}
    differences = {
        task: {
            (a, b): estimate(signs[task] * (s[a][0] - s[b][0]), signs[task] * (s[a][1] - s[b][1]))
            for a in names
            for b in names
            if a != b
        }
        for task, s in samples.items()
    }
    return Compared(names, sizes, means, differences)


def check_comparable(results: Mapping[str, Results]) -> None:
    """Raise QADError unless all results are of the same problems with the same sampling."""
    reference, first = next(iter(results.items()))
    for name, other in results.items():
        where = f"{name} and {reference} cannot be compared"
        for key in _SAMPLING:
            found, expected = other.settings["sampling"][key], first.settings["sampling"][key]
            if found != expected:
                raise QADError(f"{where}: {key} is {found} and {expected}. Run both with the same sampling.")
        if other.tasks.keys() != first.tasks.keys():
            raise QADError(f"{where}: the tasks are {', '.join(other.tasks)} and {', '.join(first.tasks)}.")
        for task, scores in other.tasks.items():
            expected = first.tasks[task]
            if scores.problems != expected.problems:
                raise QADError(f"{where}: the problems of {task} are others. Run both with the same task file.")
            if scores.prompts != expected.prompts:
                raise QADError(f"{where}: the prompts of {task} differ. Run both with the same task file and template.")
            runs = [next(iter(s.scores.values())).shape[1] for s in (scores, expected)]
            if runs[0] != runs[1]:
                raise QADError(f"{where}: {task} has {runs[0]} and {runs[1]} runs. Run both with the same --runs.")


def conclusion(compared: Compared, model: str, reference: str, task: str) -> str:
    """Return in one sentence whether ``model`` is as good as ``reference`` on a task, and what could have been seen.

    Example: "PTQ is 0.0340 below BF16 on aime25 (95 % interval 0.0100 to 0.0580): larger than noise."
    """
    found, size = compared.differences[task][model, reference], compared.problems[task]
    few = f" With {count(size, 'problem')} the interval is rough and usually too narrow." if size < FEW_ROWS else ""
    if found.low is None:
        return f"{model} and {reference} on {task}: one problem has no interval. Use more problems."
    if found.low == found.high == 0:
        return (
            f"{model} and {reference} have the same scores on {task} in every problem. With {count(size, 'problem')}, "
            f"models that differ in up to {min(1.0, 3 / size):.0%} of such problems could look equal."
        )
    direction = "below" if found.value < 0 else "above"
    low, high = (found.low, found.high) if found.value >= 0 else (-found.high, -found.low)
    text = f"{model} is {abs(found.value):.4f} {direction} {reference} on {task} "
    text += f"(95 % interval {low:.4f} to {high:.4f})"
    if found.excludes_zero:
        return f"{text}: larger than noise.{few}"
    half = (found.high - found.low) / 2
    return f"{text}: within noise. A difference below {half:.4f} could not have been seen.{few}"


def report(compared: Compared, teacher: str, baseline: str | None) -> str:
    """Return tables and sentences in Markdown: the deficit of the baseline first, then the other models."""
    others = [name for name in compared.names if name not in (teacher, baseline)]
    tasks = list(compared.means)
    rows = [
        [task, str(compared.problems[task])]
        + [interval(compared.means[task][name].record(), ".4f") for name in compared.names]
        for task in tasks
    ]
    parts = [table(["task", "problems", *compared.names], rows, left=1)]
    pairs = [(baseline, teacher)] if baseline else []
    pairs += [(name, teacher) for name in others] + ([(name, baseline) for name in others] if baseline else [])
    if pairs:
        differences = [
            [task, *(interval(compared.differences[task][pair].record(), "+.4f") for pair in pairs)] for task in tasks
        ]
        parts.append(table(["task", *(f"{a} - {b}" for a, b in pairs)], differences, left=1))
    if baseline:
        parts += [f"## Is the deficit of {baseline} larger than noise?"]
        parts += ["\n".join(f"- {conclusion(compared, baseline, teacher, task)}" for task in reversed(tasks))]
    for name in others:
        parts += [f"## Is {name} within noise of {teacher}?"]
        lines = [conclusion(compared, name, reference, tasks[-1]) for reference in (baseline, teacher) if reference]
        lines = lines[:-1] + [conclusion(compared, name, teacher, task) for task in reversed(tasks)]
        parts += ["\n".join(f"- {line}" for line in lines)]
    return "\n\n".join(parts) + "\n"


def _scores(task: str, scores: TaskScores, metric: str | None) -> np.ndarray:
    if metric is not None and metric not in scores.scores:
        raise QADError(f"--metric {metric}: {task} has {', '.join(scores.scores)}.")
    return scores.scores[metric or scores.metric]


def _is_higher_better(task: str, scores: TaskScores | None, metric: str | None) -> bool:
    return scores is None or scores.higher_is_better.get((metric or scores.metric).split(",")[0], True)
