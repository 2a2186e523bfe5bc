"""``--qad-dry-run``: prints the models, formats, parallelism, epochs and bytes per rank of a job.

Counts the tensors whose size is known in advance: weights, teacher, gradients, optimizer state, logits or hidden
states. Not counted: activations, communication buffers and memory fragmentation. The largest pipeline stage is shown.
"""

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence

from megatron_qad.config.job_config import JobConfig
from megatron_qad.config.parallelism import is_row_parallel, ranks_of_layers, split_into_stages
from megatron_qad.distillation import LogitLoss
from megatron_qad.models.families.base import ParamMapping
from megatron_qad.quantization.format_table import format_rows, render
from megatron_qad.quantization.input_moments import moments_bytes


def print_plan(config: JobConfig, args: argparse.Namespace, data: Sequence[str]) -> None:
    """Print the plan of a job.

    Args:
        args: validated arguments of Megatron.
        data: lines about the data, from ``start.check_dry_run``.
    """
    print("\n".join(plan(config, args, data)))


def plan(config: JobConfig, args: argparse.Namespace, data: Sequence[str] = ()) -> Iterator[str]:
    """Yield the lines of the plan."""
    student, options = config.student, config.options
    tensors = student.family.tensors(student.hf)
    yield from model_lines(config, args)
    yield f"loss        {options.qad_loss}, temperature {options.qad_temperature:g}; policy {options.qad_policy}"
    yield f"outputs     {config.output_mode.describe()}"
    yield ""
    yield from render(format_rows(student.family.linears(student.hf), config.formats, config.scales))
    yield ""
    yield from parallelism_lines(config, args)
    yield from (f"{'data' if i == 0 else '':<11} {line}" for i, line in enumerate(data))
    yield from _bytes_per_rank(config, args, tensors)
    if config.notes:
        yield ""
        yield from (f"note        {note}" for note in config.notes)


def model_lines(config: JobConfig, args: argparse.Namespace) -> Iterator[str]:
    """Yield a line about each model."""
    student, teacher = config.student, config.teacher
    num_params = _num_params(student.family.tensors(student.hf))
    yield f"model       {student.family.architecture}, {num_params:,} parameters, layers {args.hybrid_layer_pattern}"
    if teacher is not None:
        num_params = _num_params(teacher.family.tensors(teacher.hf))
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


def _bytes_per_rank(config: JobConfig, args: argparse.Namespace, tensors: list[ParamMapping]) -> Iterator[str]:
    width = 2 if args.bf16 else 4
    dense, experts = _largest_stage(args, tensors, args.hybrid_layer_pattern)
    student = dense + experts
    rows = {"student weights": student * width}
    teacher = config.teacher if config.runs_teacher else None
    if teacher is not None:
        layers = teacher.family.layer_pattern(teacher.hf)
        pattern = split_into_stages(layers, args.pipeline_model_parallel_size * config.teacher_virtual_stages)
        teacher_tensors = teacher.family.tensors(teacher.hf)
        if config.options.qad_teacher_cpu_offload:
            rows["teacher weights, offloaded"] = _num_offloaded_params(args, teacher_tensors) * width
        else:
            rows["teacher weights"] = sum(_largest_stage(args, teacher_tensors, pattern)) * width
    if not config.options.qad_ptq:
        rows |= _training_state(args, dense, experts, width)
    if moments := _moments_bytes(config, args):
        rows["input moments of local_hessian"] = moments
    in_flight = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
    sizes, output_mode = config.output_sizes, config.output_mode
    if output_mode.fused:
        fused_sizes = sizes.fused(len(config.losses.terms_of_type(LogitLoss)), config.student.hidden_size)
        rows["logits of both models, one chunk"] = fused_sizes["chunk"]
        if not config.options.qad_ptq:
            rows["output weight's gradient, float32"] = fused_sizes["gradient"]
    else:
        rows["student logits, one microbatch"] = sizes.logits()
    if teacher is not None:
        output_sizes = {"logits": sizes.logits(), "hidden": sizes.hidden(teacher.hidden_size)}
        kept, other = ("hidden", "logits") if output_mode.teacher_hidden else ("logits", "hidden")
        rows[f"teacher {kept}, {in_flight} microbatch(es)"] = output_sizes[kept] * in_flight
    yield ""
    yield "bytes per rank (largest stage; logits on the last stage only)"
    for name, size in rows.items():
        yield f"  {name:<34} {size:>18,}"
    yield f"  {'sum':<34} {sum(rows.values()):>18,}"
    if teacher is not None:
        yield f"  not kept: teacher {other}, which would take {output_sizes[other] * in_flight:,} bytes"


def _training_state(args: argparse.Namespace, dense: int, experts: int, width: int) -> dict[str, int]:
    """Return the bytes of gradients and optimizer state for weights of ``width`` bytes."""
    gradients = (dense + experts) * (4 if args.accumulate_allreduce_grads_in_fp32 or width == 4 else 2)
    # Two moments of Adam, and a float32 master if the weights have 16 bits.
    bytes_per_param = 12 if width == 2 else 8
    shards = (args.data_parallel_size, _num_expert_copies(args)) if args.use_distributed_optimizer else (1, 1)
    state = dense * bytes_per_param // shards[0] + experts * bytes_per_param // shards[1]
    return {"gradients": gradients, "optimizer state": state}


def _moments_bytes(config: JobConfig, args: argparse.Namespace) -> int:
    """Return the bytes that the calibration of ``local_hessian`` needs on the rank with the most of them."""
    rank_of = ranks_of_layers(args.hybrid_layer_pattern, args.pipeline_model_parallel_size)
    held = [0] * args.pipeline_model_parallel_size
    for linear in config.student.family.linears(config.student.hf):
        if linear.megatron in config.scales and config.scales[linear.megatron].needs_moments:
            ranks = 1
            if _is_routed_expert(linear):
                ranks = args.expert_model_parallel_size
                if is_row_parallel(linear):
                    ranks *= args.expert_tensor_parallel_size
            elif is_row_parallel(linear):
                ranks = args.tensor_model_parallel_size
            held[-1 if linear.layer is None else rank_of[linear.layer]] += moments_bytes(linear.shape[1]) // ranks
    return max(held)


def _largest_stage(args: argparse.Namespace, tensors: list[ParamMapping], pattern: str) -> tuple[int, int]:
    """Return the parameters on the rank with the most of them: (outside of routed experts, in routed experts)."""
    pp = args.pipeline_model_parallel_size
    rank_of = ranks_of_layers(pattern, pp)
    held = [[0, 0] for _ in range(pp)]
    for tensor in tensors:
        numel = _num_params_per_rank(args, tensor)
        if tensor.layer is not None:
            held[rank_of[tensor.layer]][_is_routed_expert(tensor)] += numel
        elif tensor.kind == "embedding":
            held[0][0] += numel
            if not args.untie_embeddings_and_output_weights and pp > 1:
                held[-1][0] += numel  # a tied output layer on another stage is a copy of the embedding
        else:
            held[-1][0] += numel
    return tuple(max(held, key=sum))


def _num_offloaded_params(args: argparse.Namespace, tensors: list[ParamMapping]) -> int:
    """Return an offloaded teacher's parameters on the device: those outside of layers, and twice the largest layer."""
    layers, outside = Counter(), 0
    for tensor in tensors:
        numel = _num_params_per_rank(args, tensor)
        if tensor.layer is None:
            outside += numel
        else:
            layers[tensor.layer] += numel
    return outside + 2 * max(layers.values())


def _is_routed_expert(tensor: ParamMapping) -> bool:
    return ".experts.experts." in tensor.megatron


def _num_expert_copies(args: argparse.Namespace) -> int:
    """Return the number of ranks that hold the same experts."""
    expert_ranks = (
        args.expert_tensor_parallel_size * args.expert_model_parallel_size * args.pipeline_model_parallel_size
    )
    return args.world_size // expert_ranks


def _num_params_per_rank(args: argparse.Namespace, tensor: ParamMapping) -> int:
    """Return the number of a tensor's elements on a rank of its stage, averaged over expert-parallel ranks."""
    numel = _numel(tensor)
    if _is_routed_expert(tensor):
        return -(-numel // (args.expert_tensor_parallel_size * args.expert_model_parallel_size))
    is_replicated = tensor.kind in ("norm", "router") or "latent_proj" in tensor.megatron
    return numel if is_replicated else -(-numel // args.tensor_model_parallel_size)


def _numel(tensor: ParamMapping) -> int:
    numel = 1
    for size in tensor.shape:
        numel *= size
    return numel


def _num_params(tensors: list[ParamMapping]) -> int:
    return sum(_numel(tensor) for tensor in tensors)
