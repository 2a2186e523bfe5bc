"""Activation quantizers of the student: inserted by modelopt, calibrated here, computed by our formats.

modelopt inserts quantizers into Megatron's linears, including Transformer Engine's fused ones. It has no NVFP4 forward
pass on the CPU, so we register backends that compute the formats with the arithmetic of ``formats``. They quantize the
inputs of linears (NVFP4, FP8) and the keys and values of the KV cache (FP8).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.quantization.nn import QuantModuleRegistry, TensorQuantizer, register_quant_backend
from modelopt.torch.quantization.nn.modules.quant_module import QuantInputBase, QuantLinearConvBase
from modelopt.torch.quantization.nn.modules.tensor_quantizer import is_registered_quant_backend
from modelopt.torch.utils.distributed import ParallelState

from megatron_qad.engine.errors import QADError
from megatron_qad.formats.format import NumberFormat
from megatron_qad.formats.format_registry import FORMATS, KV_CACHE_FORMATS, UNQUANTIZED
from megatron_qad.quantization.calibrated_amaxes import calibrator_of, reduced_amaxes
from megatron_qad.quantization.kv_cache import QuantCoreAttention, quantize_kv_cache
from megatron_qad.quantization.names import named_modules_globally, of_expert

_SCALE = "scale"
"""Key of a fixed scale among modelopt's arguments of a quantizer for its backend."""


class QuantGroupedLinear(QuantInputBase):
    """Linear of all local experts with one quantizer for the inputs of all of them."""

    def _setup(self):
        super()._setup()
        self.parallel_state = ParallelState(None)  # ours reduces the amax; without it modelopt warns


class FakeQuantSTE(torch.autograd.Function):
    """Straight-through estimator: quantized forward, identity backward. The paper keeps gradients in high precision."""

    @staticmethod
    def forward(ctx, x, scale, fake_quant):
        # check=False, here and below: a check would wait for the device. Calibration has checked the amaxes, and a NaN
        # in an input reaches the loss, which is checked.
        return fake_quant(x, scale, check=False)

    @staticmethod
    def backward(ctx, grad):
        return grad, None, None


def quantize_input(number_format: NumberFormat, x: torch.Tensor, quantizer: TensorQuantizer) -> torch.Tensor:
    """Fake-quantize ``x`` [..., K] with the quantizer's amax, or its fixed scale, and a straight-through gradient."""
    scale = (getattr(quantizer, "backend_extra_args", None) or {}).get(_SCALE)
    if scale is None:
        scale = number_format.input_scale_from_amax(quantizer.amax, check=False)
    return FakeQuantSTE.apply(x, scale, number_format.fake_quant)


def backend_of(number_format: NumberFormat) -> str:
    """Return the name of the modelopt backend that runs ``quantize_input`` for a format; register it if needed."""
    name = f"megatron_qad_{number_format.name}"
    if not is_registered_quant_backend(name):
        register_quant_backend(name, partial(quantize_input, number_format))
    return name


def input_attributes(number_format: NumberFormat) -> dict[str, Any]:
    """Return the modelopt attributes of a quantizer for inputs, keys or values in a format."""
    return {**number_format.input_attributes, "backend": backend_of(number_format), "enable": True}


class ActivationQuantizers:
    """The activation quantizers of one student, over all its model chunks on this rank.

    Args:
        chunks: unwrapped model chunks; modelopt replaces their linears in place.
        formats: the format of every linear, by global Megatron weight name.
        groups: the tensor-parallel and data-parallel process groups, in this order. The amax of an activation is the
            maximum over all their ranks. The experts of a layer share one amax per projection, as servers compute with
            the maximum over all experts.
        kv_cache: KV cache format, one of ``KV_CACHE_FORMATS``.
        percentile: percentage of the input magnitudes that an amax covers. None means the maximum.
        headroom: factor between the amax of NVFP4 inputs and a small block (``headroom``). None means no headroom.
    """

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        formats: dict[str, str],
        groups: Sequence = (),
        *,
        kv_cache: str = "bf16",
        percentile: float | None = None,
        headroom: float | None = None,
    ):
        self.groups = [group for group in groups if group is not None and group.size() > 1]
        self.percentile = percentile
        self.headroom = headroom
        self.quantizers: dict[str, TensorQuantizer] = {}
        """Quantizers by global name: ``LINEAR``, with "*" as the index of experts, or ``ATTENTION.k_bmm_quantizer``."""
        self._number_formats: dict[str, NumberFormat] = {}
        self._constant: list[TensorQuantizer] = []
        self._constant_amax: float | None = None
        self._calibrated = False
        for chunk in chunks:
            _register(chunk, ".core_attention", QuantCoreAttention)
            _register(chunk, "_latent_proj", QuantLinearConvBase)
            for projection in ("linear_fc1", "linear_fc2"):
                _register(chunk, f".experts.{projection}", QuantGroupedLinear)
            mtq.replace_quant_module(chunk)
            for module in chunk.modules():
                if isinstance(module, TensorQuantizer):
                    module.disable()
            for name, module in named_modules_globally(chunk):
                if (number_format := _input_format(name, formats)) is not None:
                    module.input_quantizer.set_from_attribute_config(input_attributes(number_format))
                    self.quantizers[name], self._number_formats[name] = module.input_quantizer, number_format
            if (kv_format := KV_CACHE_FORMATS[kv_cache]) is not None:
                of_kv_cache = quantize_kv_cache(chunk, input_attributes(kv_format.number))
                self.quantizers |= of_kv_cache
                self._number_formats |= dict.fromkeys(of_kv_cache, kv_format.number)
                if kv_format.constant_amax is not None:
                    self._constant += of_kv_cache.values()
                    self._constant_amax = kv_format.constant_amax
        self._set_constant_amaxes()

    @property
    def calibrated(self) -> bool:
        """Whether every quantizer has its amax, from calibration or from a checkpoint."""
        if not self._calibrated:  # cached, because reading an amax waits for the device
            amaxes = [getattr(quantizer, "_amax", None) for quantizer in self.quantizers.values()]
            self._calibrated = all(amax is not None and bool(amax > 0) for amax in amaxes)
            if self._calibrated:
                # After loading they are scalars in the precision of the inputs, because of modelopt and Megatron's
                # 16-bit wrapper. That precision holds a maximum exactly. Restore the shape and dtype of calibration.
                for quantizer in self.quantizers.values():
                    quantizer._amax = quantizer._amax.float().view(1)
                self._set_constant_amaxes()  # a checkpoint may hold calibrated ones
        return self._calibrated

    def expect_amax(self, device=None) -> None:
        """Register the amax buffers, so that loading a checkpoint can fill them."""
        self._calibrated = False
        for quantizer in self.quantizers.values():
            quantizer.amax = torch.zeros(1, dtype=torch.float32, device=device)

    def fix_scales(self, scales: Mapping[str, torch.Tensor], source: str) -> None:
        """Compute with these scales, which an exported checkpoint stores, instead of those of amaxes.

        Args:
            scales: float32 [] by the names of ``quantizers``; other names are ignored.
            source: the checkpoint, for errors.

        Raises:
            QADError: a quantizer of this rank has no scale.
        """
        if missing := [name for name in self.quantizers if name not in scales]:
            raise QADError(f"{source}: no scale for {missing[0]} ({len(missing)} missing). Export it again.")
        for name, quantizer in self.quantizers.items():
            quantizer.backend_extra_args = {_SCALE: scales[name].to(_device())}

    def use(self, formats: Mapping[str, str]) -> None:
        """Quantize only the inputs of these linears, in these formats, and keep the amaxes.

        Args:
            formats: formats by Megatron weight name. Every linear in it must have been calibrated.
        """
        for name, quantizer in self.quantizers.items():
            number_format = _input_format(name, formats)
            if number_format is None:
                quantizer.disable()
            else:
                quantizer.set_from_attribute_config(input_attributes(number_format))

    @contextmanager
    def calibrating(self) -> Iterator[None]:
        """Calibrate: forward passes inside this block run unquantized and collect the magnitudes of each input.

        Raises:
            QADError: the input of a linear, or of all experts of a layer, was always zero, or an input contained NaN or
                Inf.
        """
        self._calibrated = False
        calibrated = {name: q for name, q in self.quantizers.items() if q not in self._constant}
        for name, quantizer in calibrated.items():
            quantizer.reset_amax()
            quantizer._calibrator = calibrator_of(self._number_formats[name], self.percentile, self.headroom)
            quantizer.enable_calib()
        for quantizer in self.quantizers.values():
            quantizer.disable_quant()
        yield
        calibrators = {name: quantizer._calibrator for name, quantizer in calibrated.items()}
        amaxes = reduced_amaxes(calibrators, self._number_formats, self.groups, _device())
        for name, quantizer in calibrated.items():
            quantizer.amax = amaxes[name].view(1)
            quantizer.disable_calib()
        for quantizer in self.quantizers.values():
            quantizer.enable_quant()

    def _set_constant_amaxes(self) -> None:
        for quantizer in self._constant:
            quantizer.amax = torch.full((1,), self._constant_amax, dtype=torch.float32, device=_device())


def _device():
    return torch.cuda.current_device() if torch.cuda.is_available() else None


def _input_format(name: str, formats: Mapping[str, str]) -> NumberFormat | None:
    """Return the format of a linear's input. All experts of a layer have one format (``policy``)."""
    return FORMATS[formats.get(f"{of_expert(name, 0)}.weight", UNQUANTIZED.name)].input


def _register(chunk: torch.nn.Module, suffix: str, quantized: type) -> None:
    """Register ``quantized`` with modelopt for modules whose names end in ``suffix``, unless their type is known."""
    for name, module in chunk.named_modules():
        if name.endswith(suffix) and type(module) not in QuantModuleRegistry:
            QuantModuleRegistry.register({type(module): f"megatron_{type(module).__name__}"})(quantized)
