"""What a run says of its experts: their load in its last evaluation, and those that calibration hardly reached.

Read from ``expert_load.json`` and ``calibration.json``, which a job leaves beside its checkpoints; empty for a model
without experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_qad.engine.run_directory.run_files import CALIBRATION_FILE, LOAD_FILE, read_record


@dataclass(frozen=True)
class Experts:
    """Of one run. ``layers``: as ``ExpertLoad.take`` has them, by index in the layer pattern."""

    layers: dict[int, dict] = field(default_factory=dict)
    few_tokens: dict[str, dict] = field(default_factory=dict)
    """Linears of experts that saw few tokens in calibration: "tokens", and "amax_of", whose amax they took."""

    @classmethod
    def read(cls, directory: str | Path) -> "Experts":
        load, calibration = (read_record(directory, name) or {} for name in (LOAD_FILE, CALIBRATION_FILE))
        layers = {int(index): counts for index, counts in load.get("layers", {}).items()}
        return cls(layers, calibration.get("few_tokens", {}))


def expert_rows(name: str, experts: Experts) -> list[list[str]]:
    """Rows of the report's table, one a layer: run, layer, share of tokens whose experts changed, the busiest and the
    idlest expert's load over the mean, in teacher and student."""
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
