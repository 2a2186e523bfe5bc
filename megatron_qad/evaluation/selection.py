"""Selection of a run's checkpoint: each kept best checkpoint is evaluated once, and the best average is chosen.

    OUTPUT/candidates.json             the candidates and how they are evaluated; fixed by the first start
    OUTPUT/iter_0000300/results        what the evaluation of a candidate wrote
    OUTPUT/iter_0000300/evaluated.json written when it is complete
    RUN/selection.json                 the choice and its reasons; ``--iteration selected`` reads it

Results are records of ``megatron-qad evaluate``, of which the lowest KL wins, or benchmark results, of which the
highest average over the tasks wins.
"""

import contextlib
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_qad.engine.errors import QADError
from megatron_qad.engine.plural import count
from megatron_qad.engine.run_directory import json_records, manifest
from megatron_qad.engine.run_directory.iterations import BEST_KEY, validations
from megatron_qad.engine.run_directory.run_files import SELECTION_FILE
from megatron_qad.engine.system_errors import naming
from megatron_qad.evaluation import benchmark_results, record
from megatron_qad.evaluation.benchmark_comparison import compare_benchmarks
from megatron_qad.evaluation.bootstrap import FEW_ROWS, Interval, RowBootstrap
from megatron_qad.evaluation.comparison import check_comparable
from megatron_qad.evaluation.comparison_tables import interval, table

CANDIDATES_FILE, DONE_FILE, TABLE_FILE = "candidates.json", "evaluated.json", "selection.md"


@dataclass(frozen=True)
class Candidate:
    """A kept checkpoint."""

    iteration: int
    kl: float
    """KL of the job's own validation."""
    directory: Path
    """Directory of its evaluation."""

    @property
    def results(self) -> Path:
        return self.directory / "results"

    @property
    def is_done(self) -> bool:
        return (self.directory / DONE_FILE).is_file()

    def finish(self) -> None:
        """Record that the results are complete. Raises QADError if they cannot be read."""
        load_results(self.results)
        json_records.write(self.directory / DONE_FILE, {"iteration": self.iteration})


def find_candidates(run: Path, output: Path, evaluation: Mapping[str, Any]) -> list[Candidate]:
    """Return the candidates of a selection, best validation first. The first call writes them to ``output``.

    Args:
        run: directory of a run with ``--qad-keep-best``.
        evaluation: how candidates are evaluated, as JSON. A later call must give the same.

    Raises:
        QADError: no kept checkpoint with a validation, or a selection that was started with others.
    """
    validated = [e for e in validations(run) if (run / f"iter_{e['iteration']:07d}" / ".metadata").is_file()]
    found = [{"iteration": entry["iteration"], "kl": entry[BEST_KEY]} for entry in validated]
    file = output / CANDIDATES_FILE
    if not found:
        raise QADError(f"--run {run}: no checkpoint with a validation. Train with --eval-interval and --qad-keep-best.")
    with naming(output):
        output.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            others = [path.name for path in output.iterdir() if not path.name.startswith(".")]
            if others and not file.exists():  # another task of an array may have begun in the meantime
                raise QADError(f"--output {output}: holds {others[0]} but no {CANDIDATES_FILE}. Give a new directory.")
            _write_once(file, {"run": str(run.resolve()), "evaluation": evaluation, "candidates": found})
    before = json_records.read(file)
    if before["run"] != str(run.resolve()) or before["evaluation"] != evaluation:
        raise QADError(
            f"--output {output}: was started with {before['run']} and {before['evaluation']}, now {run.resolve()} and "
            f"{evaluation}. Give a new directory, or the same command."
        )
    # A job that still runs may have removed or trained again what the selection began with.
    for entry in before["candidates"]:
        if entry not in found:
            raise QADError(
                f"--run {run}: iteration {entry['iteration']} with validation KL {entry['kl']:.6g} is no longer there. "
                "Select after the job has ended, with a new --output."
            )
    return [Candidate(e["iteration"], e["kl"], output / f"iter_{e['iteration']:07d}") for e in before["candidates"]]


def _write_once(file: Path, content: Any) -> None:
    """Write a record unless another process is faster: the tasks of a job array begin at the same time."""
    aside = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    manifest.write_atomically(aside, json_records.to_text(file.name, content))
    with contextlib.suppress(FileExistsError):
        os.link(aside, file)
    aside.unlink()


def load_results(directory: Path) -> benchmark_results.Results | record.Evaluation:
    """Read what the evaluation of a candidate wrote. Raises QADError if that is not complete."""
    if (directory / benchmark_results.SETTINGS_FILE).is_file():
        return benchmark_results.load(directory)
    if not (directory / record.RECORD_FILE).is_file():
        raise QADError(
            f"{directory}: the evaluation wrote neither {benchmark_results.SETTINGS_FILE} nor {record.RECORD_FILE}. "
            "Its command must write to {results}."
        )
    return record.load(directory)


def select(candidates: Sequence[Candidate]) -> dict[str, Any]:
    """Choose the candidate with the best average, and return the content of ``selection.json``.

    Raises:
        QADError: the results cannot be compared.
    """
    loaded = {str(c.iteration): load_results(c.results) for c in candidates}
    if len({type(results) for results in loaded.values()}) > 1:
        raise QADError("the candidates have results of two kinds. Evaluate all with one command and a new --output.")
    if isinstance(next(iter(loaded.values())), record.Evaluation):
        measure, rows, best, means, differences = _by_kl(loaded)
    else:
        measure, rows, best, means, differences = _by_benchmarks(loaded)
    entries = [
        {"iteration": c.iteration, "validation_kl": c.kl, "mean": means[str(c.iteration)].record()}
        | {"difference_to_best": d.record() if (d := differences.get(str(c.iteration))) else None}
        for c in candidates
    ]
    result = {"iteration": int(best), "measure": measure, "rows": rows, "candidates": entries}
    return result | {"why": _why(result)}


def write_selection(run: Path, output: Path, selection: Mapping[str, Any]) -> None:
    """Write the choice next to the evaluations and into the run, where ``--iteration selected`` reads it."""
    (output / TABLE_FILE).write_text(markdown(selection), encoding="utf-8")
    for directory in (output, run):
        json_records.write(directory / SELECTION_FILE, dict(selection))


def markdown(selection: Mapping[str, Any]) -> str:
    """Return the choice as a table and a paragraph."""
    rows = [
        [str(c["iteration"]), f"{c['validation_kl']:.4g}", interval(c["mean"], ".4g")]
        + ["best" if c["difference_to_best"] is None else interval(c["difference_to_best"], "+.4g")]
        for c in selection["candidates"]
    ]
    heads = ["iteration", "validation KL", selection["measure"], "difference to the best"]
    return f"# Selected: iteration {selection['iteration']}\n\n{table(heads, rows, left=0)}\n\n{selection['why']}\n"


def _by_kl(loaded: Mapping[str, record.Evaluation]) -> tuple:
    for name, evaluation in loaded.items():
        evaluation.about["name"] = f"iteration {name}"  # the records of one run have one name
    check_comparable(list(loaded.values()))
    kl = {name: evaluation.tokens["kl_to_teacher"] for name, evaluation in loaded.items()}
    bootstrap = RowBootstrap(next(iter(loaded.values())).tokens["row"])
    best = min(kl, key=lambda name: (kl[name].mean(dtype=np.float64), int(name)))
    means = {name: bootstrap.mean(values) for name, values in kl.items()}
    differences = {name: bootstrap.difference(values, kl[best]) for name, values in kl.items() if name != best}
    return "KL to the teacher", bootstrap.num_rows, best, means, differences


def _by_benchmarks(loaded: Mapping[str, benchmark_results.Results]) -> tuple:
    compared = compare_benchmarks(loaded)
    task = list(compared.means)[-1]  # the average, if there are several tasks
    is_average = len(compared.means) > 1
    best = max(loaded, key=lambda name: (_score(loaded[name]), -int(name)))
    differences = {name: compared.differences[task][name, best] for name in loaded if name != best}
    measure = "average over the tasks" if is_average else task
    return measure, compared.problems[task], best, compared.means[task], differences


def _score(results: benchmark_results.Results) -> float:
    """Return the mean over the tasks, with the sign turned where lower is better."""
    values = []
    for task in results.tasks.values():
        sign = 1 if task.higher_is_better.get(task.metric.split(",")[0], True) else -1
        values.append(sign * float(task.scores[task.metric].mean()))
    return float(np.mean(values))


def _why(selection: Mapping[str, Any]) -> str:
    best, entries = selection["iteration"], selection["candidates"]
    text = f"Iteration {best} has the best {selection['measure']} of {count(len(entries), 'candidate')}."
    others = {c["iteration"]: Interval(**c["difference_to_best"]) for c in entries if c["difference_to_best"]}
    tied = [str(iteration) for iteration, difference in others.items() if not difference.excludes_zero]
    if tied:
        text += (
            f" It is within noise of {'iteration' if len(tied) == 1 else 'iterations'} {', '.join(tied)}: the 95 % "
            "interval of the difference contains 0, so another choice among them is as well founded."
        )
    elif others:
        text += " Its lead over each of the others is larger than noise."
    if len(entries) > 1:
        text += " The best of several is somewhat better on the data that chose it than on others."
    if selection["rows"] < FEW_ROWS:
        text += f" With {selection['rows']} rows or problems the intervals are rough and usually too narrow."
    return text
