"""Runs benchmarks: every task N times with recorded seeds, through lm-evaluation-harness; finished runs are kept.

Run r of a task depends on the seed and on r alone, not on the runs before it in the same process, so a benchmark that
was killed ends with the same scores as one that was not.
"""

import logging
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import megatron_qad
from megatron_qad.engine.errors import QADError
from megatron_qad.engine.run_directory import locks
from megatron_qad.evaluation import benchmark_results
from megatron_qad.evaluation.benchmark_models import BenchmarkModel
from megatron_qad.evaluation.benchmark_tasks import TaskFile, harness


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled."""

    temperature: float = 0.6
    """0 takes the most likely token."""
    top_p: float = 0.95
    max_new_tokens: int | None = None
    """Maximum length of an answer in tokens. None: that of the task file."""
    seed: int = 1234
    """Run r has the seed ``seed + r``."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0 and 0 < self.top_p <= 1):
            raise QADError(
                f"--temperature must be at least 0 and --top-p in (0, 1], found {self.temperature}, {self.top_p}."
            )
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise QADError(f"--max-new-tokens must be at least 1, found {self.max_new_tokens}.")

    def arguments(self, task: TaskFile, neutral: Mapping[str, Any]) -> dict[str, Any]:
        """Return lm-eval's generation arguments, which replace those of the task file except for stop strings.

        neutral: arguments that switch off other limits of the distribution
        """
        length = self.max_new_tokens or task.max_new_tokens
        if length is None:
            raise QADError(
                f"task {task.name}: has no max_gen_toks. Give --max-new-tokens, or answers would be cut at 256."
            )
        sampled = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, **neutral}
        return {"max_gen_toks": length, **(sampled if self.temperature else {"do_sample": False, "temperature": 0.0})}


def check_runs(tasks: Sequence[TaskFile], runs: Mapping[str, int], sampling: Sampling) -> dict[str, int]:
    """Return the runs of each task: one where all runs would be the same.

    Raises:
        QADError: two tasks of one name, a number below 1, or several runs at temperature 0.
    """
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise QADError(f"--tasks: two files have a task of the same name: {', '.join(names)}. Rename one.")
    for task in tasks:
        if runs[task.name] < 1:
            raise QADError(f"--runs {task.name}={runs[task.name]}: must be at least 1.")
        if task.is_sampled:
            sampling.arguments(task, {})
            if runs[task.name] > 1 and sampling.temperature == 0:
                raise QADError(f"--runs {runs[task.name]} at temperature 0 gives equal runs. Give --runs 1.")
    return {task.name: runs[task.name] if task.is_sampled else 1 for task in tasks}


def run_benchmarks(
    model: BenchmarkModel,
    tasks: Sequence[TaskFile],
    runs: Mapping[str, int],
    sampling: Sampling,
    output: Path,
    unsafe_code: bool = False,
) -> int:
    """Run what ``output`` does not hold yet, and return the number of runs that were made.

    Args:
        runs: number of runs by task, from ``check_runs``.
        unsafe_code: allow tasks that execute what the model wrote.

    Raises:
        QADError: ``output`` was started with other settings, or a task cannot be run.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with locks.lock_output(output):
        built = {task.name: _build(task, sampling, model) for task in tasks}
        benchmark_results.start(output, _settings(model, tasks, built, runs, sampling))
        done = 0
        for task in tasks:
            for run in range(runs[task.name]):
                if benchmark_results.run_file(output, task.name, run).exists():
                    continue
                lines = _run(model, task, built[task.name], sampling.seed + run, unsafe_code)
                benchmark_results.write_run(output, task.name, run, lines)
                first = next(iter(lines[0]["scores"]))
                mean = sum(line["scores"][first] for line in lines) / len(lines)
                print(f"{task.name}, run {run + 1} of {runs[task.name]}: {first} {mean:.4f}", flush=True)
                done += 1
    return done


def _build(task: TaskFile, sampling: Sampling, model: BenchmarkModel) -> Any:
    """Return lm-eval's object of a task, with its data."""
    manager = harness().tasks.TaskManager(include_defaults=False)
    config = dict(task.config)
    if task.is_sampled:
        stops = {key: value for key, value in (config.get("generation_kwargs") or {}).items() if key == "until"}
        config["generation_kwargs"] = stops | sampling.arguments(task, model.neutral)
    try:
        (built,) = manager.load([config])["tasks"].values()
    except Exception as error:  # a template, a split or a file of the user's task may be wrong in any way
        raise QADError(
            f"task {task.name} ({task.file}): lm-eval cannot load it: {type(error).__name__}: {error}."
        ) from error
    if built.get_config("num_fewshot") is None:
        built.set_config(key="num_fewshot", value=0)
    return built


def _settings(model, tasks, built, runs, sampling: Sampling) -> dict[str, Any]:
    return {
        "model": model.identity,
        "sampling": {"chat": model.chat, "temperature": sampling.temperature, "top_p": sampling.top_p}
        | {"max_new_tokens": sampling.max_new_tokens, "seed": sampling.seed},
        "tasks": {
            task.name: {
                "runs": runs[task.name],
                "sampled": task.is_sampled,
                "files": task.sums,
                "higher_is_better": {k: v is not False for k, v in built[task.name].higher_is_better().items()},
            }
            for task in tasks
        },
        "versions": {"lm_eval": harness().__version__, "megatron_qad": megatron_qad.__version__},
    }


def _run(model: BenchmarkModel, task: TaskFile, built: Any, seed: int, unsafe_code: bool) -> list[dict[str, Any]]:
    """Run a task once and return the lines of its file."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    model.use_seed(seed)
    built.set_fewshot_seed(1234)  # the same examples in every run
    try:
        results = harness().evaluator.evaluate(
            model.lm,
            {"tasks": {task.name: built}, "groups": {}, "group_map": {}},
            bootstrap_iters=0,
            apply_chat_template=model.chat,
            confirm_run_unsafe_code=unsafe_code,
        )
    except (ValueError, AssertionError, NotImplementedError) as error:  # lm-eval's refusals
        raise QADError(f"task {task.name}: lm-eval cannot run it: {' '.join(str(error).split())}") from error
    problems: dict[int, dict[str, Any]] = {}
    for sample in results["samples"][task.name]:
        line = problems.setdefault(
            sample["doc_id"],
            {"id": sample["doc_id"], "seed": seed, "problem": sample["doc_hash"], "prompt": sample["prompt_hash"]}
            | {"scores": {}, "answers": {}},
        )
        line["answers"][sample["filter"]] = sample["filtered_resps"]
        for metric in sample["metrics"]:
            if isinstance(value := sample[metric], bool | int | float | np.number):
                line["scores"][f"{metric},{sample['filter']}"] = float(value)
    lines = [problems[key] for key in sorted(problems)]
    if not lines or not lines[0]["scores"]:
        raise QADError(f"task {task.name}: has no metric with a number for each problem.")
    return lines
