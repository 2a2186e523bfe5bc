"""The Python API: quantize a transformers model, train it by distillation, export and validate it.

    from megatron_qad.api import Policy, QADTrainer, export_hf, quantize_model, validate

Everything else in the package may change without notice. Importing this module imports nothing heavy: each name is
loaded when it is first used. ``docs/python_api.md`` has an example from a model to a validated export.
"""

import contextlib
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_qad.engine import megatron_warnings

if TYPE_CHECKING:
    from megatron_qad.checkpoint.hf_writer import Written
    from megatron_qad.checkpoint.layouts import LayoutName
    from megatron_qad.checkpoint.validate import ValidationResult
    from megatron_qad.data.metadata import DataMetadata
    from megatron_qad.distillation.kl_loss import kl_loss
    from megatron_qad.hf_training.qad_trainer import QADTrainer
    from megatron_qad.hf_training.quantize_model import quantize_model
    from megatron_qad.hf_training.training_rows import PreparedRows
    from megatron_qad.quantization.policy import Policy

_LOADED = {
    "Policy": "megatron_qad.quantization.policy",
    "PreparedRows": "megatron_qad.hf_training.training_rows",
    "QADTrainer": "megatron_qad.hf_training.qad_trainer",
    "kl_loss": "megatron_qad.distillation.kl_loss",
    "quantize_model": "megatron_qad.hf_training.quantize_model",
}
"""Names that another module defines."""

__all__ = ["Policy", "PreparedRows", "QADTrainer", "export_hf", "import_hf", "kl_loss", "prepare_data"]
__all__ += ["quantize_model", "validate"]


def __getattr__(name: str) -> Any:
    if name not in _LOADED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    megatron_warnings.hide()
    return getattr(importlib.import_module(_LOADED[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


def import_hf(
    hf_model: str | Path, output: str | Path, *, dtype: str = "bfloat16", num_workers: int | None = None
) -> int:
    """Import a Hugging Face model as a checkpoint for Megatron's jobs (``pretrain_qad.py``); QADTrainer needs none.

    Args:
        hf_model: directory with config.json and safetensors files.
        output: a new or empty directory.
        dtype: dtype of the stored weights, "bfloat16" or "float32".
        num_workers: worker processes. None: one for each core.

    Returns:
        The number of imported tensors.

    Raises:
        QADError: as ``megatron_qad.checkpoint.import_hf.import_hf``, or another dtype.

    Example::

        import_hf("my_model", "checkpoints/teacher")
    """
    from megatron_qad.engine.errors import QADError
    from megatron_qad.engine.file_runtime import file_runtime

    if dtype not in ("bfloat16", "float32"):
        raise QADError(f"dtype is {dtype!r}, expected 'bfloat16' or 'float32'.")
    with file_runtime(), _arguments_instead_of_flags("hf_model", "output", "dtype", "num_workers"):
        import torch

        from megatron_qad.checkpoint import import_hf as importer

        return importer.import_hf(hf_model, output, getattr(torch, dtype), num_workers)


def prepare_data(inputs: list[str], tokenizer: str, output: str, **options: Any) -> "DataMetadata":
    """Tokenize text, JSON lines, chats or parquet files into OUTPUT.bin/.idx with a loss mask.

    ``PreparedRows(output, max_length)`` are rows of it for ``QADTrainer``; Megatron's jobs read it as ``--data-path``.

    Args:
        inputs: files, or directories of Hugging Face datasets.
        tokenizer: Hugging Face tokenizer directory or sentencepiece .model file.
        output: prefix of the output files.
        options: other fields of ``megatron_qad.data.prepare_options.PrepareOptions``: ``validation_fraction``,
            ``json_key``, ``workers``, ``force``, ...

    Returns:
        The metadata of the output: number of documents, tokens, tokens in the loss, bad lines.

    Raises:
        QADError: an unreadable input, too many bad lines, an output that exists, or an unknown option.

    Example::

        prepare_data(["chats.jsonl"], "my_model", "data/chats", validation_fraction=0.01)
        rows, held_out = PreparedRows("data/chats", 1024), PreparedRows("data/chats_valid", 1024)
    """
    import dataclasses

    megatron_warnings.hide()
    from megatron_qad.data.prepare import prepare_data as prepare
    from megatron_qad.data.prepare_options import PrepareOptions
    from megatron_qad.engine.errors import QADError

    known = [field.name for field in dataclasses.fields(PrepareOptions)]
    if unknown := sorted(options.keys() - set(known)):
        raise QADError(f"prepare_data: unknown option {unknown[0]!r}, expected one of {', '.join(known)}.")
    with _arguments_instead_of_flags(*known, input="inputs", images_for="images"):
        return prepare(PrepareOptions(inputs=list(inputs), tokenizer=str(tokenizer), output=str(output), **options))


def export_hf(
    checkpoint: str | Path,
    output: str | Path,
    layout: "LayoutName" = "modelopt",
    *,
    iteration: int | str | None = None,
    num_workers: int | None = None,
) -> "Written":
    """Export a checkpoint of QADTrainer, or of a Megatron job, as a Hugging Face directory for servers.

    With several processes (torchrun) all of them call it, and share the work.

    Args:
        checkpoint: directory of ``QADTrainer.save_model``, ``checkpoint-N`` of its training, or ``--save`` of a job.
        output: a new or empty directory.
        layout: "modelopt" (vLLM, SGLang, TensorRT-LLM), "compressed-tensors" (vLLM, transformers) or "bf16" (unpacked).
        iteration: of a Megatron job: a number, "best" or "selected"; None is the newest.
        num_workers: worker processes. None: one for each core.

    Returns:
        What was written: tensors, bytes, the format of each quantized module, the modules that are not quantized.

    Raises:
        QADError: as ``megatron_qad.checkpoint.export_hf.export_hf``.

    Example::

        trainer.save_model("run")
        written = export_hf("run", "exports/nvfp4")
        print(written.num_tensors, written.excluded)
    """
    from megatron_qad.engine.file_runtime import file_runtime
    from megatron_qad.engine.run_directory.run_files import TRACKER

    reads_torch_dist = (Path(checkpoint) / TRACKER).is_file()
    names = ("checkpoint", "output", "layout", "iteration", "num_workers")
    with file_runtime(reads_torch_dist=reads_torch_dist), _arguments_instead_of_flags(*names):
        from megatron_qad.checkpoint import export_hf as exporter

        return exporter.export_hf(checkpoint, output, layout, iteration=iteration, num_workers=num_workers)


def validate(directory: str | Path, *, against: str | Path | None = None, with_sums: bool = True) -> "ValidationResult":
    """Validate an exported directory, as strictly as the strictest server. A damaged export is a result, not an error.

    Args:
        directory: an export in the layout modelopt or compressed-tensors.
        against: Hugging Face directory of the model that training began from, with which weights, configuration and
            tokenizer are compared.
        with_sums: whether to compare every file with its SHA-256 at the time of the export.

    Returns:
        The result; the export is valid if ``issues`` is empty. ``summary()`` is one line.

    Raises:
        QADError: ``against`` is not an unquantized model of a supported family.

    Example::

        result = validate("exports/nvfp4", against="my_model")
        assert not result.issues, result.issues
    """
    megatron_warnings.hide()
    from megatron_qad.checkpoint.validate import validate_nvfp4

    with _arguments_instead_of_flags("against", "with_sums"):
        return validate_nvfp4(directory, against=against, with_sums=with_sums)


@contextlib.contextmanager
def _arguments_instead_of_flags(*names: str, **names_of_flags: str) -> Iterator[None]:
    """Replace flags by the names of arguments in errors: ``--split-on`` by ``split_on``. Other flags stay."""
    from megatron_qad.engine.errors import QADError

    arguments = {name: name for name in names} | names_of_flags

    def argument(flag: re.Match[str]) -> str:
        return arguments.get(flag[1].replace("-", "_"), flag[0])

    try:
        yield
    except QADError as error:
        raise QADError(re.sub(r"--([a-z]+(?:-[a-z]+)*)", argument, str(error))) from error
