"""Triton kernels for NVFP4 fake quantization and amax on CUDA, with the same bits as the PyTorch reference.

Each kernel reads and writes every value once. Both roundings add and subtract a multiple of a power of two, like
``common.round_mantissa_``, and so need no cast on any architecture. Quotients are those of IEEE division; the rule
"max" computes them without divisions. Automatic fused multiply-add is off, because it skips the rounding of products.
The list kernels take a table of pointers: one launch processes all weights of one dtype, and each program finds its
tensor by bisection.

Import this module only if ``common.triton_serves`` is true, because Triton may be missing. Not supported: packing.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_SIZE = tl.constexpr(16)
_MAGNITUDE = tl.constexpr(0x7FFFFFFF)
_EXPONENT = tl.constexpr(0x7F800000)
_INFINITY = tl.constexpr(0x7F800000)
_ALL = tl.constexpr(tl.PropagateNan.ALL)
_NUM_BLOCKS = 256  # NVFP4 blocks per program: 4096 values, 32 per thread
_TILE_ELEMENTS = _NUM_BLOCKS * BLOCK_SIZE.value
_LAUNCH = {"num_warps": 4, "enable_fp_fusion": False}
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def fake_quant_(x: Tensor, global_scale: Tensor, rule: str) -> Tensor:
    """Fake-quantize contiguous ``x`` [..., K] in place. ``global_scale`` is float32 [] on the same device.

    Returns the number of blocks with NaN or Inf, int32 [1].
    """
    num_blocks = x.numel() // BLOCK_SIZE.value
    bad = torch.zeros(1, dtype=torch.int32, device=x.device)
    if num_blocks:
        grid = (triton.cdiv(num_blocks, _NUM_BLOCKS),)
        with torch.cuda.device_of(x):  # Triton launches on the current device; no effect on the CPU
            _fake_quant_kernel[grid](x, global_scale, bad, num_blocks, RULE=rule, TILE=_NUM_BLOCKS, **_LAUNCH)
    return bad


def fake_quant_list_(tensors: Sequence[Tensor], global_scales: Tensor, rule: str) -> Tensor:
    """Fake-quantize n contiguous tensors in place, one launch per dtype. Scales are float32 [n] on their device.

    Returns the number of blocks with NaN or Inf of each tensor, int32 [n].
    """
    bad = torch.zeros(len(tensors), dtype=torch.int32, device=global_scales.device)
    for table in _tables(tensors):
        with torch.cuda.device_of(table.rows):
            _fake_quant_list_kernel[(table.num_tiles,)](
                table.rows, table.length, global_scales, bad, RULE=rule, TILE=_NUM_BLOCKS, **table.constants, **_LAUNCH
            )
    return bad


def amax_list(tensors: Sequence[Tensor]) -> Tensor:
    """Return the largest magnitudes of n contiguous tensors as float32 [n]; NaN for a tensor that contains NaN.

    Needs one launch per dtype. A tensor's size need not be a multiple of 16.
    """
    bits = torch.zeros(len(tensors), dtype=torch.int32, device=tensors[0].device)
    for table in _tables(tensors):
        with torch.cuda.device_of(table.rows):
            _amax_list_kernel[(table.num_tiles,)](
                table.rows, table.length, bits, TILE=_TILE_ELEMENTS, **table.constants, **_LAUNCH
            )
    return bits.view(torch.float32)


class _Table:
    """Table of tensors of one dtype for a list kernel.

    ``rows`` is int64 [4, n]: address, number of values, first tile, and position in the caller's list.
    """

    def __init__(self, tensors: Sequence[Tensor], positions: Sequence[int]):
        first, starts = 0, []
        for tensor in tensors:
            starts.append(first)
            first += triton.cdiv(tensor.numel(), _TILE_ELEMENTS)
        addresses = [tensor.data_ptr() for tensor in tensors]
        sizes = [tensor.numel() for tensor in tensors]
        rows = torch.tensor([addresses, sizes, starts, list(positions)], dtype=torch.int64)
        self.rows = rows.to(tensors[0].device)
        self.length = len(tensors)
        self.num_tiles = first
        self.constants = {
            "STEPS": max(1, (self.length - 1).bit_length()),
            "TYPE": _TYPES[tensors[0].dtype],
            # 16-byte loads need an aligned address, and a mask that does not end within a load.
            "ALIGNED": all(value % 16 == 0 for value in addresses + sizes),
        }


def _tables(tensors: Sequence[Tensor]) -> list[_Table]:
    tables = []
    for dtype in _TYPES:
        positions = [i for i, tensor in enumerate(tensors) if tensor.dtype == dtype and tensor.numel()]
        if positions:
            tables.append(_Table([tensors[i] for i in positions], positions))
    return tables


@triton.jit
def _round_mantissa(x, MAGIC: tl.constexpr, SMALLEST: tl.constexpr):
    """Kernel version of ``common.round_mantissa_``."""
    power = tl.maximum(x.to(tl.int32, bitcast=True) & _EXPONENT, SMALLEST).to(tl.float32, bitcast=True)
    return tl.fma(power, -MAGIC, tl.fma(power, MAGIC, x))  # the products are exact, fused or not


@triton.jit
def _round_to_e4m3(x):
    """Kernel version of ``common.round_to_e4m3_`` for x >= 0."""
    return _round_mantissa(tl.minimum(x, 448.0, propagate_nan=_ALL), 1572864.0, 0x3C800000)  # 1.5 * 2^20, 2^-6


@triton.jit
def _round_to_e2m1(x):
    clamped = tl.minimum(tl.maximum(x, -6.0, propagate_nan=_ALL), 6.0, propagate_nan=_ALL)
    return _round_mantissa(clamped, 6291456.0, 0x3F800000)  # 1.5 * 2^22, 1


@triton.jit
def _squared_error(x, scale, global_scale, TILE: tl.constexpr):
    """Kernel version of ``block_scales.squared_error``: x [TILE, 16], scale [TILE]. Also adds half to half."""
    scaled = tl.div_rn(x, (scale * global_scale)[:, None])
    error = _round_to_e2m1(scaled) - scaled
    error = error * error
    error = tl.sum(tl.reshape(error, [TILE, 2, 8]), axis=1)
    error = tl.sum(tl.reshape(error, [TILE, 2, 4]), axis=1)
    error = tl.sum(tl.reshape(error, [TILE, 2, 2]), axis=1)
    return tl.sum(error, axis=1) * (scale * scale)


@triton.jit
def _block_scale(x, amax, global_scale, RULE: tl.constexpr, TILE: tl.constexpr):
    """Kernel version of ``block_scales.choose``: x [TILE, 16], amax [TILE]."""
    scale = tl.div_rn(amax, global_scale * 6.0)
    scale = tl.maximum(tl.where(scale == 0, 1.0, scale), 0.001953125, propagate_nan=_ALL)  # 2^-9
    scale = _round_to_e4m3(scale)
    if RULE == "four_over_six_448":
        quotient = tl.div_rn(amax, global_scale * 4.0)
        four = _round_to_e4m3(tl.maximum(quotient, 0.001953125, propagate_nan=_ALL))
        better = _squared_error(x, four, global_scale, TILE) < _squared_error(x, scale, global_scale, TILE)
        scale = tl.where(better & (quotient <= 464.0), four, scale)
    if RULE == "mse":
        # E4M3 codes of the values: exponent and mantissa of normal numbers, multiples of 2^-9 below 2^-6.
        normal = (scale.to(tl.int32, bitcast=True) >> 20) - 960
        codes = tl.where(scale < 0.015625, (scale * 512.0).to(tl.int32), normal)
        least = _squared_error(x, scale, global_scale, TILE)
        for step in tl.static_range(1, 11):
            offset = step if step <= 8 else 8 - step
            code = tl.minimum(tl.maximum(codes + offset, 1), 0x7E)
            value = ((code + 960) << 20).to(tl.float32, bitcast=True)
            value = tl.where(code < 8, code.to(tl.float32) * 0.001953125, value)
            error = _squared_error(x, value, global_scale, TILE)
            better = (error < least) & (codes != 0x7E)
            scale, least = tl.where(better, value, scale), tl.where(better, error, least)
    return scale


@triton.jit
def _fake_quant_by_division(x, amax, global_scale, RULE: tl.constexpr, TILE: tl.constexpr):
    decode_scale = (_block_scale(x, amax, global_scale, RULE, TILE) * global_scale)[:, None]
    return _round_to_e2m1(tl.div_rn(x, decode_scale)) * decode_scale


@triton.jit
def _quotient(a, d, reciprocal, IS_SHORT: tl.constexpr):
    """Return the IEEE quotient a / d, given d's IEEE reciprocal. Neither the quotient nor the remainder may underflow.

    The product with the reciprocal is within two ulps. The first correction step gives one of the two floats around
    a / d, the second one the nearest (Markstein 1990: the remainder a - d q is exact in a fused multiply-add). If ``a``
    has a 16-bit dtype, one step is enough: all pairs of a's 128 or 1024 mantissas with d's 2^23 were tried.
    """
    q = a * reciprocal
    q = tl.fma(tl.fma(-d, q, a), reciprocal, q)
    if not IS_SHORT:
        q = tl.fma(tl.fma(-d, q, a), reciprocal, q)
    return q


@triton.jit
def _fake_quant_by_max(x, amax, global_scale, IS_SHORT: tl.constexpr):
    """Fake-quantize x [TILE, 16] with amax [TILE] under the rule "max", with the bits of divisions but without them.

    The global scale must be from 2^-64 to 2^7. Quotients >= 2^-10 are then exact; smaller ones become the smallest
    block scale or code 0 anyway.
    """
    largest = global_scale * 6.0
    amax = tl.minimum(amax, largest * 1024.0, propagate_nan=_ALL)  # an infinite amax would give a NaN remainder
    scale = _quotient(amax, largest, tl.div_rn(1.0, largest), IS_SHORT)
    scale = tl.maximum(tl.where(scale == 0, 1.0, scale), 0.001953125, propagate_nan=_ALL)  # 2^-9
    scale = _round_to_e4m3(scale) * global_scale
    reciprocal = tl.div_rn(1.0, scale)[:, None]
    six = (scale * 6.0)[:, None]
    scale = scale[:, None]
    x = tl.minimum(tl.maximum(x, -six, propagate_nan=_ALL), six, propagate_nan=_ALL)  # larger values get code 6 as well
    codes = _round_mantissa(_quotient(x, scale, reciprocal, IS_SHORT), 6291456.0, 0x3F800000)
    return tl.fma(codes, scale, 0.0)  # -0.0 becomes 0.0


@triton.jit
def _fake_quant_tile(pointer, blocks, num_blocks, global_scale, bad_pointer, RULE: tl.constexpr, TILE: tl.constexpr):
    """Fake-quantize the blocks [TILE] (int64 indices) of one tensor in place."""
    offsets = blocks[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    inside = (blocks < num_blocks)[:, None]
    x = tl.load(pointer + offsets, mask=inside, other=0.0).to(tl.float32)
    bits = tl.max(x.to(tl.int32, bitcast=True) & _MAGNITUDE, axis=1)  # as bits, NaN is the largest
    tl.atomic_add(bad_pointer + tl.zeros([TILE], tl.int32), 1, mask=bits >= _INFINITY)
    amax = bits.to(tl.float32, bitcast=True)
    if RULE == "max" and ((global_scale >= 5.421010862427522e-20) & (global_scale <= 128.0)):
        out = _fake_quant_by_max(x, amax, global_scale, pointer.dtype.element_ty != tl.float32)
    else:
        out = _fake_quant_by_division(x, amax, global_scale, RULE, TILE)
    out = out.to(pointer.dtype.element_ty)
    if pointer.dtype.element_ty != tl.bfloat16:  # float16 can round to -0.0; bfloat16 has the range of float32
        out = tl.where(out == 0.0, 0.0, out)
    tl.store(pointer + offsets, out, mask=inside)


@triton.jit
def _fake_quant_kernel(x_pointer, scale_pointer, bad_pointer, num_blocks, RULE: tl.constexpr, TILE: tl.constexpr):
    blocks = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    _fake_quant_tile(x_pointer, blocks, num_blocks, tl.load(scale_pointer), bad_pointer, RULE, TILE)


@triton.jit
def _find(table, length, STEPS: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Find the tensor of this program. Return its pointer, size, tile index, and position in the caller's list."""
    program = tl.program_id(0)
    starts = table + 2 * length
    low = 0
    high = length
    for _ in range(STEPS):
        middle = (low + high) // 2
        is_before = tl.load(starts + middle) <= program
        low = tl.where(is_before, middle, low)
        high = tl.where(is_before, high, middle)
    pointer = tl.load(table + low).to(tl.pointer_type(TYPE))
    size = tl.load(table + length + low)
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
        size = tl.multiple_of(size, 16)
    return pointer, size, program - tl.load(starts + low), tl.load(starts + length + low)


@triton.jit
def _fake_quant_list_kernel(
    table,
    length,
    scales,
    bad,
    RULE: tl.constexpr,
    STEPS: tl.constexpr,
    TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
):
    pointer, size, tile, position = _find(table, length, STEPS, TYPE, ALIGNED)
    blocks = tile * TILE + tl.arange(0, TILE)
    _fake_quant_tile(pointer, blocks, size // BLOCK_SIZE, tl.load(scales + position), bad + position, RULE, TILE)


@triton.jit
def _amax_list_kernel(
    table, length, out, STEPS: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr
):
    pointer, size, tile, position = _find(table, length, STEPS, TYPE, ALIGNED)
    offsets = tile * TILE + tl.arange(0, TILE)
    x = tl.load(pointer + offsets, mask=offsets < size, other=0.0).to(tl.float32)
    tl.atomic_max(out + position, tl.max(x.to(tl.int32, bitcast=True) & _MAGNITUDE, axis=0))
