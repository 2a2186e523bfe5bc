"""Noise floor of a quantized model: its KL to itself when the inputs of its linears change by rounding errors.

An input that lies near the middle between two NVFP4 numbers is rounded to either of them, depending on its last bits.
Two implementations of the same model differ in these bits, and so does one model on two machines. The KL between them
is noise that no training removes, and a KL to the teacher can only be compared beyond it.
"""

from dataclasses import dataclass

import torch
from megatron.core.utils import unwrap_model

from megatron_qad.engine.errors import QADError
from megatron_qad.models.builder import build_chunks, freeze
from megatron_qad.models.weight_loading import load_quantizers, load_weights
from megatron_qad.training.held_out import HeldOut
from megatron_qad.training.job import QADJob
from megatron_qad.training.models import model_config

NUDGE = 2.0**-9
"""Relative size of the changes: half of the distance between neighbouring bfloat16 numbers, the largest rounding error
of an input."""


@dataclass(frozen=True)
class NoiseFloor:
    """Noise of a model's outputs."""

    kl: float
    """KL(model || the model with other rounding errors), in nats per token."""
    num_tokens: int
    """Number of counted tokens."""

    @property
    def floor(self) -> float:
        """Half of ``kl``, because both sides have noise, and a noiseless teacher sees that of one."""
        return self.kl / 2


def measure_noise(job: QADJob, num_microbatches: int, seed: int) -> NoiseFloor:
    """Measure a job's ``--qad-student``, quantized by the job's policy, on held-out text. Collective.

    Args:
        job: its parallel state is initialized. The student has calibrated amaxes.
        seed: of the changes. It is the same on all ranks, so that tensor-parallel ranks change the same input equally.

    Raises:
        QADError: the policy quantizes no inputs, or no token counts in the loss.
    """
    chunks = build_chunks(model_config(job.config, job.args, job.config.student))
    inner = unwrap_model(chunks)
    load_weights(inner, job.config.student.checkpoint)  # before the quantizers, which change how MLPs are stored
    activations = job.quantize_activations(inner)
    if not activations.quantizers:
        raise QADError(
            f"--qad-policy {job.config.options.qad_policy} quantizes no input, so there is no noise to measure."
        )
    activations.expect_amax(device=torch.cuda.current_device())
    weights = job.quantize_weights(inner)
    load_quantizers(inner, job.config.student.checkpoint)
    if not activations.calibrated:
        raise QADError(f"{job.config.student.checkpoint}: saved before calibration. Give a later checkpoint.")
    weights.quantize_()
    chunks = [freeze(chunk) for chunk in chunks]
    held_out = HeldOut(job, num_microbatches)
    held_out.set_reference(chunks)
    generator = torch.Generator(next(inner[0].parameters()).device).manual_seed(seed)

    def nudge(quantizer, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        (x,) = inputs
        noise = torch.randn(x.shape, generator=generator, device=x.device) * NUDGE
        return ((x.float() * (1 + noise)).to(x.dtype),)

    hooks = [quantizer.register_forward_pre_hook(nudge) for quantizer in activations.quantizers.values()]
    kl, num_tokens = held_out.kl(chunks)
    for hook in hooks:
        hook.remove()
    return NoiseFloor(kl, num_tokens)
