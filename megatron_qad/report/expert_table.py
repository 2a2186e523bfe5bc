"""Load of the experts of a run in its last evaluation.

Read from ``expert_load.json``, which a job writes next to its checkpoints; empty for a model without experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_qad.engine.run_directory.run_files import LOAD_FILE, read_record


@dataclass(frozen=True)
class Experts:
    """Expert statistics of one run."""

    layers: dict[int, dict] = field(default_factory=dict)
    """Token counts as returned by ``ExpertLoad.take``, by index in the layer pattern."""

    @classmethod
    def read(cls, directory: str | Path) -> "Experts":
        load = read_record(directory, LOAD_FILE) or {}
        return cls({int(index): counts for index, counts in load.get("layers", {}).items()})


def expert_rows(name: str, experts: Experts) -> list[list[str]]:
    """Return one table row per layer: run, layer, share of tokens whose experts changed, and the loads of the busiest
    and least busy expert relative to the mean, in teacher and student."""
    rows = []
    for layer, counts in sorted(experts.layers.items()):
        teacher, student = counts["teacher"], counts["student"]
        changed = "not compared" if teacher is None else f"{counts['changed'] / counts['compared']:.2%}"
        row = [name, str(layer), changed]
        row += ["not compared"] * 2 if teacher is None else _extremes(teacher)
        rows.append([*row, *_extremes(student)])
    return rows


def _extremes(load: Sequence[int]) -> list[str]:
    mean = max(sum(load), 1) / len(load)
    return [f"{max(load) / mean:.2f}", f"{min(load) / mean:.2f}"]
