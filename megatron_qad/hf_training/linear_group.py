"""Linears that share their scales because servers compute them as one: q, k and v; gate and up; or a single linear.

A group is one linear of Megatron, and has its name in policies and records. The arithmetic is that of
``InPlaceWeights`` and ``CarriedWeight``, for weights that are stored in parts: one amax and one global scale over all
parts, block scales row by row, one amax of the input.
"""

import torch
from torch import Tensor

from megatron_qad.engine.errors import QADError
from megatron_qad.formats.common import tensor_amax
from megatron_qad.formats.format import LinearFormat
from megatron_qad.hf_training.quantized_linear import QuantizedLinear
from megatron_qad.quantization.activations import FakeQuantSTE
from megatron_qad.quantization.calibration import RunningAmax
from megatron_qad.quantization.scale_settings import ScaleSetting


class LinearGroup:
    """Formats, scales and quantized weights of the linears that share their scales.

    Args:
        name: Megatron's name of the weight, ``decoder.layers.0.self_attention.linear_qkv.weight``.
        fmt: format of the linears.
        setting: how the scales of the weight are obtained.
    """

    def __init__(self, name: str, fmt: LinearFormat, setting: ScaleSetting):
        self.name, self.setting = name, setting
        self.weight_format, self.input_format = fmt.weight, fmt.input
        self.members: list[QuantizedLinear] = []
        """The linears in the order of Megatron's rows. ``QuantizedLinear`` adds itself."""
        self.calibrator: RunningAmax | None = None
        """Observes the input while a calibration runs; the linears then compute without quantization."""
        self.updates_are_announced = False
        """Whether whoever updates the weights calls ``weights_changed``, as ``QADTrainer`` does. If not, the weights
        are quantized again after each backward pass: torch's fused optimizers do not increment the versions of
        tensors."""
        self._weights: list[Tensor] = []
        self._weights_of: tuple = ()
        self._input_scale: Tensor | None = None
        self._input_scale_of: tuple = ()

    @property
    def module(self) -> str:
        """Megatron's name of the linear."""
        return self.name.removesuffix(".weight")

    # Inputs -------------------------------------------------------------------------------------------------------

    def observe(self, linear: QuantizedLinear, x: Tensor) -> None:
        """Show an input to the calibrator, once for all members, whose input is the same."""
        if linear is self.members[0] and self.input_format is not None:
            self.calibrator.collect(x.detach())

    def set_input_amax(self, amax: Tensor) -> None:
        """Set the amax of the input, float32 []."""
        for linear in self.members:
            linear.input_amax.copy_(amax.reshape(1))

    @property
    def is_calibrated(self) -> bool:
        """Whether the amax of the input is known, or not needed."""
        return self.input_format is None or bool(self.members[0].input_amax > 0)

    def quantized_input(self, x: Tensor) -> Tensor:
        """Return ``x`` fake-quantized, with a straight-through gradient; ``x`` itself if the format keeps inputs."""
        if self.input_format is None:
            return x
        amax = self.members[0].input_amax
        if (state := _state_of(amax)) != self._input_scale_of:  # reading an amax waits for the device
            if not self.is_calibrated:
                raise QADError(
                    f"{self.module}: its input is quantized, but no calibration has observed it. Call "
                    "QADTrainer.calibrate(), which train() and evaluate() do, or load a checkpoint."
                )
            self._input_scale = self.input_format.input_scale_from_amax(amax, name=self.module)
            self._input_scale_of = state
        return FakeQuantSTE.apply(x, self._input_scale, self.input_format.fake_quant)

    # Weights ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def freeze_scales(self) -> None:
        """Choose the scales for the current weights, if they are frozen.

        Raises:
            QADError: a weight contains NaN or Inf.
        """
        if not self.setting.is_frozen:
            return
        amax, rule = self._amax(), self.setting.rule
        scale = self.weight_format.scale_from_amax(amax, name=self.name, rule=rule)
        for linear in self.members:
            linear.weight_amax.copy_(amax.reshape(1))
            chosen = self.weight_format.block_scales(linear.weight, scale, name=self.name, rule=rule, amax=amax)
            linear.weight_block_scales.copy_(chosen.view(torch.uint8))

    def quantized_weight(self, linear: QuantizedLinear, dtype: torch.dtype) -> Tensor:
        """Return the quantized weight [out, in] of a member in ``dtype``; it is made once per update.

        It is quantized in float32 and rounded to ``dtype`` afterwards, as servers decode it.

        Raises:
            QADError: a weight contains NaN or Inf.
        """
        tensors = [x for member in self.members for x in (member.weight, *self._scales_of(member))]
        if (state := (dtype, *map(_state_of, tensors))) != self._weights_of:
            self._weights = [weight.to(dtype) for weight in self._quantize()]
            self._weights_of = state
        return self._weights[self.members.index(linear)]

    def weights_changed(self) -> None:
        """Quantize again in the next forward pass."""
        self._weights_of, self._weights = (), []

    def gradient_arrived(self) -> None:
        """Record a backward pass, after which an optimizer may update the weights."""
        if not self.updates_are_announced:
            self.weights_changed()

    def saturated(self, linear: QuantizedLinear) -> Tensor | None:
        """Return which elements [out, in] of a member are beyond their frozen scales; None if they are not frozen."""
        if not self.setting.is_frozen:
            return None
        limits = self.weight_format.saturation_limits(self._frozen_scale(linear), _e4m3(linear.weight_block_scales))
        blocks = linear.weight.detach().float().abs().view(*limits.shape, self.weight_format.block_size)
        return (blocks > limits.unsqueeze(-1)).view(linear.weight.shape)

    @torch.no_grad()
    def _quantize(self) -> list[Tensor]:
        weights = [linear.weight.detach() for linear in self.members]
        if self.weight_format is None:
            return weights
        if self.setting.is_frozen:
            return [
                self.weight_format.fake_quant_fixed(
                    weight, self._frozen_scale(linear), _e4m3(linear.weight_block_scales), name=self.name
                )
                for linear, weight in zip(self.members, weights, strict=True)
            ]
        scale = self.weight_format.scale_from_amax(self._amax(), name=self.name, rule=self.setting.rule)
        copies, names = [weight.clone() for weight in weights], [self.name] * len(weights)
        self.weight_format.fake_quant_list_(copies, scale.reshape(1).repeat(len(copies)), names, self.setting.rule)
        return copies

    def _frozen_scale(self, linear: QuantizedLinear) -> Tensor:
        amax = linear.weight_amax.reshape(())
        return self.weight_format.scale_from_amax(amax, name=self.name, check=False, rule=self.setting.rule)

    def _amax(self) -> Tensor:
        """Return the amax over all members, float32 []."""
        return torch.stack([tensor_amax(linear.weight.detach()) for linear in self.members]).amax()

    def _scales_of(self, linear: QuantizedLinear) -> tuple[Tensor, ...]:
        return (linear.weight_amax, linear.weight_block_scales) if self.setting.is_frozen else ()


def _state_of(tensor: Tensor) -> tuple[int, int]:
    """Return what changes when a tensor's values do: its version, which updates increment, and its place in memory."""
    return tensor._version, tensor.data_ptr()


def _e4m3(bits: Tensor) -> Tensor:
    return bits.view(torch.float8_e4m3fn)
