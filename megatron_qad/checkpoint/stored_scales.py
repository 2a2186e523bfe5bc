"""The scales of one weight as a checkpoint stores them, and the exact codes of the weight under them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_qad.checkpoint.torch_dist import TorchDistReader
from megatron_qad.formats.format import NumberFormat
from megatron_qad.models.families.base import ParamMapping
from megatron_qad.quantization.carried_scales import AMAX, BLOCK_SCALES
from megatron_qad.quantization.frozen_scales import carries_scales
from megatron_qad.quantization.scale_settings import ScaleSetting


@dataclass(frozen=True)
class StoredScales:
    """The scales of a weight, for its export."""

    number_format: NumberFormat
    rule: str
    amax: Tensor | None = None
    """Carried amax, float32 []. None: the weight preserves it."""
    block_scales: Tensor | None = None
    """Frozen block scales, uint8 [out, in / block size], in the order of Megatron's rows. None: they are not frozen."""

    @classmethod
    def read(
        cls, reader: TorchDistReader, tensor_map: ParamMapping, number_format: NumberFormat, setting: ScaleSetting
    ) -> "StoredScales":
        """Read what the checkpoint carries for a weight.

        Raises:
            QADError: the checkpoint does not carry what the setting needs.
        """
        if not carries_scales(number_format, setting):
            return cls(number_format, setting.rule)
        amax = reader.read_carried(tensor_map, AMAX).reshape(())
        block_scales = reader.read_carried(tensor_map, BLOCK_SCALES) if setting.is_frozen else None
        return cls(number_format, setting.rule, amax, block_scales)

    def pack(
        self, tensor_map: ParamMapping, weight: Tensor
    ) -> tuple[Tensor, list[Tensor], list[Mapping[str, Tensor]] | None]:
        """Return the scale, the Hugging Face parts of ``weight`` [out, in], and their codes.

        Codes decode to exactly the quantized weight. They are None if the weight is not quantized yet, and its block
        scales are not frozen (``NumberFormat.pack``).
        """
        name, parts = tensor_map.megatron, [part.contiguous() for part in tensor_map.to_hf(weight)]
        if self.block_scales is None:
            scale, codes = self.number_format.pack(parts, name=name, amax=self.amax, rule=self.rule)
            return scale, parts, codes
        scale = self.number_format.scale_from_amax(self.amax, name=name, rule=self.rule)
        blocks = replace(tensor_map, shape=tuple(self.block_scales.shape)).to_hf(self.block_scales)
        codes = [
            self.number_format.quantize_fixed(part, scale, block.contiguous().view(torch.float8_e4m3fn), name=name)
            for part, block in zip(parts, blocks, strict=True)
        ]
        return scale, parts, codes

    def as_exported(self, weight: Tensor, name: str) -> Tensor:
        """Return the values to which the exported ``weight`` decodes, in Megatron's layout."""
        if self.block_scales is None:
            return self.number_format.as_exported(weight, name=name, amax=self.amax, rule=self.rule)
        scale = self.number_format.scale_from_amax(self.amax, name=name, rule=self.rule)
        blocks = self.block_scales.view(torch.float8_e4m3fn)
        return self.number_format.fake_quant_fixed(weight, scale, blocks, name=name)
