"""Sampling settings of the QAD report's benchmarks: temperature, top-p, and the number of sampled runs of each."""

import re
from dataclasses import dataclass

from megatron_qad.engine.errors import QADError


@dataclass(frozen=True)
class Preset:
    """How the benchmarks of one model of the QAD report were sampled."""

    temperature: float
    top_p: float
    runs: dict[str, int]
    """Sampled runs of each problem by benchmark."""


_REASONING = Preset(0.6, 0.95, {"aime": 48, "gpqa": 20, "livecodebench": 12, "ifeval": 5})
PRESETS = {
    "super": _REASONING,
    "nano-9b-v2": _REASONING,
    "acereason": _REASONING,
    "nemotron-3-nano": Preset(1.0, 1.0, {"aime": 16, "livecodebench": 8, "gpqa": 8, "aa-lcr": 5, "scicode": 5}),
}
"""Presets by model (arXiv:2601.20088). They have no tasks: the user gives task files, with the prompts and answers."""
_ALIASES = {"lcb": "livecodebench", "aalcr": "aa-lcr"}


def find_preset(name: str) -> Preset:
    """Return a preset. Raises QADError if there is none of this name."""
    if name not in PRESETS:
        raise QADError(f"--preset {name}: is not one of {', '.join(PRESETS)}.")
    return PRESETS[name]


def preset_runs(preset: Preset, task: str) -> int:
    """Return the runs of a task, whose name starts with that of a benchmark, such as "aime25" or "gpqa_diamond".

    Raises:
        QADError: the preset has no such benchmark.
    """
    plain = re.sub(r"[^a-z0-9]", "", task.lower())
    names = {name.replace("-", ""): name for name in preset.runs}
    names |= {alias: name for alias, name in _ALIASES.items() if name in preset.runs}
    for start, name in names.items():
        if plain.startswith(start):
            return preset.runs[name]
    raise QADError(
        f"task {task}: the preset has runs for {', '.join(preset.runs)}, and the task's name starts with none of them. "
        f"Rename the task, or give --runs {task}=N."
    )
