"""Benchmark results for the run report."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_qad.engine.named_paths import parse_named
from megatron_qad.evaluation import benchmark_results
from megatron_qad.evaluation.benchmark_comparison import Compared, compare_benchmarks, conclusion


@dataclass(frozen=True)
class Benchmarks:
    """Compared results of ``megatron-qad benchmark``."""

    compared: Compared
    teacher: str
    """Name of the model that the others are compared with."""
    conclusions: list[str]
    """A sentence per model and task, the average first."""

    def record(self) -> dict:
        """Return the comparison as JSON."""
        return {"teacher": self.teacher, **self.compared.record(), "conclusions": self.conclusions}


def compare_results(results: Sequence[str]) -> Benchmarks | None:
    """Return the comparison of benchmark results; None if there are none.

    Args:
        results: NAME=RESULTS with the teacher first.

    Raises:
        QADError: a pair without a name, two of one name, or results that cannot be read or compared.
    """
    named = parse_named(results, "RESULTS", "--benchmarks")
    loaded = {name: benchmark_results.load(directory) for name, directory in named.items()}
    if not loaded:
        return None
    compared, teacher = compare_benchmarks(loaded), next(iter(loaded))
    tasks = list(reversed(compared.means))
    sentences = [conclusion(compared, name, teacher, task) for name in compared.names[1:] for task in tasks]
    return Benchmarks(compared, teacher, sentences)
