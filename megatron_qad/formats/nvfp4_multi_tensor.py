"""Many tensors at once: the amax of each, their global scales, and all of them fake-quantized in place.

What the weights of a model need once per optimizer step. On CUDA each is one launch of a Triton kernel, however many
experts there are; elsewhere, and where triton is missing, a loop over the torch reference with the same bits.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_qad.engine.errors import QADError
from megatron_qad.formats import nvfp4
from megatron_qad.formats.common import FLOATS, refuse_bad_blocks, tensor_amax, triton_serves


def amax_list(tensors: Sequence[Tensor]) -> Tensor:
    """Float tensors of any shapes, on one device -> float32 [n] of their largest magnitudes; NaN where a tensor has
    one."""
    if not tensors:
        return torch.zeros(0, dtype=torch.float32)
    if _kernels_serve(tensors):
        from megatron_qad.formats import nvfp4_triton

        return nvfp4_triton.amax_list(tensors)
    return torch.stack([tensor_amax(tensor) for tensor in tensors])


def global_scales_from_amaxes(amaxes: Tensor, names: Sequence[str]) -> Tensor:
    """float32 [n] -> float32 [n], each by ``nvfp4.global_scale_from_amax``; one device synchronisation for all.

    Raises QADError with the names of all tensors whose amax is NaN, infinite or negative.
    """
    _same_length(names, amaxes, "amaxes")
    return nvfp4.global_scale_from_amax(amaxes, name=names)


@torch.no_grad()
def fake_quant_list_(
    tensors: Sequence[Tensor],
    global_scales: Tensor,
    names: Sequence[str] | None = None,
    rule: str = "max",
    *,
    check: bool = True,
) -> None:
    """``nvfp4.fake_quant_`` of every tensor, each with its own global scale.

    Args:
        tensors: float32, bfloat16 or float16 [..., K] each, K a multiple of 16, all on one device.
        global_scales: float32 [n].
        names: of the tensors, for errors.
        rule: one of ``nvfp4.SCALE_RULES``.
        check: raise QADError, with the name, on NaN, Inf and unusable scales; tensors may be quantized by then. On CUDA
            it costs two synchronisations, whatever n.
    """
    names = [f"tensor {index}" for index in range(len(tensors))] if names is None else names
    _same_length(names, tensors, "tensors")
    _same_length(global_scales, tensors, "tensors")
    if tensors and _kernels_serve(tensors):
        from megatron_qad.formats import nvfp4_triton

        for tensor, name in zip(tensors, names, strict=True):
            nvfp4.require_blocks(tensor, name, rule)
        scales = global_scales.detach().float().to(tensors[0].device)
        if check:
            _refuse_scales(scales, names)
        bad = nvfp4_triton.fake_quant_list_([tensor.detach() for tensor in tensors], scales, rule)
        if check:
            refuse_bad_blocks(bad, names)
        return
    for tensor, scale, name in zip(tensors, global_scales, names, strict=True):
        nvfp4.fake_quant_(tensor, scale, name=name, check=check, rule=rule)


def _kernels_serve(tensors: Sequence[Tensor]) -> bool:
    """Kernels take what lies on one GPU, contiguous, in a type that they know."""
    first = tensors[0]
    return triton_serves(first) and all(
        tensor.device == first.device and tensor.is_contiguous() and tensor.dtype in FLOATS for tensor in tensors
    )


def _refuse_scales(scales: Tensor, names: Sequence[str]) -> None:
    usable = (scales >= nvfp4.GLOBAL_SCALE_MIN) & torch.isfinite(scales)
    for index in (~usable).nonzero().flatten().tolist():
        nvfp4.require_scale(scales[index], names[index])


def _same_length(items, others, what: str) -> None:
    if len(items) != len(others):
        raise QADError(f"{len(others)} {what} came with {len(items)} names or scales; expected as many.")
