"""Quantization error and training distance of each linear's weight, read from checkpoints layer by layer.

Needs no model and no GPU, but torch.distributed must be initialized. Of activations only the calibrated amax is read.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from megatron_qad.checkpoint.torch_dist import TorchDistReader
from megatron_qad.engine.run_directory.iterations import saved_iterations
from megatron_qad.engine.run_directory.run_files import TRACKER
from megatron_qad.formats.common import tensor_amax
from megatron_qad.formats.format_registry import FORMATS
from megatron_qad.models.checkpoint_config import read_config
from megatron_qad.models.families import family_of
from megatron_qad.models.families.base import ParamMapping


@dataclass
class RunWeight:
    """One run's part of a ``LinearError``."""

    distance: float
    """||W_run - W_teacher|| / ||W_teacher||, with W_run quantized as in an export."""
    input_amax: float | None
    """Calibrated amax of the linear's input; None if it is not in the checkpoint."""


@dataclass
class LinearError:
    """Errors of one linear of Megatron, where q, k, v are one weight and gate, up are one weight."""

    name: str
    layer: int | None
    """Index in the layer pattern; None outside the decoder (the head)."""
    shape: tuple[int, ...]
    ptq_error: float
    """||fake_quant(W) - W|| / ||W|| of the teacher's weight W, in the format of the first run that quantizes it."""
    runs: dict[str, RunWeight] = field(default_factory=dict)

    @property
    def projection(self) -> str:
        """The module's own name, such as "linear_qkv", "linear_fc2" or "output_layer"."""
        return self.name.split(".")[-2]


def has_checkpoint(directory: str | Path) -> bool:
    """Whether a job saved a checkpoint there. A damaged checkpoint counts too; reading it raises an error."""
    return (Path(directory) / TRACKER).is_file() or bool(saved_iterations(directory))


def untied_linears(config: dict) -> list[ParamMapping]:
    """Return all linears except a tied head."""
    return [linear for linear in family_of(config).linears(config) if not linear.is_tied]


def have_same_linears(one: dict, other: dict) -> bool:
    """Whether the linears of two Hugging Face configs have equal names and shapes, so that weights can be compared."""
    first, second = ([(m.megatron, m.shape) for m in untied_linears(config)] for config in (one, other))
    return first == second


def linear_errors(
    teacher: str | Path,
    formats: dict[str, dict[str, str]],
    checkpoints: dict[str, str | Path],
    rules: dict[str, str] | None = None,
) -> list[LinearError]:
    """Measure every linear whose weight is quantized in place in any run, in model order.

    Args:
        teacher: checkpoint directory of the BF16 teacher.
        formats: run -> format of each linear by Megatron weight name (from ``qad.json``).
        checkpoints: run -> directory of a checkpoint with the teacher's shapes; other runs are not measured.
        rules: run -> rule of NVFP4's block scales; "max" for runs that are not listed.

    Raises:
        QADError: a missing, wrong-shaped or non-finite tensor; the message has its name.
    """
    rules = rules or {}
    linears = untied_linears(read_config(teacher))
    weight_formats = {
        run: {name: FORMATS[fmt].weight for name, fmt in run_formats.items()} for run, run_formats in formats.items()
    }
    quantizes = {m.megatron: [run for run in formats if weight_formats[run].get(m.megatron)] for m in linears}
    quantized = [m for m in linears if quantizes[m.megatron]]
    errors = []
    for linear, weight in TorchDistReader(teacher).layers(quantized):
        name = linear.megatron
        run = quantizes[name][0]
        number_format = weight_formats[run][name]
        rule = rules.get(run, "max")
        scale = number_format.scale_from_amax(tensor_amax(weight), name=name, rule=rule)
        rounded = number_format.rounded(weight, scale, name=name, rule=rule)
        errors.append(LinearError(name, linear.layer, linear.shape, relative_distance(rounded, weight)))
    for run, checkpoint in checkpoints.items():
        run_linears = [m for m in quantized if run in quantizes[m.megatron]]
        by_name = {error.name: error for error in errors}
        reader = TorchDistReader(checkpoint)
        amaxes = reader.read_amaxes()
        pairs = zip(TorchDistReader(teacher).layers(run_linears), reader.layers(run_linears), strict=True)
        for (linear, teacher_weight), (_, run_weight) in pairs:
            number_format = weight_formats[run][linear.megatron]
            exported = number_format.as_exported(run_weight, name=linear.megatron, rule=rules.get(run, "max"))
            distance = relative_distance(exported, teacher_weight)
            by_name[linear.megatron].runs[run] = RunWeight(distance, _input_amax(amaxes, linear))
    return errors


def relative_distance(weight: Tensor, reference: Tensor) -> float:
    """Return ||weight - reference|| / ||reference|| (Frobenius, float64); 0 if both are 0, inf if only reference is."""
    difference = weight.float() - reference.float()
    distance, size = (torch.linalg.vector_norm(t, dtype=torch.float64).item() for t in (difference, reference))
    if size == 0:
        return 0.0 if distance == 0 else float("inf")
    return distance / size


def _input_amax(amaxes: dict[str, Tensor], linear: ParamMapping) -> float | None:
    amax = amaxes.get(f"{linear.megatron_module}.input_quantizer._amax")
    return None if amax is None else amax.item()
