"""What in-place training and export need of a weight format, under the same names for each: NVFP4 and FP8.

Both store one float32 scale a tensor, made of its amax; NVFP4 has block scales besides. A weight that is fake-quantized
under a scale is "on the grid" and packs to exactly itself.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from megatron_qad.formats import fp8, nvfp4, nvfp4_lists, nvfp4_pack
from megatron_qad.formats.common import OffGridError, tensor_amax


@dataclass(frozen=True)
class WeightFormat:
    """The functions of one format; more about their arguments and errors stands where they are defined."""

    name: str
    scale_from_amax: Callable[..., Tensor]
    """(amax float32 [], *, name) -> scale float32 []"""
    scales_from_amaxes: Callable[[Tensor, Sequence[str]], Tensor]
    """(amaxes float32 [n], names) -> scales float32 [n]"""
    fake_quant_list_: Callable[..., None]
    """(tensors, scales [n], names, rule), in place. ``rule`` chooses NVFP4's block scales; FP8 has none."""
    is_on_grid: Callable[..., bool]
    """(weight, scale, *, name) -> whether it packs to exactly itself"""
    recover_scale: Callable[..., Tensor]
    """(weight, *, name) -> the scale under which a fake-quantized weight packs exactly; or OffGridError"""

    def scale_of(self, weight: Tensor, *, name: str) -> tuple[Tensor, bool]:
        """A saved weight's scale, and whether the weight lies on the grid under it. If not, it was saved between an
        optimizer step and the next quantization, and ``scale`` is the one that quantization would have used."""
        try:
            scale = self.recover_scale(weight, name=name)
        except OffGridError:  # float32 weights, whose scale is not sure
            return self.scale_from_amax(tensor_amax(weight), name=name), False
        return scale, self.is_on_grid(weight, scale, name=name)

    def as_exported(self, weight: Tensor, *, name: str, rule: str = "max") -> Tensor:
        """A saved weight as it is exported: itself if it lies on the grid, else a copy rounded to it."""
        scale, on_grid = self.scale_of(weight, name=name)
        return weight if on_grid else self.rounded(weight, scale, name=name, rule=rule)

    def rounded(self, weight: Tensor, scale: Tensor, *, name: str, rule: str = "max") -> Tensor:
        """A fake-quantized copy."""
        copy = weight.clone()
        self.fake_quant_list_([copy], scale.reshape(1), [name], rule)
        return copy


def _fp8_scales(amaxes: Tensor, names: Sequence[str]) -> Tensor:
    first = int((~amaxes.isfinite()).int().argmax())  # the error, if there is one, names its weight
    return fp8.scale_from_amax(amaxes, name=names[first])


def _fp8_list_(tensors: Sequence[Tensor], scales: Tensor, names: Sequence[str], rule: str = "max") -> None:
    for tensor, scale, name in zip(tensors, scales, names, strict=True):
        fp8.fake_quant_(tensor, scale, name=name)


WEIGHT_FORMATS = {
    f.name: f
    for f in (
        WeightFormat(
            "nvfp4",
            nvfp4.global_scale_from_amax,
            nvfp4_lists.global_scales_from_amaxes,
            nvfp4_lists.fake_quant_list_,
            nvfp4_pack.is_on_grid,
            nvfp4_pack.recover_global_scale,
        ),
        WeightFormat("fp8", fp8.scale_from_amax, _fp8_scales, _fp8_list_, fp8.is_on_grid, fp8.recover_scale),
    )
}
