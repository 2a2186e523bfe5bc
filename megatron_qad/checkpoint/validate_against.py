"""Compare the content of an export with the model that training began from; called by ``validate``."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_qad.checkpoint import source_names, validate_model_files
from megatron_qad.checkpoint.expected_tensors import Inventory
from megatron_qad.checkpoint.hf_directory import AddIssue, Shards
from megatron_qad.checkpoint.hf_reader import HFReader
from megatron_qad.checkpoint.layouts import PackedLayout
from megatron_qad.checkpoint.validate_weights import check_weights
from megatron_qad.engine.errors import QADError
from megatron_qad.engine.run_directory import json_records
from megatron_qad.engine.run_directory.run_files import EXPORT_FILE
from megatron_qad.models.families import family_of


@dataclass(frozen=True)
class Original:
    """The model that training began from, and what the export records of the training."""

    reader: HFReader
    movement: float | None
    """Largest distance by which training can have moved a weight; None if it is not recorded."""

    @classmethod
    def open(cls, against: Path, directory: Path) -> "Original":
        """Open the original ``against`` of the export ``directory``.

        Raises:
            QADError: it is not an unquantized Hugging Face model of a supported family, or training began from smoothed
                weights and these are others.
        """
        reader = HFReader(against)
        source_names.resolve(reader, family_of(reader.config).tensors(reader.config))
        record, own = _record(directory), _record(against)
        if record.get("smoothing") != own.get("smoothing"):
            began = (
                "smoothed weights (megatron-qad smooth)"
                if record.get("smoothing")
                else "weights that were not smoothed"
            )
            advice = (
                "megatron-qad export --checkpoint SMOOTHED --output HF --layout bf16 writes smoothed weights as HF."
            )
            raise QADError(f"--against {against}: training began from {began}, and these are others. {advice}")
        movement = record.get("max_movement")
        return cls(reader, float(movement) if isinstance(movement, int | float) else None)

    def check(
        self,
        config: dict[str, Any],
        directory: Path,
        layout: PackedLayout,
        model: Inventory,
        shards: Shards,
        quantized: Mapping[str, str],
        damaged: set[str],
        issue: AddIssue,
    ) -> str | None:
        """Report everything in which the export's content differs from the original.

        Args:
            damaged: names of tensors that already have an issue.

        Returns:
            What could not be compared, or None.
        """
        against = self.reader.directory
        validate_model_files.check_config_entries(config, against, issue)
        validate_model_files.check_generation_config(directory, against, issue)
        check_weights(self.reader, layout, model, shards, quantized, self.movement, damaged, issue)
        return validate_model_files.check_tokenizer(directory, against, issue)


def _record(directory: Path) -> dict[str, Any]:
    """Return the record of an export; empty for other directories."""
    try:
        record = json_records.read(directory / EXPORT_FILE) if (directory / EXPORT_FILE).is_file() else {}
    except QADError:
        return {}  # reported by the check of its sums
    return record if isinstance(record, dict) else {}
