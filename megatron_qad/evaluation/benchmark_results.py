"""Scores of a benchmark by problem and run, as files: one record of settings and one file for each finished run.

    RESULTS/benchmark.json             settings: model, sampling, tasks with the sums of their files
    RESULTS/aime25.run003.jsonl        one line a problem: scores, the answer, checksums of problem and prompt

A run's file appears by a rename when the run is finished, so after a kill the finished runs are kept.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_qad.engine.errors import QADError
from megatron_qad.engine.run_directory import json_records, manifest
from megatron_qad.engine.system_errors import naming
from megatron_qad.engine.text_files import parse_json, read_text

SETTINGS_FILE = "benchmark.json"


@dataclass(frozen=True)
class TaskScores:
    """Scores of one task."""

    problems: list[str]
    """SHA-256 of each problem."""
    prompts: list[str]
    """SHA-256 of each prompt, which depends on the chat template."""
    scores: dict[str, np.ndarray]
    """Scores by "metric,filter", float64 [problems, runs]."""
    higher_is_better: dict[str, bool]

    @property
    def metric(self) -> str:
        """The first metric of the task file."""
        return next(iter(self.scores))


@dataclass(frozen=True)
class Results:
    """All runs of a model."""

    directory: Path
    settings: dict[str, Any]
    tasks: dict[str, TaskScores]


def run_file(directory: Path, task: str, run: int) -> Path:
    return directory / f"{task}.run{run:03d}.jsonl"


def start(directory: Path, settings: dict[str, Any]) -> None:
    """Create a directory of results, or continue the one that was started with the same settings.

    Only the number of runs of a task may differ from before, and tasks may be added.

    Raises:
        QADError: it was started with other settings, or holds something else.
    """
    file = directory / SETTINGS_FILE
    with naming(directory):
        directory.mkdir(parents=True, exist_ok=True)
        if not file.exists() and any(directory.iterdir()):
            raise QADError(f"--output {directory}: holds files but no {SETTINGS_FILE}. Give a new directory.")
    if file.exists():
        before = json_records.read(file)
        for key in ("model", "sampling"):
            if before[key] != settings[key]:
                raise QADError(
                    f"--output {directory}: was started with another {key}: {before[key]}, now {settings[key]}. Give a "
                    "new directory, or the settings of before."
                )
        for name in before["tasks"].keys() & settings["tasks"].keys():
            old, new = ({k: v for k, v in s["tasks"][name].items() if k != "runs"} for s in (before, settings))
            if old != new:
                raise QADError(f"--output {directory}: the files of task {name} have changed. Give a new directory.")
        settings = settings | {"tasks": before["tasks"] | settings["tasks"]}
    json_records.write(file, settings)


def write_run(directory: Path, task: str, run: int, lines: list[dict[str, Any]]) -> None:
    """Write a finished run."""
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    manifest.write_atomically(run_file(directory, task, run), text)


def load(directory: str | Path) -> Results:
    """Read the results of a model.

    Raises:
        QADError: no results, a damaged file, or a run that is missing.
    """
    directory = Path(directory)
    if not (directory / SETTINGS_FILE).is_file():
        raise QADError(f"{directory}: no {SETTINGS_FILE}. Give the --output of megatron-qad benchmark.")
    settings = json_records.read(directory / SETTINGS_FILE)
    return Results(
        directory, settings, {name: _task(directory, name, task) for name, task in settings["tasks"].items()}
    )


def _task(directory: Path, name: str, task: dict[str, Any]) -> TaskScores:
    runs = []
    for run in range(task["runs"]):
        file = run_file(directory, name, run)
        if not file.is_file():
            raise QADError(
                f"{directory}: run {run} of {task['runs']} of {name} is missing. Start the same megatron-qad benchmark "
                "again; it keeps the finished runs."
            )
        lines = [parse_json(line, str(file), "Remove the file.") for line in read_text(file).split("\n") if line]
        if runs and [line["problem"] for line in lines] != [line["problem"] for line in runs[0]]:
            raise QADError(
                f"{file}: holds other problems than run 0. Remove it and start megatron-qad benchmark again."
            )
        runs.append(lines)
    first = runs[0]
    scores = {
        metric: np.array([[line["scores"][metric] for line in lines] for lines in runs], dtype=np.float64).T
        for metric in first[0]["scores"]
    }
    problems, prompts = ([line[key] for line in first] for key in ("problem", "prompt"))
    return TaskScores(problems, prompts, scores, task["higher_is_better"])
