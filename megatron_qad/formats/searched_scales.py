"""NVFP4 block scales that modelopt 0.47 chooses by searching a set of candidates, with its arithmetic bit for bit.

modelopt computes a block scale twice. The search (``compute_fp4_scales``, ``fp8_eager``) rounds the scale of each
candidate to E4M3 with a reciprocal, decodes with a second reciprocal and compares errors. The export
(``_cast_per_block_scale_to_fp8``) rounds the scale of the winner again, with divisions. Both are float32 and differ in
the last bit, so both are repeated here. Errors are sums of squares in the order in which ``torch.sum`` adds 16 values
on a CPU. A GPU adds in another order: there modelopt may choose differently where two errors agree to about 2^-22.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_qad.formats.common import E4M3_MAX, E4M3_MIN, round_to_e4m3_
from megatron_qad.formats.e2m1 import E2M1_MAX, round_to_e2m1_

_SMALLEST_AMAX = 1.0 / (1 << 24)  # modelopt's search replaces a scale's amax up to this by 1
NUM_E4M3 = 126  # positive finite E4M3 numbers


def multipliers(rule: str) -> Tensor:
    """Return the factors by which the candidates of ``rule`` multiply a block's amax, float32 [n].

    1 and 1.5 map the block's amax to 6 and to 4. The 39 values are modelopt's default for ``mse``; 1 is not among them.
    """
    return torch.linspace(1.0, 1.5, 2) if rule == "four_over_six" else torch.linspace(0.25, 4.0, 39)


def search(
    blocks: Tensor, block_amax: Tensor, amax: Tensor, top_scale: float, rule: str, hessian: Tensor | None = None
) -> Tensor:
    """Return the block scales with the smallest error. Ties go to the first candidate.

    Args:
        blocks: float32 [B, 16]. Block b is block ``b % n`` of its row if ``hessian`` has n matrices.
        block_amax: float32 [B, 1], their largest magnitudes.
        amax: float32 [], that of the tensor and of all that share its global scale.
        top_scale: block scale of the tensor's amax, 256 or 448.
        rule: "four_over_six", "mse_multipliers", "mse_sweep" or "local_hessian".
        hessian: float32 [n, 16, 16], required by "local_hessian": the error is d^T H d instead of d^T d.

    Returns:
        E4M3 numbers from 2^-9 to 448 as float32 [B, 1].
    """
    best = least = None
    for candidate in _candidates(block_amax, amax, rule):
        error = _error(blocks, _search_scale(candidate, amax, top_scale), hessian)
        if best is None:
            best, least = candidate.expand_as(block_amax).clone(), error
            continue
        better = error < least
        best, least = torch.where(better, candidate, best), torch.where(better, error, least)
    return export_scale(best, amax, top_scale)


def export_scale(block_amax: Tensor, amax: Tensor, top_scale: float) -> Tensor:
    """Return the E4M3 scale that modelopt's exporter stores for a chosen block amax, as float32 of the same shape."""
    scale = block_amax / _tensor(E2M1_MAX, amax)
    scale.masked_fill_(scale == 0, 1.0)  # for an all-zero block, in units of the weight
    scale = (scale * top_scale) / (amax / _tensor(E2M1_MAX, amax))
    return round_to_e4m3_(scale.clamp_(E4M3_MIN, E4M3_MAX))


def ordered_sum(errors: Tensor) -> Tensor:
    """Add float32 [B, 16] along the blocks, to [B, 1], in the order of ``torch.sum`` on a CPU: halves, then lanes."""
    lanes = errors[:, :8] + errors[:, 8:]
    total = lanes[:, 0].clone()
    for lane in range(1, 8):
        total += lanes[:, lane]
    return total.unsqueeze(1)


def _candidates(block_amax: Tensor, amax: Tensor, rule: str) -> Iterator[Tensor]:
    """Yield the candidates for the blocks' amaxes, float32 [B, 1], or [1, 1] if they are the same for all blocks."""
    if rule in ("mse_sweep", "local_hessian"):
        codes = torch.arange(1, 1 + NUM_E4M3, dtype=torch.uint8, device=amax.device)
        fractions = codes.view(torch.float8_e4m3fn).float() / _tensor(E4M3_MAX, amax)
        yield from (amax * fractions).view(-1, 1, 1)
    else:
        for multiplier in multipliers(rule).to(amax.device):
            yield block_amax * multiplier


def _search_scale(candidate: Tensor, amax: Tensor, top_scale: float) -> Tensor:
    """Return the decoding scale that modelopt's search gives a candidate: E4M3 times the global scale, or 0."""
    largest = amax * (E4M3_MAX / top_scale) / _tensor(E2M1_MAX, amax)
    largest = torch.where(largest <= _SMALLEST_AMAX, 1.0, largest)
    factor = _tensor(E4M3_MAX, amax) / largest
    scale = candidate / _tensor(E2M1_MAX, amax) * factor
    return round_to_e4m3_(scale) * (1.0 / factor)


def _error(blocks: Tensor, scale: Tensor, hessian: Tensor | None) -> Tensor:
    """Return the error, float32 [B, 1], of blocks [B, 16] under decoding scales [B, 1] or [1, 1]."""
    rounded = round_to_e2m1_(blocks / torch.where(scale == 0, 1.0, scale)).mul_(scale)
    difference = blocks - rounded
    if hessian is None:
        return ordered_sum(difference.square_())
    rows = difference.view(-1, len(hessian), 16)
    error = torch.einsum("cnb,nbd,cnd->cn", rows, hessian, rows).reshape(-1, 1)
    return ordered_sum(error.expand(-1, 16))  # modelopt gives each of the 16 values the block's error


def _tensor(value: float, like: Tensor) -> Tensor:
    """Return a 0-dim tensor. For a Python number, PyTorch on CUDA multiplies by the reciprocal, an ulp off."""
    return torch.full((), value, dtype=torch.float32, device=like.device)
