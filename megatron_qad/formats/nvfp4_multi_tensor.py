"""NVFP4 operations on many tensors at once: amaxes, global scales and in-place fake quantization.

The weights of a model need all three once per optimizer step. On CUDA, amaxes and fake quantization launch one Triton
kernel per dtype, whatever the number of experts. Without CUDA or Triton, a loop over the PyTorch reference gives the
same bits.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_qad.engine.errors import QADError
from megatron_qad.formats import nvfp4
from megatron_qad.formats.block_scales import KERNEL_RULES
from megatron_qad.formats.common import FLOAT_DTYPES, check_blocks, tensor_amax, triton_serves


def amax_list(tensors: Sequence[Tensor]) -> Tensor:
    """Return the largest magnitudes of n tensors on one device as float32 [n]; NaN for a tensor that contains NaN."""
    if not tensors:
        return torch.zeros(0, dtype=torch.float32)
    if _can_use_kernels(tensors):
        from megatron_qad.formats import nvfp4_triton

        return nvfp4_triton.amax_list(tensors)
    return torch.stack([tensor_amax(tensor) for tensor in tensors])


def global_scales_from_amaxes(amaxes: Tensor, names: Sequence[str], rule: str = "max") -> Tensor:
    """Return the global scales of ``rule``, float32 [n], for amaxes, float32 [n], with one device synchronization.

    Raises QADError with the names of the tensors whose amax is NaN, infinite or negative.
    """
    _check_length(names, amaxes, "amaxes")
    return nvfp4.global_scale_from_amax(amaxes, name=names, rule=rule)


@torch.no_grad()
def fake_quant_list_(
    tensors: Sequence[Tensor],
    global_scales: Tensor,
    names: Sequence[str] | None = None,
    rule: str = "max",
    *,
    check: bool = True,
) -> None:
    """Fake-quantize every tensor in place, each with its own global scale.

    Args:
        tensors: float32, bfloat16 or float16 [..., K] each, K a multiple of 16, all on one device.
        global_scales: float32 [n].
        names: n names of the tensors for errors.
        rule: rule that chooses the block scales, one of ``nvfp4.SCALE_RULES``.
        check: raise QADError, with the name, for NaN, Inf and invalid scales. Some tensors may be quantized by then.
            On CUDA the check costs two synchronizations, whatever n is.
    """
    names = [f"tensor {index}" for index in range(len(tensors))] if names is None else names
    _check_length(names, tensors, "tensors")
    _check_length(global_scales, tensors, "tensors")
    if tensors and rule in KERNEL_RULES and _can_use_kernels(tensors):
        from megatron_qad.formats import nvfp4_triton

        for tensor, name in zip(tensors, names, strict=True):
            nvfp4.check_quantizable(tensor, name, rule)
        scales = global_scales.detach().float().to(tensors[0].device)
        if check:
            _check_scales(scales, names)
        bad = nvfp4_triton.fake_quant_list_([tensor.detach() for tensor in tensors], scales, rule)
        if check:
            check_blocks(bad, names)
        return
    for tensor, scale, name in zip(tensors, global_scales, names, strict=True):
        nvfp4.fake_quant_(tensor, scale, name=name, check=check, rule=rule)


def _can_use_kernels(tensors: Sequence[Tensor]) -> bool:
    """Whether the kernels can process the tensors: contiguous, on one GPU, of supported dtypes."""
    first = tensors[0]
    return triton_serves(first) and all(
        tensor.device == first.device and tensor.is_contiguous() and tensor.dtype in FLOAT_DTYPES for tensor in tensors
    )


def _check_scales(scales: Tensor, names: Sequence[str]) -> None:
    usable = (scales >= nvfp4.GLOBAL_SCALE_MIN) & torch.isfinite(scales)
    for index in (~usable).nonzero().flatten().tolist():
        nvfp4.check_global_scale(scales[index], names[index])


def _check_length(items, expected, what: str) -> None:
    if len(items) != len(expected):
        raise QADError(f"Got {len(items)} names or scales for {len(expected)} {what}. Pass one per element.")
