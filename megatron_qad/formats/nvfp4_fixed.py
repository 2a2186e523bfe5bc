"""NVFP4 with given block scales: choosing them once, and quantizing with them later.

A weight whose scales are frozen at calibration is quantized at every step with the same block scales and global scale.
Values beyond 6 times their scale saturate. This is plain PyTorch on every device, in tiles of rows.
"""

import torch
from torch import Tensor

from megatron_qad.engine.errors import QADError
from megatron_qad.formats.block_scales import amax_of
from megatron_qad.formats.common import check_finite, tile_slices
from megatron_qad.formats.e2m1 import encode, pack_codes, round_to_e2m1_
from megatron_qad.formats.nvfp4 import BLOCK_SIZE, block_scales_of, check_global_scale, check_quantizable


def block_scales(
    x: Tensor,
    global_scale: Tensor,
    *,
    name: str = "tensor",
    rule: str = "max",
    amax: Tensor | None = None,
    hessian: Tensor | None = None,
) -> Tensor:
    """Return the block scales that ``rule`` chooses for ``x``, float8_e4m3fn [..., K/16].

    Args:
        x: float32, bfloat16 or float16 [..., K], K a multiple of 16.
        global_scale: float32 [], from ``global_scale_from_amax`` with the same rule.
        name: name of the tensor for errors.
        rule: one of SCALE_RULES (``formats.block_scales``).
        amax: float32 [], the amax of ``global_scale``. Only float32 tensors under modelopt's searches need it, for the
            last bit of their errors.
        hessian: float32 [K/16, 16, 16], required by "local_hessian": the second moments of the layer's inputs.

    Raises:
        QADError: NaN or Inf, an unknown rule, a wrong shape, or a Hessian that is missing or has another shape.

    Example:
        >>> from megatron_qad.formats.nvfp4 import global_scale_from_amax
        >>> x = torch.arange(16.0)
        >>> block_scales(x, global_scale_from_amax(x.amax(), rule="four_over_six"), rule="four_over_six")
        tensor([384.], dtype=torch.float8_e4m3fn)
    """
    scale = _checked(x, global_scale, name, rule)
    num_blocks = x.shape[-1] // BLOCK_SIZE
    if rule == "local_hessian":
        _check_hessian(hessian, num_blocks, name)
    amax = amax_of(scale, rule, x.dtype) if amax is None else amax.detach().float().reshape(()).to(x.device)
    hessian = hessian.to(x.device) if rule == "local_hessian" else None
    rows = x.detach().reshape(-1, x.shape[-1])
    out = torch.empty(len(rows), num_blocks, dtype=torch.float8_e4m3fn, device=x.device)
    for part in tile_slices(rows):  # complete rows, as the Hessians need
        blocks = rows[part].float().reshape(-1, BLOCK_SIZE)
        out[part] = block_scales_of(blocks, scale, name, rule, amax, hessian).view(-1, num_blocks)
    return out.view(*x.shape[:-1], num_blocks)


def quantize_fixed(
    x: Tensor, global_scale: Tensor, block_scale: Tensor, *, name: str = "tensor", check: bool = True
) -> Tensor:
    """Return the packed codes, uint8 [..., K/2], of ``x`` [..., K] under given scales; the inverse of ``dequantize``.

    Args and errors are those of ``fake_quant_fixed``.
    """
    scale, scales = _checked(x, global_scale, name, "max"), _rows_of_scales(x, block_scale, name)
    rows = x.detach().reshape(-1, x.shape[-1])
    packed = torch.empty(len(rows), rows.shape[1] // 2, dtype=torch.uint8, device=x.device)
    for part in tile_slices(rows):
        scaled = _scaled(rows[part], scales[part], scale, name if check else None)[0]
        packed[part] = pack_codes(encode(scaled)).view(-1, rows.shape[1] // 2)
    return packed.view(*x.shape[:-1], -1)


@torch.no_grad()
def fake_quant_fixed(
    x: Tensor, global_scale: Tensor, block_scale: Tensor, *, name: str = "tensor", check: bool = True
) -> Tensor:
    """Fake-quantize ``x`` with given block scales, in its dtype and shape, without a gradient.

    Args:
        x: float32, bfloat16 or float16 [..., K].
        global_scale: float32 [].
        block_scale: float8_e4m3fn [..., K/16], as from ``block_scales``, which need not be those of ``x``. Values beyond
            6 * block_scale * global_scale saturate. Where it is 0 the result is 0.
        name: name of the tensor for errors.
        check: raise QADError for NaN and Inf in ``x``.

    Raises:
        QADError: NaN or Inf, or block scales of another shape or dtype.

    Example:
        >>> x, scale = torch.arange(16.0), torch.tensor(0.5)
        >>> fake_quant_fixed(x, scale, torch.tensor([4.0]).to(torch.float8_e4m3fn))[-4:]
        tensor([12., 12., 12., 12.])
    """
    scale, scales = _checked(x, global_scale, name, "max"), _rows_of_scales(x, block_scale, name)
    rows = x.detach().reshape(-1, x.shape[-1])
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    for part in tile_slices(rows):
        scaled, decode_scale = _scaled(rows[part], scales[part], scale, name if check else None)
        out[part] = round_to_e2m1_(scaled).mul_(decode_scale).view(-1, rows.shape[1])
        out[part].add_(0.0)  # no -0.0, as in nvfp4.dequantize
    return out.view(x.shape)


def _scaled(rows: Tensor, scales: Tensor, global_scale: Tensor, name: str | None) -> tuple[Tensor, Tensor]:
    """Return blocks [B, 16] divided by their decoding scales, and these scales, float32 [B, 1]."""
    blocks = rows.float().reshape(-1, BLOCK_SIZE)
    if name is not None:
        check_finite(blocks, name, "NVFP4")
    decode_scale = scales.reshape(-1, 1).float() * global_scale
    return blocks / torch.where(decode_scale == 0, torch.inf, decode_scale), decode_scale


def _checked(x: Tensor, global_scale: Tensor, name: str, rule: str) -> Tensor:
    check_quantizable(x, name, rule)
    scale = global_scale.detach().float().reshape(()).to(x.device)
    check_global_scale(scale, name)
    return scale


def _rows_of_scales(x: Tensor, block_scale: Tensor, name: str) -> Tensor:
    expected = (*x.shape[:-1], x.shape[-1] // BLOCK_SIZE)
    if block_scale.shape != expected or block_scale.dtype != torch.float8_e4m3fn:
        raise QADError(
            f"{name}: its block scales have shape {list(block_scale.shape)} and dtype {block_scale.dtype}, expected "
            f"{list(expected)} and torch.float8_e4m3fn. Pass the block scales of this tensor or shard."
        )
    return block_scale.to(x.device).reshape(-1, expected[-1])


def _check_hessian(hessian: Tensor | None, num_blocks: int, name: str) -> None:
    expected = (num_blocks, BLOCK_SIZE, BLOCK_SIZE)
    if hessian is None or hessian.shape != expected or hessian.dtype != torch.float32:
        found = "missing" if hessian is None else f"{hessian.dtype} {list(hessian.shape)}"
        raise QADError(
            f"{name}: its Hessian is {found}, expected torch.float32 {list(expected)}. The rule local_hessian needs the "
            "second moments of the layer's inputs, by blocks of 16 columns."
        )
