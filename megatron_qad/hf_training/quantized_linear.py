"""A linear of a transformers model that computes with quantized values and keeps its float32 master.

The parameter is the master: optimizers, gradient clipping, DDP and checkpoints see an ordinary ``torch.nn.Linear``. The
forward pass multiplies with a quantized copy, which is made once per update (``linear_group``), so gradient
accumulation and recomputed forward passes quantize no weight. The straight-through estimator gives the gradient of the
copy to the master, except where frozen scales saturate.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_qad.quantization.carried_scales import AMAX, BLOCK_SCALES

if TYPE_CHECKING:
    from megatron_qad.hf_training.linear_group import LinearGroup

INPUT_AMAX = "input_amax"
_AMAXES = (INPUT_AMAX, AMAX)


class QuantizedLinear(torch.nn.Linear):
    """A linear [out, in] whose weight and input are quantized in the formats of its group.

    Buffers, all saved in checkpoints: ``input_amax`` float32 [1], NaN before calibration, if the input is quantized; if
    the scales of the weight are frozen, ``weight_amax`` float32 [1] and ``weight_block_scales`` uint8 [out, in / block]
    (the bits of E4M3 numbers). Linears of a group have the same amaxes.

    Args:
        linear: the linear that it replaces; its parameters are used, not copied.
        group: the group that it joins.
    """

    def __init__(self, linear: torch.nn.Linear, group: "LinearGroup"):
        torch.nn.Module.__init__(self)  # without the allocations of Linear
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.group = group
        device = linear.weight.device
        if group.input_format is not None:
            self.register_buffer(INPUT_AMAX, torch.full((1,), torch.nan, device=device))
        if group.setting.is_frozen:
            shape = (self.out_features, self.in_features // group.weight_format.block_size)
            self.register_buffer(AMAX, torch.full((1,), torch.nan, device=device))
            self.register_buffer(BLOCK_SCALES, torch.zeros(shape, dtype=torch.uint8, device=device))
        group.members.append(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., out] for ``x`` [..., in], in the dtype of autocast or of ``x``.

        Raises:
            QADError: the input must be quantized, and no calibration has observed it.
        """
        if torch.is_autocast_enabled(x.device.type):  # first, because servers quantize 16-bit inputs
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if self.group.calibrator is not None:
            self.group.observe(self, x)
            return F.linear(x, self.weight, self.bias)
        weight = _StraightThrough.apply(self.weight, self.group.quantized_weight(self, x.dtype), self)
        return F.linear(self.group.quantized_input(x), weight, self.bias)

    def _apply(self, fn, recurse=True):
        # Converting a model to BF16 also converts its buffers; amaxes stay in float32.
        amaxes = {name: self._buffers[name] for name in _AMAXES if name in self._buffers}
        super()._apply(fn, recurse)
        for name, amax in amaxes.items():
            self._buffers[name] = amax.to(self._buffers[name].device)
        return self


class _StraightThrough(torch.autograd.Function):
    """Forward: the quantized weight. Backward: its gradient for the master, 0 where the master saturates."""

    @staticmethod
    def forward(ctx, master, quantized, linear):
        ctx.linear = linear
        return quantized.detach()

    @staticmethod
    def backward(ctx, grad):
        group = ctx.linear.group
        group.gradient_arrived()
        saturated = group.saturated(ctx.linear)
        return grad if saturated is None else grad.masked_fill(saturated, 0), None, None
