"""The student's activations: quantizers put in by modelopt, calibrated, run by our arithmetic.

modelopt knows Megatron's linears (also Transformer Engine's fused ones) and where their inputs are. It has no NVFP4
forward pass on the CPU, so backends of ours, registered by name, compute the formats: the same arithmetic as
everywhere else. Quantized are inputs of linears (NVFP4, FP8) and keys and values on their way into the KV cache (FP8).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.quantization.nn import QuantModuleRegistry, TensorQuantizer, register_quant_backend
from modelopt.torch.quantization.nn.modules.quant_module import QuantLinearConvBase
from modelopt.torch.quantization.nn.modules.tensor_quantizer import is_registered_quant_backend

from megatron_qad.engine.errors import QADError
from megatron_qad.formats.format import NumberFormat
from megatron_qad.formats.format_registry import FORMATS, KV_CACHE_FORMATS, UNQUANTIZED
from megatron_qad.quantization.calibration import make_calibrator, no_counts, percentile_amax
from megatron_qad.quantization.kv_cache import QuantCoreAttention, quantize_kv_cache
from megatron_qad.quantization.names import alike_experts, named_modules_globally

MIN_EXPERT_TOKENS = 16
"""An expert that saw fewer in calibration does not know how large its inputs become."""


class FakeQuantSTE(torch.autograd.Function):
    """Quantized forward, identity backward: the report keeps gradients in high precision."""

    @staticmethod
    def forward(ctx, x, scale, fake_quant):
        # check=False, here and below: a check waits for the device. Amaxes were checked in calibration; NaN of an input
        # reaches the loss, where it is looked for.
        return fake_quant(x, scale, check=False)

    @staticmethod
    def backward(ctx, grad):
        return grad, None, None


def quantize_input(number_format: NumberFormat, x: torch.Tensor, quantizer: TensorQuantizer) -> torch.Tensor:
    """``x`` [..., K] in the format under the quantizer's amax, with a straight-through gradient."""
    scale = number_format.scale_from_amax(quantizer.amax, check=False)
    return FakeQuantSTE.apply(x, scale, number_format.fake_quant)


def backend_of(number_format: NumberFormat) -> str:
    """The name of the modelopt backend that runs ``quantize_input`` for a format; registered here if it is not yet."""
    name = f"megatron_qad_{number_format.name}"
    if not is_registered_quant_backend(name):
        register_quant_backend(name, partial(quantize_input, number_format))
    return name


def input_attributes(number_format: NumberFormat) -> dict[str, Any]:
    """modelopt's attributes for a quantizer of inputs, keys or values in a format."""
    return {**number_format.input_attributes, "backend": backend_of(number_format), "enable": True}


class ActivationQuantizers:
    """The activation quantizers of one student, over all its model chunks on this rank.

    Args:
        chunks: unwrapped model chunks; modelopt replaces their linears in place.
        formats: format of every linear, by global Megatron weight name.
        groups: process groups over which an activation is the same tensor or a part of it (tensor and data parallel, in
            this order); its amax is the maximum over all of them. Experts that a rank does not hold are others'.
        kv_cache: one of ``KV_CACHE_FORMATS``.
        percentile: share, in %, of the input magnitudes that an amax covers; None: all of them, the maximum.
    """

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        formats: dict[str, str],
        groups: Sequence = (),
        *,
        kv_cache: str = "bf16",
        percentile: float | None = None,
    ):
        # Tensor-parallel ranks see the same tokens, data-parallel ones their own.
        ops = (torch.distributed.ReduceOp.MAX, torch.distributed.ReduceOp.SUM)
        used = [(g, op) for g, op in zip(groups, ops, strict=False) if g is not None and g.size() > 1]
        self.groups, self.count_ops = [g for g, _ in used], [op for _, op in used]
        self.percentile = percentile
        self.quantizers: dict[str, TensorQuantizer] = {}
        """By the name of what they quantize: ``LINEAR``, or ``ATTENTION.k_bmm_quantizer``."""
        self.fallbacks: dict[str, tuple[str, int]] = {}
        """Experts' linears that saw too few tokens in calibration: whose amax they were given, and how many it were. Of
        all ranks of ``groups``."""
        self._calibrated = False
        for chunk in chunks:
            _register(chunk, ".core_attention", QuantCoreAttention)
            _register(chunk, "_latent_proj", QuantLinearConvBase)
            mtq.replace_quant_module(chunk)
            for module in chunk.modules():
                if isinstance(module, TensorQuantizer):
                    module.disable()
            for name, module in named_modules_globally(chunk):
                linear_format = FORMATS[formats.get(f"{name}.weight", UNQUANTIZED.name)]
                if linear_format.input is not None:
                    module.input_quantizer.set_from_attribute_config(input_attributes(linear_format.input))
                    self.quantizers[name] = module.input_quantizer
            if (kv_format := KV_CACHE_FORMATS[kv_cache]) is not None:
                self.quantizers |= quantize_kv_cache(chunk, input_attributes(kv_format.number))

    @property
    def calibrated(self) -> bool:
        """Whether every quantizer knows its amax (from calibration or from a checkpoint)."""
        if not self._calibrated:  # asked once: each look at an amax waits for the device
            amaxes = [getattr(quantizer, "_amax", None) for quantizer in self.quantizers.values()]
            self._calibrated = all(amax is not None and bool(amax > 0) for amax in amaxes)
            if self._calibrated:
                # Loading leaves them as modelopt and Megatron's 16-bit wrapper make them: without an axis, and in the
                # inputs' precision, which holds their maximum exactly. A job saves them as it found them.
                for quantizer in self.quantizers.values():
                    quantizer._amax = quantizer._amax.float().view(1)
        return self._calibrated

    def expect_amax(self, device=None) -> None:
        """Register the amax buffers, so that loading a checkpoint fills them."""
        self._calibrated = False
        for quantizer in self.quantizers.values():
            quantizer.amax = torch.zeros(1, dtype=torch.float32, device=device)

    def use(self, formats: Mapping[str, str]) -> None:
        """Quantize the inputs of these linears in these formats, and no others; the amaxes stay.

        Args:
            formats: by Megatron weight name; all of them among those that were calibrated.
        """
        for name, quantizer in self.quantizers.items():
            input_format = FORMATS[formats.get(f"{name}.weight", UNQUANTIZED.name)].input
            if input_format is None:
                quantizer.disable()
            else:
                quantizer.set_from_attribute_config(input_attributes(input_format))

    @contextmanager
    def calibrating(self) -> Iterator[None]:
        """Forward passes in this block run unquantized and collect each input's magnitudes.

        An expert that saw fewer than ``MIN_EXPERT_TOKENS`` tokens over all ranks gets the largest amax of its layer's
        experts at the same place, and stands in ``fallbacks``.

        Raises:
            QADError: another linear that saw nothing but zeros, or one whose input held NaN or Inf; named.
        """
        self._calibrated = False
        self.fallbacks = {}
        for quantizer in self.quantizers.values():
            quantizer.reset_amax()
            quantizer._calibrator = make_calibrator("max" if self.percentile is None else "percentile")
            quantizer.disable_quant()
            quantizer.enable_calib()
        yield
        amaxes = self._reduced_amaxes()
        for name, quantizer in self.quantizers.items():
            quantizer.amax = amaxes[name].view(1)
            quantizer.disable_calib()
            quantizer.enable_quant()

    def _reduced_amaxes(self) -> dict[str, torch.Tensor]:
        """float32 scalars by name, equal on all ranks."""
        names = self._names_of_all()
        if not names:
            return {}
        device = torch.cuda.current_device() if torch.cuda.is_available() else None
        zero = torch.zeros((), dtype=torch.float32, device=device)
        calibrators = [self.quantizers[name]._calibrator if name in self.quantizers else None for name in names]
        seen = [None if calibrator is None else calibrator.compute_amax() for calibrator in calibrators]
        amaxes = torch.stack([zero if amax is None else amax.detach().float().reshape(()) for amax in seen])
        amaxes = torch.where(amaxes.isnan(), torch.inf, amaxes)  # a maximum may ignore NaN
        for group in self.groups:
            torch.distributed.all_reduce(amaxes, op=torch.distributed.ReduceOp.MAX, group=group)
        found = dict(zip(names, amaxes.tolist(), strict=True))
        _check_finite(found)
        if self.percentile is not None:
            amaxes = torch.stack([self._percentile(calibrator, zero) for calibrator in calibrators])
            found = dict(zip(names, amaxes.tolist(), strict=True))
        taken = self._fallbacks(found, self._num_tokens(calibrators, device))
        place = {name: i for i, name in enumerate(names)}
        return {name: amaxes[place[taken.get(name, name)]] for name in self.quantizers}

    def _names_of_all(self) -> list[str]:
        """The quantizers of all ranks of ``groups``, which hold other experts each, in the same order everywhere."""
        names = list(self.quantizers)
        for group in self.groups:
            lists: list[list[str]] = [[] for _ in range(group.size())]
            torch.distributed.all_gather_object(lists, names, group=group)
            names = list(dict.fromkeys(name for of_rank in lists for name in of_rank))
        return names

    def _num_tokens(self, calibrators: list, device) -> list[int]:
        counts = torch.tensor([getattr(c, "num_tokens", 0) for c in calibrators], dtype=torch.int64, device=device)
        for group, op in zip(self.groups, self.count_ops, strict=True):
            torch.distributed.all_reduce(counts, op=op, group=group)
        return counts.tolist()

    def _percentile(self, calibrator, zero: torch.Tensor) -> torch.Tensor:
        # One all-reduce a quantizer: 255 KiB each, once a job.
        counts = getattr(calibrator, "counts", None)
        counts = no_counts(zero.device) if counts is None else counts
        for group in self.groups:
            torch.distributed.all_reduce(counts, group=group)
        return percentile_amax(counts, self.percentile)

    def _fallbacks(self, found: dict[str, float], num_tokens: list[int]) -> dict[str, str]:
        """By linear, the other one whose amax it takes."""
        taken, alike = {}, alike_experts(found)
        for name, tokens in zip(found, num_tokens, strict=True):
            largest = max(alike.get(name, [name]), key=found.__getitem__)
            if found[largest] > found[name] and tokens < MIN_EXPERT_TOKENS:
                self.fallbacks[name], taken[name] = (largest, tokens), largest
            elif found[name] == 0:
                raise QADError(
                    f"calibration: the input of {name} has amax 0.0: {name} saw no input but zeros. Every quantized "
                    "linear must run in the calibration passes; look for a dead layer, or calibrate on more samples"
                )
        return taken


def _check_finite(amaxes: dict[str, float]) -> None:
    for name, amax in amaxes.items():
        if amax == float("inf"):
            raise QADError(
                f"calibration: the input of {name} has amax {amax}; expected a finite positive number. "
                "Look for NaN in the weights before it"
            )


def _register(chunk: torch.nn.Module, ending: str, quantized: type) -> None:
    """Let modelopt put ``quantized`` in the place of modules whose names end so, unless it knows them itself."""
    for name, module in chunk.named_modules():
        if name.endswith(ending) and type(module) not in QuantModuleRegistry:
            QuantModuleRegistry.register({type(module): f"megatron_{type(module).__name__}"})(quantized)
