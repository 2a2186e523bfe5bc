"""What in-place training and export need of a weight format, under the same four names for each: NVFP4 and FP8.

Both store one float32 scale a tensor, made of its amax; NVFP4 has block scales besides. A weight that is fake-quantized
under a scale is "on the grid" and packs to exactly itself.
"""

from collections.abc import Callable
from dataclasses import dataclass

from megatron_qad.formats import fp8, nvfp4, nvfp4_pack


@dataclass(frozen=True)
class WeightFormat:
    """The functions of one format; their arguments and errors stand where they are defined."""

    name: str
    scale_from_amax: Callable
    """(amax float32 [], *, name) -> float32 []"""
    fake_quant_: Callable
    """(weight, scale, *, name) in place; NVFP4 takes a ``rule`` besides."""
    is_on_grid: Callable
    """(weight, scale, *, name) -> bool"""
    recover_scale: Callable
    """(weight, *, name) -> the scale under which a fake-quantized weight packs exactly"""


WEIGHT_FORMATS = {
    f.name: f
    for f in (
        WeightFormat(
            "nvfp4",
            nvfp4.global_scale_from_amax,
            nvfp4.fake_quant_,
            nvfp4_pack.is_on_grid,
            nvfp4_pack.recover_global_scale,
        ),
        WeightFormat("fp8", fp8.scale_from_amax, fp8.fake_quant_, fp8.is_on_grid, fp8.recover_scale),
    )
}
