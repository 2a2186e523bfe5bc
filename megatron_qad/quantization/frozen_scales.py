"""Weights whose scales are carried: frozen scales, and amaxes that the quantized weight does not preserve.

Frozen scales (``update: frozen``) are computed once, from the initial weight; those of ``local_hessian`` also from its
inputs in the calibration. At each step the weight is quantized with them; only the weight is trained. A weight that
outgrows its block saturates. Its gradient is then masked, as the gradient of a clamp is: without the mask the master
would drift away from the value that the model computes with.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_qad.engine.masters import master_part
from megatron_qad.formats.format import NumberFormat
from megatron_qad.quantization.carried_scales import CarriedModule, CarriedScales
from megatron_qad.quantization.names import LinearWeight, is_expert
from megatron_qad.quantization.scale_settings import PLAIN_SWEEP, ScaleSetting


def carries_scales(number_format: NumberFormat, setting: ScaleSetting) -> bool:
    """Whether checkpoints must carry the amax of a weight, and its block scales if they are frozen."""
    return setting.is_frozen or not number_format.preserves_amax(setting.rule)


@dataclass(frozen=True)
class CarriedWeight:
    """A weight with carried scales, on this rank."""

    name: str
    """Global name of the weight."""
    linear: LinearWeight
    number_format: NumberFormat
    setting: ScaleSetting
    scales: CarriedScales
    module: str
    """Name of the weight's module in its model chunk."""

    @property
    def amax(self) -> Tensor:
        """The amax over all shards, from which the scale follows: float32 [], a view."""
        return self.scales.amax(self.module, self.linear.expert)

    @property
    def block_scales(self) -> Tensor:
        """The frozen block scales of this shard: float8_e4m3fn [out, in / block size], a view."""
        return self.scales.block_scales(self.module, self.linear.expert)

    @property
    def scale(self) -> Tensor:
        """The scale of the tensor, float32 []."""
        return self.number_format.scale_from_amax(self.amax, name=self.name, check=False, rule=self.setting.rule)

    @property
    def waits_for_moments(self) -> bool:
        """Whether the scales are still unknown, because they depend on inputs that no pass has observed."""
        return self.setting.needs_moments and bool(self.amax.isnan())

    @torch.no_grad()
    def initialize(self, amax: Tensor, moments: Tensor | None = None) -> None:
        """Set the amax, float32 [], and choose the block scales if they are frozen, from the current weight.

        Args:
            moments: second moments of the input, float32 [in / 16, 16, 16], for the rule ``local_hessian``. None: the
                plain squared error decides, as in modelopt for experts without tokens.

        Raises:
            QADError: the weight contains NaN or Inf.
        """
        rule, weight = self.setting.rule, self.linear.part_of(self.linear.parameter.data)
        if self.setting.needs_moments and moments is None:
            rule = PLAIN_SWEEP
        scale = self.number_format.scale_from_amax(amax, name=self.name, rule=rule)
        self.amax.copy_(amax)
        if self.setting.is_frozen:
            chosen = self.number_format.block_scales(
                weight, scale, name=self.name, rule=rule, amax=amax, hessian=moments
            )
            self.block_scales.view(torch.uint8).copy_(chosen.view(torch.uint8))

    def fake_quant(self, weight: Tensor) -> Tensor:
        """Return ``weight`` [out, in] fake-quantized with the frozen scales."""
        return self.number_format.fake_quant_fixed(weight, self.scale, self.block_scales, name=self.name)

    def limits(self) -> Tensor:
        """Return the largest magnitude that each block can hold, float32 [out, in / block size]."""
        return self.number_format.saturation_limits(self.scale, self.block_scales)


def attach_scales(
    chunk: torch.nn.Module,
    linears: Mapping[str, tuple[torch.nn.Module, LinearWeight]],
    number_formats: Mapping[str, NumberFormat],
    settings: Mapping[str, ScaleSetting],
    tp_ranks: tuple[int, int],
) -> dict[str, CarriedWeight]:
    """Give a model chunk the module of its carried scales, if there are any. Returns them by name of the weight.

    Args:
        chunk: a model chunk, wrapped or not.
        linears: module and place of each weight of the chunk, by global name.
        tp_ranks: this rank in the tensor-parallel groups of experts (second) and of all other weights (first).
    """
    chunk = unwrap_model(chunk)
    local_names = {module: name for name, module in chunk.named_modules()}
    modules, places = {}, {}
    for name, (module, linear) in linears.items():
        number_format, setting = number_formats[name], settings[name]
        if not carries_scales(number_format, setting):
            continue
        block_size = number_format.block_size if setting.is_frozen else None
        places[name] = local_names[module], linear
        modules[local_names[module]] = CarriedModule(module, block_size, tp_ranks[is_expert(name)])
    if not modules:
        return {}
    scales = CarriedScales(chunk, modules)
    return {
        name: CarriedWeight(name, linear, number_formats[name], settings[name], scales, module)
        for name, (module, linear) in places.items()
    }


@torch.no_grad()
def mask_gradients_(weights: Iterable[CarriedWeight], optimizer) -> None:
    """Set the gradients of saturated elements of frozen weights to zero, before the optimizer's update.

    An element is saturated if its master, in the precision of the weight, is beyond ``CarriedWeight.limits``. The
    masters decide, not the weights, which hold quantized values at that time. Each rank masks the part of the reduced
    gradient that its optimizer reads.

    Args:
        weights: the weights of a rank; those with other than frozen scales are left out.
        optimizer: Megatron's optimizer.
    """
    by_parameter: dict[torch.nn.Parameter, list[CarriedWeight]] = {}
    for weight in weights:
        if weight.setting.is_frozen and hasattr(weight.linear.parameter, "main_grad"):
            by_parameter.setdefault(weight.linear.parameter, []).append(weight)
    for parameter, members in by_parameter.items():
        if (part := master_part(parameter, optimizer)) is not None:
            _mask_parameter_(parameter, members, *part)


def _mask_parameter_(
    parameter: torch.nn.Parameter, members: Sequence[CarriedWeight], master: Tensor, start: int
) -> None:
    """Mask the gradient of the elements ``start`` to ``start + len(master)`` of a flat parameter."""
    limits = torch.cat([member.limits().flatten() for member in members])  # experts are in the order of the parameter
    end, size = start + len(master), members[0].number_format.block_size
    first = start // size
    limits = limits[first : -(-end // size)].repeat_interleave(size)[start - first * size :][: len(master)]
    saturated = master.to(parameter.dtype).float().abs() > limits
    parameter.main_grad.view(-1)[start:end].masked_fill_(saturated, 0)
