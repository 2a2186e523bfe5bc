"""Benchmark results for the run report."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_qad.engine.errors import QADError
from megatron_qad.evaluation import benchmark_results
from megatron_qad.evaluation.benchmark_comparison import Compared, compare_benchmarks, conclusion


@dataclass(frozen=True)
class Benchmarks:
    """Compared results of ``tools/benchmark.py``."""

    compared: Compared
    teacher: str
    """Name of the model that the others are compared with."""
    conclusions: list[str]
    """A sentence per model and task, the average first."""

    def record(self) -> dict:
        """Return the means and the differences from the teacher as JSON."""
        compared = self.compared
        return {
            "teacher": self.teacher,
            "problems": compared.problems,
            "means": {task: {n: v.record() for n, v in by.items()} for task, by in compared.means.items()},
            "differences_from_teacher": {
                task: {a: v.record() for (a, b), v in by.items() if b == self.teacher}
                for task, by in compared.differences.items()
            },
            "conclusions": self.conclusions,
        }


def compare_results(results: Sequence[str]) -> Benchmarks | None:
    """Return the comparison of benchmark results; None if there are none.

    Args:
        results: NAME=RESULTS with the teacher first.

    Raises:
        QADError: a pair without a name, two of one name, or results that cannot be read or compared.
    """
    loaded = {}
    for text in results:
        name, _, directory = text.partition("=")
        if not name or not directory or name in loaded:
            raise QADError(f"--benchmarks {text}: expected NAME=RESULTS, with a different name for each directory.")
        loaded[name] = benchmark_results.load(directory)
    if not loaded:
        return None
    compared, teacher = compare_benchmarks(loaded), next(iter(loaded))
    tasks = list(reversed(compared.means))
    sentences = [conclusion(compared, name, teacher, task) for name in compared.names[1:] for task in tasks]
    return Benchmarks(compared, teacher, sentences)
