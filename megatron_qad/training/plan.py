"""``--qad-dry-run``: what a job would build and how much memory a rank would hold, from the configs alone.

Counted are tensors whose size is known beforehand: weights, teacher, gradients, optimizer state, logits. Not counted:
activations, communication buffers, the allocator's fragmentation. Pipeline stages differ; the largest is shown.
"""

import argparse
from collections import Counter
from collections.abc import Iterator

from megatron_qad.config.job_config import JobConfig
from megatron_qad.config.parallelism import ranks_of_layers, with_stages
from megatron_qad.distillation import LogitLoss
from megatron_qad.models.families.base import ParamMapping
from megatron_qad.quantization.format_table import format_rows, render


def print_plan(config: JobConfig, args: argparse.Namespace) -> None:
    """Print the plan of a job. ``args``: Megatron's, validated."""
    print("\n".join(plan(config, args)))


def plan(config: JobConfig, args: argparse.Namespace) -> Iterator[str]:
    """The lines of the plan."""
    student, options = config.student, config.options
    tensors = student.family.tensors(student.hf)
    number = _count(tensors)
    yield f"model       {student.family.architecture}, {number:,} parameters, layers {args.hybrid_layer_pattern}"
    if config.teacher is not None:
        family = config.teacher.family
        number = _count(family.tensors(config.teacher.hf))
        yield f"teacher     {family.architecture}, {number:,} parameters, frozen"
    yield f"loss        {options.qad_loss}, temperature {options.qad_temperature:g}; policy {options.qad_policy}"
    yield f"outputs     {config.output_mode.describe()}"
    yield ""
    yield from render(format_rows(student.family.linears(student.hf), config.formats))
    yield from _layout(args)
    yield from _bytes_per_rank(config, args, tensors)


def _layout(args: argparse.Namespace) -> Iterator[str]:
    tokens = args.global_batch_size * args.seq_length
    microbatches = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
    yield ""
    yield (
        f"layout      {args.world_size} ranks = TP {args.tensor_model_parallel_size} x PP "
        f"{args.pipeline_model_parallel_size} x CP {args.context_parallel_size} x DP {args.data_parallel_size}"
    )
    yield (
        f"step        {args.global_batch_size} sequences of {args.seq_length} = {tokens:,} tokens in {microbatches} "
        f"microbatches of {args.micro_batch_size}"
    )
    if args.train_iters:
        yield f"training    {args.train_iters} iterations = {args.train_iters * tokens:,} tokens"


def _bytes_per_rank(config: JobConfig, args: argparse.Namespace, tensors: list[ParamMapping]) -> Iterator[str]:
    width = 2 if args.bf16 else 4
    dense, experts = _largest_stage(args, tensors, args.hybrid_layer_pattern)
    student = dense + experts
    rows = {"student weights": student * width}
    teacher = config.teacher
    if teacher is not None:
        layers = teacher.family.layer_pattern(teacher.hf)
        pattern = with_stages(layers, args.pipeline_model_parallel_size * config.teacher_virtual_stages)
        of_teacher = teacher.family.tensors(teacher.hf)
        if config.options.qad_teacher_cpu_offload:
            rows["teacher weights, streamed"] = _streamed(args, of_teacher) * width
        else:
            rows["teacher weights"] = sum(_largest_stage(args, of_teacher, pattern)) * width
    rows["gradients"] = student * (4 if args.accumulate_allreduce_grads_in_fp32 or width == 4 else 2)
    # Two moments of Adam, and the float32 master where the weights are 16 bits wide.
    each = 12 if width == 2 else 8
    shards = (args.data_parallel_size, _expert_copies(args)) if args.use_distributed_optimizer else (1, 1)
    rows["optimizer state"] = dense * each // shards[0] + experts * each // shards[1]
    in_flight = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
    sizes, output_mode = config.output_sizes, config.output_mode
    if output_mode.fused:
        of_fused = sizes.fused(len(config.losses.terms_of_type(LogitLoss)), config.student.hidden_size)
        rows["logits of both models, one chunk"] = of_fused["chunk"]
        rows["output weight's gradient, float32"] = of_fused["gradient"]
    else:
        rows["student logits, one microbatch"] = sizes.logits()
    if teacher is not None:
        of_output = {"logits": sizes.logits(), "hidden": sizes.hidden(teacher.hidden_size)}
        kept, other = ("hidden", "logits") if output_mode.teacher_hidden else ("logits", "hidden")
        rows[f"teacher {kept}, {in_flight} microbatch(es)"] = of_output[kept] * in_flight
    yield ""
    yield "bytes on a rank (largest stage; the logits on the last stage only)"
    for name, size in rows.items():
        yield f"  {name:<34} {size:>18,}"
    yield f"  {'sum':<34} {sum(rows.values()):>18,}"
    if teacher is not None:
        yield f"  not kept: teacher {other}, which would take {of_output[other] * in_flight:,} bytes"


def _largest_stage(args: argparse.Namespace, tensors: list[ParamMapping], pattern: str) -> tuple[int, int]:
    """Parameters on the rank that holds most of them: all but the experts', and the experts'."""
    pp = args.pipeline_model_parallel_size
    rank_of = ranks_of_layers(pattern, pp)
    held = [[0, 0] for _ in range(pp)]
    for tensor in tensors:
        numel = _on_one_rank(args, tensor)
        if tensor.layer is not None:
            held[rank_of[tensor.layer]][_is_routed_expert(tensor)] += numel
        elif tensor.kind == "embedding":
            held[0][0] += numel
            if not args.untie_embeddings_and_output_weights and pp > 1:
                held[-1][0] += numel  # a tied head on another stage is a copy
        else:
            held[-1][0] += numel
    return tuple(max(held, key=sum))


def _streamed(args: argparse.Namespace, tensors: list[ParamMapping]) -> int:
    """Parameters of a streamed teacher on the device: what is in no layer, and twice the largest layer."""
    layers, ends = Counter(), 0
    for tensor in tensors:
        numel = _on_one_rank(args, tensor)
        if tensor.layer is None:
            ends += numel
        else:
            layers[tensor.layer] += numel
    return ends + 2 * max(layers.values())


def _is_routed_expert(tensor: ParamMapping) -> bool:
    return ".experts.experts." in tensor.megatron


def _expert_copies(args: argparse.Namespace) -> int:
    """Ranks that hold the same experts."""
    of_model = args.expert_tensor_parallel_size * args.expert_model_parallel_size * args.pipeline_model_parallel_size
    return args.world_size // of_model


def _on_one_rank(args: argparse.Namespace, tensor: ParamMapping) -> int:
    """Parameters of a tensor on a rank of its stage, on average over expert-parallel ranks."""
    numel = _numel(tensor)
    if _is_routed_expert(tensor):
        return -(-numel // (args.expert_tensor_parallel_size * args.expert_model_parallel_size))
    is_whole = tensor.kind in ("norm", "router") or "latent_proj" in tensor.megatron
    return numel if is_whole else -(-numel // args.tensor_model_parallel_size)


def _numel(tensor: ParamMapping) -> int:
    numel = 1
    for size in tensor.shape:
        numel *= size
    return numel


def _count(tensors: list[ParamMapping]) -> int:
    return sum(_numel(tensor) for tensor in tensors)
