"""``--qad-dry-run``: prints the models, formats, parallelism, epochs, bytes per rank and estimated time of a job.

The bytes are those of ``planning.memory`` on the pipeline rank with the most of them. Not counted: temporary tensors,
communication buffers and memory fragmentation.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace

from megatron_qad.config.job_config import JobConfig
from megatron_qad.distillation import LogitLoss
from megatron_qad.engine import capabilities
from megatron_qad.planning.activations import TE, kernels_of
from megatron_qad.planning.layer_sizes import PlannedModel
from megatron_qad.planning.layout import Layout
from megatron_qad.planning.memory import ACTIVATIONS, PlannedJob, largest, rows_of_ranks, teacher_output
from megatron_qad.planning.schedule import activation_bytes
from megatron_qad.planning.static_bytes import ModelParams
from megatron_qad.planning.step_time import Machine, StepTimes
from megatron_qad.planning.time_lines import DEFAULT_CHIP, time_lines
from megatron_qad.quantization.format_table import fold_layers, format_rows, render

MAX_LINES = 60
"""Lines of a plan, which fit on a screen. ``--qad-dry-run-tensors`` has no limit."""


def print_plan(config: JobConfig, args: argparse.Namespace, data: Sequence[str]) -> None:
    """Print the plan of a job.

    Args:
        args: validated arguments of Megatron.
        data: lines about the data, from ``start.check_dry_run``.
    """
    print("\n".join(plan(config, args, data)))


def plan(config: JobConfig, args: argparse.Namespace, data: Sequence[str] = ()) -> Iterator[str]:
    """Yield the lines of the plan: at most ``MAX_LINES``, unless the job asks for the format of every tensor."""
    student, options = config.student, config.options
    before = list(model_lines(config, args))
    before.append(
        f"loss        {options.qad_loss}, temperature {options.qad_temperature:g}; policy {options.qad_policy}"
    )
    before += [f"outputs     {config.output_mode.describe()}", ""]
    after = ["", *parallelism_lines(config, args)]
    after += [f"{'data' if i == 0 else '':<11} {line}" for i, line in enumerate(data)]
    after += _bytes_per_rank(config, args)
    after += [] if options.qad_ptq else _step_time(config, args)
    if config.notes:
        after += ["", *(f"note        {note}" for note in config.notes)]
    rows = format_rows(student.family.linears(student.hf), config.formats, config.scales)
    table = list(render(rows if options.qad_dry_run_tensors else fold_layers(rows)))
    if not options.qad_dry_run_tensors:
        table = _shortened(table, MAX_LINES - len(before) - len(after))
    yield from (*before, *table, *after)


def _shortened(table: list[str], size: int) -> list[str]:
    """Leave out the last rows of a table above its totals, so that it has about ``size`` lines."""
    end = table.index("")
    num_left_out = len(table) + 1 - size
    if len(table) <= size or num_left_out >= end - 1:
        return table
    kept = table[: end - num_left_out]
    return [*kept, f"  ... and {num_left_out} more rows; --qad-dry-run-tensors prints all", *table[end:]]


def model_lines(config: JobConfig, args: argparse.Namespace) -> Iterator[str]:
    """Yield a line about each model."""
    student, teacher = config.student, config.teacher
    num_params = ModelParams(PlannedModel(student.family, student.hf)).total
    yield f"model       {student.family.architecture}, {num_params:,} parameters, layers {args.hybrid_layer_pattern}"
    if teacher is not None:
        num_params = ModelParams(PlannedModel(teacher.family, teacher.hf)).total
        yield f"teacher     {teacher.family.architecture}, {num_params:,} parameters, frozen"


def parallelism_lines(config: JobConfig, args: argparse.Namespace) -> Iterator[str]:
    """Yield lines about the ranks, and about the tokens of a step and of the job."""
    tokens = args.global_batch_size * args.seq_length
    microbatches = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
    yield (
        f"parallelism {args.world_size} ranks = TP {args.tensor_model_parallel_size} x PP "
        f"{args.pipeline_model_parallel_size} x CP {args.context_parallel_size} x DP {args.data_parallel_size}"
    )
    yield (
        f"step        {args.global_batch_size} sequences of {args.seq_length} = {tokens:,} tokens in {microbatches} "
        f"microbatches of {args.micro_batch_size}"
    )
    if config.options.qad_ptq:
        yield f"calibration {config.options.qad_calibration_samples} sequences; nothing is trained"
    elif args.train_iters:
        yield f"training    {args.train_iters} iterations = {args.train_iters * tokens:,} tokens"


def planned_job(config: JobConfig) -> PlannedJob:
    """Return what the planner needs to know about a job."""
    student, teacher = config.student, config.teacher if config.runs_teacher else None
    quantizes_kv = config.policy.kv_cache != "bf16"
    return PlannedJob(
        student=PlannedModel(student.family, student.hf, config.formats, quantizes_kv),
        teacher=None if teacher is None else PlannedModel(teacher.family, teacher.hf),
        kernels=kernels_of(config.layer_spec, capabilities().device == "cuda"),
        scales=config.scales,
        output_mode=config.output_mode,
        num_logit_losses=len(config.losses.terms_of_type(LogitLoss)),
        trains=not config.options.qad_ptq,
        offloads_teacher=config.options.qad_teacher_cpu_offload,
        vision=None if config.images is None else student.family.vision(student.hf),
    )


def _bytes_per_rank(config: JobConfig, args: argparse.Namespace) -> Iterator[str]:
    job, layout, sizes = planned_job(config), Layout.from_args(args), config.output_sizes
    rank, rows = largest(rows_of_ranks(job, layout, sizes))
    yield ""
    yield "bytes per rank" + (f" (pipeline rank {rank} of {layout.pp}, which has the most)" if layout.pp > 1 else "")
    for name, size in rows.items():
        yield f"  {name:<34} {size:>18,}"
    if ACTIVATIONS in rows:
        yield f"  {'sum without activations':<34} {sum(rows.values()) - rows[ACTIVATIONS]:>18,}"
    yield f"  {'sum':<34} {sum(rows.values()):>18,}"
    if job.trains:
        yield from _other_activations(job, layout, rank)
    if job.teacher is not None:
        other = "logits" if config.output_mode.teacher_hidden else "hidden"
        size = teacher_output(job, sizes, other) * layout.num_microbatches
        yield f"  not kept: teacher {other}, which would take {size:,} bytes"


def _other_activations(job: PlannedJob, layout: Layout, rank: int) -> Iterator[str]:
    """Yield which kernels the activation bytes assume, and the bytes with another choice."""
    others = []
    if job.kernels != TE:
        others.append(f"with Transformer Engine {activation_bytes(job.student, layout, TE)[rank]:,} (not measured)")
    changed = replace(layout, recompute="none" if layout.recompute == "full" else "full")
    what = "without recomputation" if layout.recompute == "full" else "with full recomputation"
    others.append(f"{what} {activation_bytes(job.student, changed, job.kernels)[rank]:,}")
    yield f"  activations: {job.kernels.describe()}; {', '.join(others)}"


def _step_time(config: JobConfig, args: argparse.Namespace) -> Iterator[str]:
    layout = Layout.from_args(args)
    times = StepTimes(planned_job(config), Machine(DEFAULT_CHIP.peak))
    yield ""
    yield from time_lines(times, layout, num_tokens=(args.train_iters or 0) * args.global_batch_size * args.seq_length)
