"""Task files of lm-evaluation-harness whose data lie on this machine: reading, checks and checksums.

lm-eval would download a data set or a metric that a task names. Here every file of a task is found, summed and checked
before anything starts. A task file may name Python functions (``!function``), which run: use only files that you trust.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_qad.engine.errors import QADError
from megatron_qad.engine.run_directory import manifest

_LOADERS = ("json", "csv", "parquet", "arrow", "text")
"""Loaders of ``datasets`` that read files, as a task's ``dataset_path``."""
_OUTPUTS = ("generate_until", "multiple_choice", "loglikelihood")
_HOW = (
    "Download the data once by hand and write `dataset_path: json` with `dataset_kwargs: {data_files: {test: FILE}}` "
    "(docs/benchmarking.md)."
)


def harness():
    """Return the package ``lm_eval``, offline. Raises QADError if it is not installed."""
    for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE", "HF_EVALUATE_OFFLINE", "TRANSFORMERS_OFFLINE"):
        os.environ[name] = "1"
    try:
        import lm_eval
        import lm_eval.evaluator
        import lm_eval.tasks
    except ImportError as error:
        raise QADError(
            f"benchmarks need lm-evaluation-harness ({error}). Install it: pip install -e '.[benchmarks]'."
        ) from error
    return lm_eval


@dataclass(frozen=True)
class TaskFile:
    """A checked task."""

    name: str
    file: Path
    config: dict[str, Any]
    """The YAML with its includes, functions resolved and paths of data absolute."""
    sums: dict[str, str]
    """SHA-256 of the task file, its includes, Python files and data files, by file name."""

    @property
    def is_sampled(self) -> bool:
        """Whether the model writes an answer. Otherwise log-probabilities decide, and all runs are the same."""
        return self.config["output_type"] == "generate_until"

    @property
    def max_new_tokens(self) -> int | None:
        """Maximum length of an answer by the task file, in tokens."""
        settings = self.config.get("generation_kwargs") or {}
        found = [settings[name] for name in ("max_gen_toks", "max_new_tokens", "max_tokens") if name in settings]
        return int(found[0]) if found else None


def read_task(file: str | Path) -> TaskFile:
    """Read a task file and find its data.

    Raises:
        QADError: it is not a task of one output type, or something of it would be downloaded.
    """
    file = Path(file)
    if not file.is_file():
        raise QADError(f"--tasks {file}: no such file. Give task files (YAML); tasks are not looked up by name.")
    harness()
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        config, plain = load_yaml(file), load_yaml(file, resolve_func=False)
    except Exception as error:  # PyYAML's errors, and any that the user's Python files raise
        raise QADError(f"--tasks {file}: cannot be read: {type(error).__name__}: {error}.") from error
    name = config.get("task")
    if not isinstance(name, str) or "/" in name:
        raise QADError(
            f"--tasks {file}: has no `task: NAME`. Groups of tasks are not read; give the files of its tasks."
        )
    _check(file, name, config)
    data = _local_data(file, name, config)
    files = [file, *_includes(file), *_python_files(plain), *data]
    sums = {str(path.resolve()): manifest.sum_of(path)[1] for path in dict.fromkeys(files)}
    return TaskFile(name, file, config, {Path(path).name: digest for path, digest in sorted(sums.items())})


def _check(file: Path, name: str, config: dict[str, Any]) -> None:
    where = f"task {name} ({file})"
    if config.get("output_type", "generate_until") not in _OUTPUTS:
        raise QADError(f"{where}: output_type {config['output_type']!r} is not one of {', '.join(_OUTPUTS)}.")
    config.setdefault("output_type", "generate_until")
    if config.get("repeats", 1) != 1:
        raise QADError(f"{where}: repeats is {config['repeats']}, which keeps one answer. Remove it and give --runs.")
    if config.get("custom_dataset") is not None:
        raise QADError(f"{where}: custom_dataset is a function, which may download. {_HOW}")
    from lm_eval.api import metrics, registry

    assert metrics  # its import registers the metrics
    for entry in config.get("metric_list") or []:
        metric = entry.get("metric")
        is_own = config.get("process_results") is not None or callable(metric)
        if entry.get("hf_evaluate") or not (is_own or metric in registry.metric_registry):
            raise QADError(f"{where}: the metric {metric!r} is not in lm-eval and would be downloaded. Use another.")


def _local_data(file: Path, name: str, config: dict[str, Any]) -> list[Path]:
    """Make the paths of the task's data absolute, relative to the task file, and return the files."""
    path = config.get("dataset_path")
    if path is None:
        raise QADError(f"task {name} ({file}): no dataset_path. {_HOW}")
    folder = (file.parent / path).resolve()
    if path not in _LOADERS and folder.is_dir():
        config["dataset_path"] = str(folder)
        return sorted(part for part in folder.rglob("*") if part.is_file())
    kwargs = dict(config.get("dataset_kwargs") or {})
    data = kwargs.get("data_files")
    if path not in _LOADERS or data is None:
        raise QADError(
            f"task {name} ({file}): the data set {path!r} is not on this machine and would be downloaded. {_HOW}"
        )
    found: list[Path] = []

    def absolute(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: absolute(part) for key, part in value.items()}
        if isinstance(value, list):
            return [absolute(part) for part in value]
        target = (file.parent / str(value)).resolve()
        if not target.is_file():
            raise QADError(f"task {name} ({file}): the data file {value} does not exist ({target}). {_HOW}")
        found.append(target)
        return str(target)

    config["dataset_kwargs"] = kwargs | {"data_files": absolute(data)}
    return found


def _includes(file: Path) -> Iterator[Path]:
    from lm_eval.tasks._yaml_loader import load_yaml

    included = load_yaml(file, resolve_func=False, recursive=False).get("include") or []
    for name in included if isinstance(included, list) else [included]:
        yield file.parent / name
        yield from _includes(file.parent / name)


def _python_files(value: Any) -> Iterator[Path]:
    """Yield the Python files of the functions in a task whose ``!function`` tags are paths."""
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _python_files(part)
    elif isinstance(value, str) and "/" in value and "." in value and "\n" not in value:
        source = Path(f"{value.rpartition('.')[0]}.py")
        if os.path.isfile(source):  # False also for a text that cannot be a path
            yield source
