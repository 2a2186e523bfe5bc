"""Counts the bytes that a rank keeps for its backward passes, for test_saved_activations.py."""

import json
from pathlib import Path

import torch


def measure(cases: list[dict], result: str) -> None:
    """Run a step of each case. Writes [counted, predicted] bytes of each rank to ``result``, a list for each case.

    Args:
        cases: "checkpoint", "flags" of the job; for packed rows also "lengths" of the documents of a row.
    """
    import worker_job

    rows = []
    for case in cases:
        with worker_job.job(case["checkpoint"], 1, 1, *case["flags"]) as job:
            ours = [_counted(job, case.get("lengths")), _predicted(job)]
        ranks = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(ranks, ours)
        rows.append(ranks)
    if torch.distributed.get_rank() == 0:
        Path(result).write_text(json.dumps(rows))


def _predicted(job) -> int:
    from megatron.core import mpu

    from megatron_qad.planning.activations import LOCAL
    from megatron_qad.planning.layer_sizes import PlannedModel
    from megatron_qad.planning.layout import Layout
    from megatron_qad.planning.schedule import activation_bytes

    config = job.config
    model = PlannedModel(config.student.family, config.student.hf, config.formats, config.policy.kv_cache != "bf16")
    layout = Layout.from_args(job.args)
    return activation_bytes(model, layout, LOCAL)[mpu.get_pipeline_model_parallel_rank()]


def _counted(job, lengths: list[int] | None) -> int:
    """Run the schedule of a step on random tokens. The loss is the sum of the final hidden states: it saves nothing."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_qad.models.builder import build_chunks
    from megatron_qad.planning.live_bytes import LiveBytes
    from megatron_qad.training.batch import iterators
    from megatron_qad.training.models import model_config

    args = job.args
    chunks = build_chunks(model_config(job.config, args, job.config.student))
    for quantizer in job.quantize_activations(chunks).quantizers.values():
        quantizer.amax = torch.full((1,), 8.0)
    num_microbatches = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
    batches = [_batch(args, lengths, seed) for seed in range(num_microbatches)]
    inputs = [tensor for batch in batches for tensor in (batch.tokens, batch.position_ids)]
    live = LiveBytes([*inputs, *(p for chunk in chunks for p in chunk.parameters())])

    def step(iterator, model):
        hidden = job.forward(model, next(iterator), hidden=True)
        return hidden, lambda output: (output.sum(), torch.tensor(1), {})

    stages = [None] * len(chunks) if len(chunks) > 1 else None
    with live.counting():
        get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iterators(batches, stages),
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=num_microbatches,
            forward_only=False,
            **job.reader.schedule_shape(seq_length=args.seq_length, micro_batch_size=args.micro_batch_size),
        )
    assert live.now == 0, f"{live.now} bytes are held after the step"
    return live.peak


def _batch(args, lengths: list[int] | None, seed: int):
    from megatron_qad.models.context_parallel import Documents
    from megatron_qad.training.batch import Batch

    rows, length = args.micro_batch_size, args.seq_length // args.context_parallel_size
    tokens = torch.randint(0, 100, (rows, length), generator=torch.Generator().manual_seed(seed))
    positions = torch.arange(length).repeat(rows, 1)
    if lengths is None:
        return Batch(tokens, positions)
    return Batch(tokens.view(1, -1), positions.view(1, -1), documents=Documents.from_lengths(lengths * rows))
