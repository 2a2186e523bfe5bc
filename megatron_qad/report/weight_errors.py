"""What quantization does to each linear's weight, and how far training moved it: read from checkpoints layer by layer.

Needs no model and no GPU, but an initialized torch.distributed. Left out: activations, of which only the
calibrated amax is read.
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
    """||W_run - W_teacher|| / ||W_teacher||, W_run on its format's grid as it is exported."""
    input_amax: float | None
    """Calibrated amax of the linear's input; None if the checkpoint has none."""


@dataclass
class LinearError:
    """One linear, by its Megatron name (q, k, v and gate, up are one weight there)."""

    name: str
    layer: int | None
    """Index in the layer pattern; None outside the decoder (the head)."""
    shape: tuple[int, ...]
    ptq_error: float
    """||fake_quant(W) - W|| / ||W|| of the teacher's weight W as stored, in the format of the first run that quantizes
    it."""
    runs: dict[str, RunWeight] = field(default_factory=dict)

    @property
    def projection(self) -> str:
        """ "linear_qkv", "linear_fc2", "output_layer": the module's own name."""
        return self.name.split(".")[-2]


def has_checkpoint(directory: str | Path) -> bool:
    """Whether a job saved anything there; a save that is damaged counts, and reading it raises."""
    return (Path(directory) / TRACKER).is_file() or bool(saved_iterations(directory))


def untied_linears(config: dict) -> list[ParamMapping]:
    """The linears that have a weight of their own: all but a tied head."""
    return [linear for linear in family_of(config).linears(config) if not linear.is_tied]


def have_same_linears(one: dict, other: dict) -> bool:
    """Whether two Hugging Face configs give linears of equal names and shapes, so that weights can be compared."""
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
        formats: by run, the format of each linear by Megatron weight name (``qad.json``).
        rules: by run, the rule of NVFP4's block scales; "max" where a run is not named.
        checkpoints: by run, the directory of a checkpoint with the teacher's shapes; runs without one are left out.

    Raises:
        QADError: a missing, wrong-shaped or non-finite tensor; named.
    """
    rules = rules or {}
    linears = untied_linears(read_config(teacher))
    weight_formats = {
        run: {name: FORMATS[fmt].weight_in_place for name, fmt in of_run.items()} for run, of_run in formats.items()
    }
    quantizes = {m.megatron: [run for run in formats if weight_formats[run].get(m.megatron)] for m in linears}
    wanted = [m for m in linears if quantizes[m.megatron]]
    found = []
    for linear, weight in TorchDistReader(teacher).layers(wanted):
        name = linear.megatron
        run = quantizes[name][0]
        number_format = weight_formats[run][name]
        scale = number_format.scale_from_amax(tensor_amax(weight), name=name)
        rounded = number_format.rounded(weight, scale, name=name, rule=rules.get(run, "max"))
        found.append(LinearError(name, linear.layer, linear.shape, relative_distance(rounded, weight)))
    for run, checkpoint in checkpoints.items():
        own = [m for m in wanted if run in quantizes[m.megatron]]
        by_name = {error.name: error for error in found}
        reader = TorchDistReader(checkpoint)
        amaxes = reader.read_amaxes()
        pairs = zip(TorchDistReader(teacher).layers(own), reader.layers(own), strict=True)
        for (linear, of_teacher), (_, of_run) in pairs:
            number_format = weight_formats[run][linear.megatron]
            exported = number_format.as_exported(of_run, name=linear.megatron, rule=rules.get(run, "max"))
            distance = relative_distance(exported, of_teacher)
            by_name[linear.megatron].runs[run] = RunWeight(distance, _input_amax(amaxes, linear))
    return found


def relative_distance(weight: Tensor, reference: Tensor) -> float:
    """||weight - reference|| / ||reference||, Frobenius norms in float64. 0 between zeros, inf from zero."""
    difference = weight.float() - reference.float()
    distance, size = (torch.linalg.vector_norm(t, dtype=torch.float64).item() for t in (difference, reference))
    if size == 0:
        return 0.0 if distance == 0 else float("inf")
    return distance / size


def _input_amax(amaxes: dict[str, Tensor], linear: ParamMapping) -> float | None:
    amax = amaxes.get(f"{linear.megatron_module}.input_quantizer._amax")
    return None if amax is None else amax.item()
