"""What quantization does to each linear's weight, and how far training moved it: read from checkpoints layer by layer.

Needs no model and no GPU, but an initialized torch.distributed. Left out: activations, of which only the
calibrated amax is read.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from megatron_qad.checkpoint.export_hf import JOB_FILE
from megatron_qad.checkpoint.torch_dist import TorchDistReader
from megatron_qad.formats import nvfp4, nvfp4_pack
from megatron_qad.models.families import family_of
from megatron_qad.models.families.base import TensorMap
from megatron_qad.runtime.errors import QADError


@dataclass
class RunWeight:
    """One run's part of a ``LinearError``."""

    distance: float
    """||W_run - W_teacher|| / ||W_teacher||, W_run on the NVFP4 grid as it is exported."""
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
    """||fake_quant(W) - W|| / ||W|| of the teacher's weight W as stored."""
    runs: dict[str, RunWeight] = field(default_factory=dict)

    @property
    def projection(self) -> str:
        """ "linear_qkv", "linear_fc2", "output_layer": the module's own name."""
        return self.name.split(".")[-2]


def read_job(directory: str | Path) -> dict | None:
    """The run's ``qad.json``: "policy", "rules", "loss", "formats". None where the directory has none."""
    file = Path(directory) / JOB_FILE
    if not file.is_file():
        return None
    job = json.loads(file.read_text())
    if not isinstance(job.get("formats"), dict):
        raise QADError(
            f"{file}: no map 'formats' in it; expected the file that pretrain_qad.py writes beside checkpoints"
        )
    return job


def read_config(checkpoint: str | Path) -> dict:
    """``hf/config.json`` of a checkpoint directory."""
    file = Path(checkpoint) / "hf" / "config.json"
    if not file.is_file():
        raise QADError(f"{checkpoint}: no hf/config.json; expected a checkpoint directory made by tools/import_hf.py")
    return json.loads(file.read_text())


def has_checkpoint(directory: str | Path) -> bool:
    """Whether a job saved anything there; a save that is damaged counts, and reading it raises."""
    return (Path(directory) / "latest_checkpointed_iteration.txt").is_file()


def linears_of(config: dict) -> list[TensorMap]:
    """The linears that have a weight of their own: all but a tied head."""
    return [linear for linear in family_of(config).linears(config) if not linear.is_tied]


def same_shape(one: dict, other: dict) -> bool:
    """Whether two Hugging Face configs give linears of equal names and shapes, so that weights can be compared."""
    return [(m.megatron, m.shape) for m in linears_of(one)] == [(m.megatron, m.shape) for m in linears_of(other)]


def linear_errors(
    teacher: str | Path, formats: dict[str, dict[str, str]], checkpoints: dict[str, str | Path]
) -> list[LinearError]:
    """Measure every linear that is NVFP4 in any run, in model order.

    Args:
        teacher: checkpoint directory of the BF16 teacher.
        formats: by run, the format of each linear by Megatron weight name (``qad.json``).
        checkpoints: by run, the directory of a checkpoint with the teacher's shapes; runs without one are left out.

    Raises:
        QADError: a missing, wrong-shaped or non-finite tensor; named.
    """
    linears = linears_of(read_config(teacher))
    wanted = [m for m in linears if any(of_run.get(m.megatron) == "nvfp4" for of_run in formats.values())]
    found = []
    for linear, weight in TorchDistReader(teacher).layers(wanted):
        error = relative_distance(_rounded(weight, linear.megatron), weight)
        found.append(LinearError(linear.megatron, linear.layer, linear.shape, error))
    for run, checkpoint in checkpoints.items():
        own = [m for m in wanted if formats[run].get(m.megatron) == "nvfp4"]
        by_name = {error.name: error for error in found}
        reader = TorchDistReader(checkpoint)
        pairs = zip(TorchDistReader(teacher).layers(own), reader.layers(own), strict=True)
        for (linear, of_teacher), (_, of_run) in pairs:
            distance = relative_distance(quantized(of_run, linear.megatron), of_teacher)
            by_name[linear.megatron].runs[run] = RunWeight(distance, _input_amax(reader, linear))
    return found


def quantized(weight: Tensor, name: str) -> Tensor:
    """A saved weight as it is exported: itself if it lies on the NVFP4 grid, else rounded to it (saved between an
    optimizer step and the next quantization)."""
    try:
        nvfp4_pack.pack_on_grid(weight, nvfp4_pack.recover_global_scale(weight, name=name), name=name)
    except nvfp4_pack.OffGridError:
        return _rounded(weight, name)
    return weight


def relative_distance(weight: Tensor, reference: Tensor) -> float:
    """||weight - reference|| / ||reference||, Frobenius norms in float64. 0 between zeros, inf from zero."""
    difference = weight.float() - reference.float()
    distance, size = (torch.linalg.vector_norm(t, dtype=torch.float64).item() for t in (difference, reference))
    if size == 0:
        return 0.0 if distance == 0 else float("inf")
    return distance / size


def _rounded(weight: Tensor, name: str) -> Tensor:
    scale = nvfp4.global_scale_from_amax(nvfp4.tensor_amax(weight), name=name)
    return nvfp4.fake_quant(weight, scale, name=name)


def _input_amax(reader: TorchDistReader, linear: TensorMap) -> float | None:
    name = f"{linear.megatron_module}.input_quantizer._amax"
    return reader.read([name])[name].item() if name in reader else None
