"""A model smoothed on its own calibration text, in any parallel layout: passes that look, then factors, then a save.

Nothing is trained. What comes out is a checkpoint of the same model, to be the teacher (and so the student's start) of
a job whose NVFP4 then costs less: the scales that ``quantization.smoothing`` moved are in its weights.
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
class Smoothed:
    """What smoothing did."""

    sharded: dict
    """The model's sharded state dict, this rank's part."""
    factors: dict[str, Tensor]
    """float32 [channels] of this rank, powers of two, by the name of what reads the channels."""
    num_sequences: int
    largest_change: float
    """Of any final hidden state of the first microbatch, as a share of their root mean square; 0.0 says that all are
    what they were, bit for bit."""


# A reader that was left out would change the states by as much as they are. What may differ is the order of sums on a
# GPU that adds up experts' outputs as they come: a few of bfloat16's roundings, of 2^-8.
_LARGEST_CHANGE = 0.05


def smooth(job: QADJob, alpha: float) -> Smoothed:
    """Smooth ``--qad-teacher`` by ``--qad-calibration-samples`` sequences of the training split. Collective.

    Args:
        alpha: see ``quantization.smoothing.block_factors``.

    Raises:
        QADError: the model is not what it was; NaN or Inf in the text's passes.
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
    at_a_time = 4 * mpu.get_pipeline_model_parallel_world_size()
    with smoothing.watching():
        before = _hidden_states(job, chunks, batches[:first])
        for i in range(first, len(batches), at_a_time):  # all at once, their hidden states would take gigabytes
            _hidden_states(job, chunks, batches[i : i + at_a_time])
    factors = smoothing.apply_(alpha)
    after = _hidden_states(job, chunks, batches[:first])
    change = _change(before, after)
    if change > _LARGEST_CHANGE:
        raise QADError(
            f"smoothing changed the model: a final hidden state by {change:.3g} of their root mean square. Nothing was "
            "written; this is a problem of megatron_qad"
        )
    num_sequences = len(batches) * job.args.micro_batch_size * mpu.get_data_parallel_world_size()
    return Smoothed(weights_to_save(chunks), factors, num_sequences, change)


def _batches(job: QADJob) -> list[Batch]:
    args = job.args
    number = num_calibration_batches(job.config.options.qad_calibration_samples, args.micro_batch_size)
    samples = number * args.micro_batch_size * mpu.get_data_parallel_world_size()
    args.iteration = args.consumed_train_samples = args.consumed_valid_samples = 0
    args.train_iters = -(-samples // args.global_batch_size)
    iterator, _, _ = build_train_valid_test_data_iterators(job.datasets_provider)
    return job.reader.read(iterator, number, args.micro_batch_size, args.seq_length)


def _hidden_states(job: QADJob, chunks: list[torch.nn.Module], batches: list[Batch]) -> list[Tensor]:
    """Final hidden states of each microbatch, on the last stage."""
    args = job.args
    shape = job.reader.schedule_shape(seq_length=args.seq_length, micro_batch_size=args.micro_batch_size)
    with torch.no_grad():
        return Teacher(chunks, job.forward, keeps_hidden=True).forward(batches, **shape, decoder_seq_length=None)


def _change(before: list[Tensor], after: list[Tensor]) -> float:
    """The largest difference over all ranks, as a share of the states' root mean square; infinite for NaN."""
    largest = torch.zeros((), device=torch.cuda.current_device())
    for old, new in zip(before, after, strict=True):
        difference = (new.float() - old.float()).abs().max() / old.float().square().mean().sqrt()
        largest = torch.maximum(largest, difference.nan_to_num(nan=torch.inf, posinf=torch.inf))
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    return largest.item()
