"""A model smoothed on its own calibration text, in any parallel layout: passes that look, then factors, then a save.

Nothing is trained. What comes out is a checkpoint of the same model, to be the teacher (and so the student's start) of
a job whose NVFP4 then costs less: the scales that ``quantization.smoothing`` moved are in its weights.
"""

import argparse
from dataclasses import dataclass

import torch
from megatron.core import mpu
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.training import build_train_valid_test_data_iterators
from torch import Tensor

from megatron_qad.data.provider import datasets_provider
from megatron_qad.models.builder import freeze
from megatron_qad.models.weights import load_weights, weights_to_save
from megatron_qad.quantization.smoothing import Groups, Smoothing
from megatron_qad.runtime.errors import QADError
from megatron_qad.training.arguments import model_config
from megatron_qad.training.batch import Batch, read_batches, schedule_shape
from megatron_qad.training.setup import resolve_formats
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
    """Of any final hidden state of the first microbatch; 0.0 says that all are what they were, bit for bit."""


def smooth(args: argparse.Namespace, exponent: float) -> Smoothed:
    """Smooth ``--qad-teacher`` by ``--qad-calibration-samples`` sequences of the training split. Collective.

    Args:
        exponent: see ``quantization.smoothing.block_factors``.

    Raises:
        QADError: the policy has no linear with NVFP4 inputs.
    """
    formats = resolve_formats(args)
    config = model_config(args, args.hf_config)
    chunks = config.get_builder_cls()(config).build_distributed_models(
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(), wrap_with_ddp=False
    )
    load_weights(chunks, args.qad.qad_teacher)
    chunks = [freeze(chunk) for chunk in chunks]
    groups = Groups(
        mpu.get_tensor_model_parallel_group(),
        mpu.get_data_parallel_group(with_context_parallel=True),
        mpu.get_expert_data_parallel_group(),
    )
    smoothing = Smoothing(chunks, formats, groups)
    if not _any_rank(bool(smoothing.exchanges)):
        raise QADError(f"--qad-policy {args.qad.qad_policy} quantizes no input to NVFP4, so there is nothing to smooth")
    batches, first = _batches(args), _whole_round(1)
    at_a_time = 4 * mpu.get_pipeline_model_parallel_world_size()
    with smoothing.watching():
        before = _hidden_states(args, chunks, batches[:first])
        for i in range(first, len(batches), at_a_time):  # all at once, their hidden states would take gigabytes
            _hidden_states(args, chunks, batches[i : i + at_a_time])
    factors = smoothing.apply_(exponent)
    after = _hidden_states(args, chunks, batches[:first])
    change = max((float((a.float() - b.float()).abs().max()) for a, b in zip(after, before, strict=True)), default=0.0)
    largest = torch.tensor(change, device=torch.cuda.current_device())
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    num_sequences = len(batches) * args.micro_batch_size * mpu.get_data_parallel_world_size()
    return Smoothed(weights_to_save(chunks), factors, num_sequences, largest.item())


def _batches(args: argparse.Namespace) -> list[Batch]:
    number = -(-args.qad.qad_calibration_samples // (args.micro_batch_size * mpu.get_data_parallel_world_size()))
    number = _whole_round(number)
    samples = number * args.micro_batch_size * mpu.get_data_parallel_world_size()
    args.iteration = args.consumed_train_samples = args.consumed_valid_samples = 0
    args.train_iters = -(-samples // args.global_batch_size)
    iterator, _, _ = build_train_valid_test_data_iterators(datasets_provider)
    return read_batches(iterator, number, args.micro_batch_size, args.seq_length)


def _whole_round(number: int) -> int:
    """Virtual stages want whole rounds of the pipeline."""
    if mpu.get_virtual_pipeline_model_parallel_world_size() is None:
        return number
    return -(-number // (stages := mpu.get_pipeline_model_parallel_world_size())) * stages


def _hidden_states(args: argparse.Namespace, chunks: list[torch.nn.Module], batches: list[Batch]) -> list[Tensor]:
    """Final hidden states of each microbatch, on the last stage."""
    shape = schedule_shape(seq_length=args.seq_length, micro_batch_size=args.micro_batch_size)
    with torch.no_grad():
        return Teacher(chunks, keeps_hidden=True).forward(batches, **shape, decoder_seq_length=None)


def _any_rank(is_so: bool) -> bool:
    found = torch.tensor(is_so, dtype=int, device=torch.cuda.current_device())
    torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
    return bool(found)
