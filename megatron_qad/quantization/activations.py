"""The student's activations in NVFP4: quantizers put in by modelopt, calibrated by maximum, run by our arithmetic.

modelopt knows Megatron's linears (also Transformer Engine's fused ones) and where their inputs are; it has no NVFP4
forward pass on the CPU, so a backend of ours, registered by name, computes it: the same arithmetic as everywhere else.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.quantization.calib import MaxCalibrator
from modelopt.torch.quantization.nn import TensorQuantizer, register_quant_backend

from megatron_qad.formats import nvfp4
from megatron_qad.quantization.names import named_modules_globally
from megatron_qad.runtime.errors import QADError

BACKEND = "megatron_qad_nvfp4"
_NVFP4_INPUT = {
    "num_bits": (2, 1),
    "block_sizes": {-1: nvfp4.BLOCK_SIZE, "type": "dynamic", "scale_bits": (4, 3)},
    "backend": BACKEND,
    "enable": True,
}


class _RunningAmax(MaxCalibrator):
    """modelopt's max calibrator stops at a NaN without a name, on one rank of many. Here NaN and Inf stay in the
    maximum until the linear's name is known and all ranks stop together; no pass waits for the device."""

    def collect(self, x: torch.Tensor) -> None:
        amax = nvfp4.tensor_amax(x)
        self._calib_amax = amax if self._calib_amax is None else torch.maximum(self._calib_amax, amax)


class _FakeQuantSTE(torch.autograd.Function):
    """NVFP4 forward, identity backward: the report keeps gradients in high precision."""

    @staticmethod
    def forward(ctx, x, global_scale):
        return nvfp4.fake_quant(x, global_scale, check=False)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def nvfp4_inputs(x: torch.Tensor, quantizer: TensorQuantizer) -> torch.Tensor:
    """The backend: NVFP4 of ``x`` [..., K] under the quantizer's amax, with a straight-through gradient."""
    # check=False: a check synchronizes the device. NaN reaches the loss, where it is looked for.
    return _FakeQuantSTE.apply(x, nvfp4.global_scale_from_amax(quantizer.amax))


register_quant_backend(BACKEND, nvfp4_inputs)


class InputQuantizers:
    """The input quantizers of one student, over all its model chunks on this rank.

    Args:
        chunks: unwrapped model chunks; modelopt replaces their linears in place.
        formats: format of every linear, by global Megatron weight name.
        groups: process groups over which a linear's input is the same tensor or a part of it (tensor and data
            parallel); its amax is the maximum over all of them.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], formats: dict[str, str], groups: Sequence = ()):
        self.groups = [group for group in groups if group is not None and group.size() > 1]
        self.quantizers: dict[str, TensorQuantizer] = {}
        self._calibrated = False
        for chunk in chunks:
            mtq.replace_quant_module(chunk)
            for module in chunk.modules():
                if isinstance(module, TensorQuantizer):
                    module.disable()
            for name, module in named_modules_globally(chunk):
                if formats.get(f"{name}.weight") == "nvfp4":
                    module.input_quantizer.set_from_attribute_config(_NVFP4_INPUT)
                    self.quantizers[name] = module.input_quantizer

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

    @contextmanager
    def calibrating(self) -> Iterator[None]:
        """Forward passes in this block run unquantized and collect each input's maximum.

        Raises:
            QADError: a linear that saw no input, or one whose input held NaN, Inf or only zeros; named.
        """
        self._calibrated = False
        for quantizer in self.quantizers.values():
            quantizer.reset_amax()
            quantizer._calibrator = _RunningAmax()
            quantizer.disable_quant()
            quantizer.enable_calib()
        yield
        for name, quantizer in self.quantizers.items():
            amax = quantizer._calibrator.compute_amax()
            if amax is None:
                raise QADError(
                    f"calibration: {name} saw no input; every quantized linear must run in the calibration passes"
                )
            quantizer.amax = amax.detach().float().reshape(1)
            quantizer.disable_calib()
            quantizer.enable_quant()
        self._share_amaxes()

    def _share_amaxes(self) -> None:
        if not self.quantizers:
            return
        amaxes = torch.cat([quantizer._amax for quantizer in self.quantizers.values()])
        amaxes = torch.where(amaxes.isnan(), torch.inf, amaxes)  # a maximum may ignore NaN
        for group in self.groups:
            torch.distributed.all_reduce(amaxes, op=torch.distributed.ReduceOp.MAX, group=group)
        for (name, quantizer), amax in zip(self.quantizers.items(), amaxes, strict=True):
            if not 0 < amax.item() < float("inf"):
                raise QADError(
                    f"calibration: the input of {name} has amax {amax.item()}; expected a finite positive number. "
                    "Look for NaN in the weights before it, or for a dead layer"
                )
            quantizer.amax = amax.view(1)
