"""What an exported directory says about itself, for the run report: its source, formats and size."""

from dataclasses import dataclass
from pathlib import Path

from megatron_qad.checkpoint.weight_files import weight_files
from megatron_qad.engine.errors import QADError
from megatron_qad.engine.run_directory import json_records
from megatron_qad.engine.run_directory.run_files import EXPORT_FILE
from megatron_qad.engine.text_files import read_json


@dataclass(frozen=True)
class Export:
    """A directory that megatron-qad export wrote."""

    directory: str
    """As given by the user."""
    layout: str
    checkpoint: str
    """Name of the run's directory, without its path."""
    iteration: str
    num_bytes: int
    """Bytes of its safetensors files."""

    @property
    def command(self) -> list[str]:
        """The command that serves it, as arguments.

        vLLM reads formats, scales and the format of the KV cache from config.json, so it needs no flag for them.
        """
        return ["vllm", "serve", self.directory]


def read_export(directory: str | Path) -> Export:
    """Read the record of an export.

    Raises:
        QADError: the directory is not a complete export of megatron-qad export.
    """
    file = Path(directory) / EXPORT_FILE
    if not file.is_file():
        raise QADError(f"--export {directory}: no {EXPORT_FILE}. Give the --output of a complete megatron-qad export.")
    record = json_records.read(file)
    if not isinstance(record, dict) or not {"layout", "checkpoint", "iteration"} <= record.keys():
        raise QADError(f"{file}: is not a record of megatron-qad export. Export again.")
    weights = weight_files(Path(directory), read_json(Path(directory) / "config.json"))
    number = str(record["iteration"]).removeprefix("iter_").lstrip("0")
    num_bytes = sum(weight.stat().st_size for weight in weights)
    return Export(str(directory), str(record["layout"]), str(record["checkpoint"]), number or "0", num_bytes)
