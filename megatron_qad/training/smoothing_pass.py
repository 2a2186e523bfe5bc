"""Smooths a model on calibration text, with any parallelism: observes activations, then rescales the weights.

Nothing is trained, and the function of the model stays the same. The result loses less accuracy in NVFP4; it becomes
the teacher of a job, and so the student's initial weights.
"""

from dataclasses import dataclass

import torch
from megatron.core import mpu
from megatron.training.training import build_train_valid_test_data_iterators
from torch import Tensor

from megatron_qad.engine.errors import QADError
from megatron_qad.models.builder import build_chunks, freeze
from megatron_qad.models.weight_loading import load_weights, weights_to_save
from megatron_qad.quantization.smoothing import Groups, Smoothing
from megatron_qad.training.batch import Batch, num_calibration_batches, round_up_to_pipeline
from megatron_qad.training.job import QADJob
from megatron_qad.training.models import model_config
from megatron_qad.training.teacher import Teacher


@dataclass
class SmoothingResult:
    """A smoothed model and the factors that were applied."""

    sharded: dict
    """Sharded state dict of the model on this rank."""
    factors: dict[str, Tensor]
    """float32 [channels] on this rank, powers of two, by the name of the module that reads the channels."""
    num_sequences: int
    """Number of calibration sequences over all ranks."""
    largest_change: float
    """Largest change of a final hidden state of the first microbatch, relative to their root mean square. 0.0 means
    that all are equal bit for bit."""


# A consumer that was not rescaled would change the states by their own size. A GPU may add expert outputs in another
# order, which changes them by a few bfloat16 roundings of 2^-8.
_LARGEST_CHANGE = 0.05


def smooth(job: QADJob, alpha: float) -> SmoothingResult:
    """Smooth ``--qad-teacher`` on ``--qad-calibration-samples`` sequences of the training split. Collective.

    Args:
        alpha: see ``quantization.smoothing.block_factors``.

    Raises:
        QADError: the outputs of the model changed, or are NaN or Inf on the calibration text.
    """
    chunks = build_chunks(model_config(job.config, job.args, job.config.student))
    load_weights(chunks, job.config.options.qad_teacher)
    chunks = [freeze(chunk) for chunk in chunks]
    groups = Groups(
        mpu.get_tensor_and_data_parallel_group(with_context_parallel=True),
        mpu.get_data_parallel_group(with_context_parallel=True),
        mpu.get_expert_data_parallel_group(),
    )
    smoothing = Smoothing(chunks, job.config.formats, groups)
    batches, first = _batches(job), round_up_to_pipeline(1)
    num_at_once = 4 * mpu.get_pipeline_model_parallel_world_size()
    with smoothing.watching():
        before = _hidden_states(job, chunks, batches[:first])
        for i in range(first, len(batches), num_at_once):  # hidden states of all batches would take gigabytes
            _hidden_states(job, chunks, batches[i : i + num_at_once])
    factors = smoothing.apply_(alpha)
    after = _hidden_states(job, chunks, batches[:first])
    change = _change(before, after)
    if change > _LARGEST_CHANGE:
        raise QADError(
            f"smoothing changed a final hidden state by {change:.3g} of their root mean square; expected at most "
            f"{_LARGEST_CHANGE}. Nothing was written. This is a bug in megatron_qad; please report it."
        )
    num_sequences = len(batches) * job.args.micro_batch_size * mpu.get_data_parallel_world_size()
    return SmoothingResult(weights_to_save(chunks), factors, num_sequences, change)


def _batches(job: QADJob) -> list[Batch]:
    args = job.args
    num_batches = num_calibration_batches(job.config.options.qad_calibration_samples, args.micro_batch_size)
    num_samples = num_batches * args.micro_batch_size * mpu.get_data_parallel_world_size()
    args.iteration = args.consumed_train_samples = args.consumed_valid_samples = 0
    args.train_iters = -(-num_samples // args.global_batch_size)
    iterator, _, _ = build_train_valid_test_data_iterators(job.datasets_provider)
    return job.reader.read(iterator, num_batches, args.micro_batch_size, args.seq_length)


def _hidden_states(job: QADJob, chunks: list[torch.nn.Module], batches: list[Batch]) -> list[Tensor]:
    """Return the final hidden states of each microbatch on the last stage."""
    args = job.args
    shape = job.reader.schedule_shape(seq_length=args.seq_length, micro_batch_size=args.micro_batch_size)
    with torch.no_grad():
        return Teacher(chunks, job.forward, keeps_hidden=True).forward(batches, **shape, decoder_seq_length=None)


def _change(before: list[Tensor], after: list[Tensor]) -> float:
    """Return the largest difference over all ranks, relative to the root mean square; infinite for NaN."""
    largest = torch.zeros((), device=torch.cuda.current_device())
    for old, new in zip(before, after, strict=True):
        difference = (new.float() - old.float()).abs().max() / old.float().square().mean().sqrt()
        largest = torch.maximum(largest, difference.nan_to_num(nan=torch.inf, posinf=torch.inf))
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    return largest.item()
