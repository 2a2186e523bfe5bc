"""Read a checkpoint of QADTrainer (``hf_training``) with the interface of ``TorchDistReader``.

The directory is one of transformers: float32 masters under their Hugging Face names in ``model.safetensors``, and next
to the weight of each quantized linear the buffers ``input_amax``, ``weight_amax`` and ``weight_block_scales``. ``hf/``
and ``qad.json`` are those of Megatron's runs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_qad.checkpoint.hf_reader import HFReader
from megatron_qad.engine.errors import QADError
from megatron_qad.formats.common import tensor_amax
from megatron_qad.models.families.base import ParamMapping
from megatron_qad.models.weight_loading import AMAX as INPUT_AMAX
from megatron_qad.quantization.carried_scales import AMAX, BLOCK_SCALES

SAVED_BY = "QADTrainer"
"""Entry "saved_by" of the ``qad.json`` of such a checkpoint."""
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def is_trainer_checkpoint(job: dict[str, Any] | None) -> bool:
    """Whether a ``qad.json`` (None: there is none) is that of a checkpoint of QADTrainer."""
    return job is not None and job.get("saved_by") == SAVED_BY


class TrainerCheckpointReader:
    """Reader of Megatron's global tensors from the Hugging Face tensors of one checkpoint.

    Args:
        checkpoint: directory that ``QADTrainer.save_model`` or a save of its training wrote.
        maps: all tensors of the model.

    Raises:
        QADError: no weights, or damaged ones.

    Example::

        reader = TrainerCheckpointReader("run/checkpoint-100", family.tensors(config))
        for tensor_map, weight in reader.layers(maps):
            ...
    """

    def __init__(self, checkpoint: str | Path, maps: Sequence[ParamMapping]):
        self.directory = Path(checkpoint)
        self._maps = maps
        self._reader = HFReader(self.directory)

    def stored_dtype(self, tensor_map: ParamMapping) -> torch.dtype:
        """Return the dtype of a tensor."""
        name = tensor_map.hf[0]
        if name not in self._reader.names:
            raise QADError(
                f"{self.directory}: no tensor {name!r}, which hf/config.json requires. Save the model again."
            )
        return _DTYPES[self._reader.stored_dtype(name)]

    def layers(self, maps: Sequence[ParamMapping]) -> Iterator[tuple[ParamMapping, torch.Tensor]]:
        """Yield the tensors of ``maps`` in order, read one by one, shapes checked."""
        for m in maps:
            for name, shape in zip(m.hf, m.hf_shapes(), strict=True):
                if name in self._reader.names and (found := self._reader.stored_shape(name)) != shape:
                    raise QADError(f"{self.directory}: {name} has shape {list(found)}, expected {list(shape)}.")
            yield m, m.to_megatron([self._reader.read(name) for name in m.hf]).contiguous()

    def read_amaxes(self) -> dict[str, torch.Tensor]:
        """Return the amax of every calibrated input, float32 [1], by the name of its quantizer in Megatron's runs."""
        amaxes = {}
        for m in self._maps:
            if f"{_module(m.hf[0])}.input_amax" in self._reader.names:
                amax = self._shared(m, "input_amax")
                if bool(amax > 0):  # NaN before the calibration
                    amaxes[f"{m.megatron_module}.input{INPUT_AMAX}"] = amax
        return amaxes

    def read_carried(self, tensor_map: ParamMapping, what: str) -> torch.Tensor:
        """Return the amax of a weight, float32 [1], or its frozen block scales, uint8 [out, in / block size].

        Weights without frozen scales store no amax, because it is that of the master.

        Args:
            what: ``carried_scales.AMAX`` or ``BLOCK_SCALES``.
        """
        names = [f"{_module(name)}.{what}" for name in tensor_map.hf]
        if what == AMAX:
            if names[0] in self._reader.names:
                return self._shared(tensor_map, AMAX)
            return torch.stack([tensor_amax(self._reader.read(name)) for name in tensor_map.hf]).amax().reshape(1)
        assert what == BLOCK_SCALES
        parts = [self._reader.read(name) for name in names]
        shape = (tensor_map.shape[0], parts[0].shape[1])
        return replace(tensor_map, shape=shape).to_megatron(parts).contiguous()

    def _shared(self, tensor_map: ParamMapping, what: str) -> torch.Tensor:
        """Return a value that all Hugging Face parts of a linear must share."""
        first, *others = [self._reader.read(f"{_module(name)}.{what}") for name in tensor_map.hf]
        for name, other in zip(tensor_map.hf[1:], others, strict=True):
            if not torch.equal(first.nan_to_num(), other.nan_to_num()):
                raise QADError(
                    f"{self.directory}: {_module(name)}.{what} is {other.item()}, but {first.item()} in "
                    f"{_module(tensor_map.hf[0])}; servers compute them as one linear. Save the model again."
                )
        return first


def _module(weight: str) -> str:
    return weight.removesuffix(".weight")
