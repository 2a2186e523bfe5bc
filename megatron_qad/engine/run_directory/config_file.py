"""Finds the model's config.json in a checkpoint directory. Needs no torch."""

from pathlib import Path

from megatron_qad.engine.errors import QADError
from megatron_qad.engine.run_directory.iterations import holds_checkpoints
from megatron_qad.engine.run_directory.run_files import JOB_FILE


def model_config_file(checkpoint: str | Path) -> Path:
    """Return the path of ``hf/config.json`` in a checkpoint directory.

    Raises:
        QADError: it does not exist; the error names the right directory, or the import that is needed.
    """
    file = Path(checkpoint) / "hf" / "config.json"
    if not file.is_file():
        raise QADError(
            f"{checkpoint}: no hf/config.json. Expected a checkpoint directory written by megatron-qad import or "
            f"pretrain_qad.py.{_next_step(Path(checkpoint))}"
        )
    return file


def _next_step(directory: Path) -> str:
    """Return the sentence that names the right directory, or the import that this one needs, or an empty string."""
    is_within = (directory.parent / "hf" / "config.json").is_file() and directory.is_dir()
    if is_within and (directory.name != "hf" or holds_checkpoints(directory.parent)):
        number = directory.name.removeprefix("iter_").lstrip("0")
        iteration = f", and --iteration {number} to an export" if number.isdigit() else ""
        return f" Give {directory.parent}{iteration}."
    holds_iteration = holds_checkpoints(directory) or (directory / ".metadata").is_file()
    if holds_iteration and not (directory / JOB_FILE).is_file():
        return (
            f" Import a checkpoint of Megatron first: megatron-qad import --checkpoint {directory} "
            "--hf-config DIR --output NEW"
        )
    if (directory / "config.json").is_file():
        return f" Import a Hugging Face model first: megatron-qad import --hf-model {directory} --output NEW"
    return ""
