"""Parallelism: splits a layer pattern into pipeline stages, and checks the TP, PP, CP and EP sizes of a job.

``check_parallelism`` runs before Megatron's own checks and before any weight is built. Its errors list parallelism that
would work for this model on this number of ranks.
"""

import itertools
import math
from collections.abc import Iterator, Mapping

from megatron_qad.config.megatron_flags import MegatronFlags
from megatron_qad.config.qad_options import QADOptions
from megatron_qad.engine.errors import QADError
from megatron_qad.models.families.base import ParamMapping

_VIRTUAL_STAGES = "--num-virtual-stages-per-pipeline-rank"
_MAX_LISTED = 12  # suggestions in an error


def teacher_virtual_stages(num_layers: int, flags: MegatronFlags, options: QADOptions) -> int:
    """Return the teacher's virtual stages: as many as the student's if it has the layers for them; 1 if offloaded."""
    if options.qad_teacher_cpu_offload:
        return 1
    return max(1, min(flags.num_virtual_stages, num_layers // flags.pipeline_model_parallel_size))


def split_into_stages(pattern: str, num_stages: int) -> str:
    """Split a layer pattern into pipeline stages of as equal size as possible, separated by ``|``.

        >>> split_into_stages("*-*-*-", 4)
        '*-|*|-|*-'

    Raises:
        QADError: there are more stages than layers.
    """
    if num_stages > len(pattern):
        raise QADError(
            f"{num_stages} pipeline stages for {len(pattern)} layers ({pattern}): expected at most one stage per "
            "layer. Choose fewer stages."
        )
    cuts = [round(i * len(pattern) / num_stages) for i in range(num_stages + 1)]
    return "|".join(pattern[a:b] for a, b in itertools.pairwise(cuts))


def ranks_of_layers(pattern: str, num_ranks: int) -> list[int]:
    """Return the pipeline rank of each layer of a split pattern. Stages are assigned to the ranks in turn."""
    return [stage % num_ranks for stage, layers in enumerate(pattern.split("|")) for _ in layers]


def is_row_parallel(linear: ParamMapping) -> bool:
    """Whether tensor parallelism splits the columns of a linear's weight."""
    return linear.megatron_module.endswith(("linear_proj", "linear_fc2", "out_proj"))


def possible_tensor_parallel(shape: Mapping) -> tuple[dict[str, int], list[int]]:
    """Return the counts that the tensor-parallel size must divide, by name, and the sizes that divide all of them."""
    pattern, counts = shape["hybrid-layer-pattern"], {}
    if "*" in pattern:
        counts |= {
            "the attention heads": shape["num-attention-heads"],
            "the key-value heads": shape["num-query-groups"],
            "the 16-element blocks of the attention output": shape["num-attention-heads"] * shape["kv-channels"] // 16,
        }
    if "-" in pattern:
        widths = shape.get("mlp-widths") or [shape["ffn-hidden-size"]]
        counts["the 16-element blocks of the MLP"] = math.gcd(*widths) // 16
    if "M" in pattern:
        counts |= {
            "the Mamba heads": shape["mamba-num-heads"],
            "the Mamba groups": shape["mamba-num-groups"],
            "the 16-element blocks of the Mamba output": shape["mamba-num-heads"] * shape["mamba-head-dim"] // 16,
        }
    if shape.get("moe-shared-expert-intermediate-size"):
        counts["the 16-element blocks of the shared expert"] = shape["moe-shared-expert-intermediate-size"] // 16
    sizes = range(1, min(counts.values()) + 1)
    return counts, [size for size in sizes if all(count % size == 0 for count in counts.values())]


def _tensor_parallel_problems(shape: Mapping, tp: int, role: str) -> Iterator[str]:
    counts, possible = possible_tensor_parallel(shape)
    for name, count in counts.items():
        if count % tp:
            yield (
                f"--tensor-model-parallel-size {tp} does not divide {name} ({count}); possible for {role}: "
                f"{', '.join(map(str, possible))}"
            )


def check_parallelism(flags: MegatronFlags, options: QADOptions, shapes: Mapping[str, Mapping], world: int) -> None:
    """Check that the parallelism fits both models, the sequence length and the batch.

    Args:
        shapes: Megatron options of each model ("the student", "the teacher") with an unsplit layer pattern;
            "mlp-widths" are the inner widths of the MLP layers, if they differ.
        world: number of ranks.

    Raises:
        QADError: the parallelism does not fit; the error lists parallelism that would.
    """
    problem = parallelism_problem(flags, options, shapes, world)
    if problem is None:
        return
    suggestions = [
        f"TP {tp} x PP {pp} x CP {cp} x DP {world // (tp * pp * cp)}"
        for tp, pp, cp in _possible(flags, options, shapes, world)
    ]
    more = f" and {len(suggestions) - _MAX_LISTED} more" if len(suggestions) > _MAX_LISTED else ""
    listed = ", ".join(suggestions[:_MAX_LISTED]) or "none: change the sequence length or the batch"
    ranks = "1 rank" if world == 1 else f"{world} ranks"
    raise QADError(f"{problem}. Parallelism that would work on {ranks}: {listed}{more}.")


def parallelism_problem(
    flags: MegatronFlags, options: QADOptions, shapes: Mapping[str, Mapping], world: int
) -> str | None:
    """Return the first reason why the parallelism does not fit, or None (arguments of ``check_parallelism``)."""
    return next(_problems(flags, options, shapes, world), None)


def _problems(flags, options, shapes, world: int) -> Iterator[str]:
    tp, pp, cp = flags.tensor_model_parallel_size, flags.pipeline_model_parallel_size, flags.context_parallel_size
    virtual = flags.num_virtual_stages
    for role, shape in shapes.items():
        yield from _tensor_parallel_problems(shape, tp, role)
    for role, shape in shapes.items():
        pattern = shape["hybrid-layer-pattern"]
        stages = pp * virtual if role == "the student" else pp  # a teacher with fewer layers gets fewer virtual stages
        if stages > len(pattern):
            yield (
                f"{pp} pipeline stages x {stages // pp} virtual stages for {len(pattern)} layers ({pattern}) of "
                f"{role}: expected at most one stage per layer"
            )
    yield from _expert_problems(flags, shapes, tp, pp, world)
    yield from _mamba_problems(shapes, tp, cp)
    if world % (tp * pp * cp):
        yield (
            f"TP {tp} x PP {pp} x CP {cp} needs a multiple of {tp * pp * cp} ranks; this job has {world} "
            "(torchrun --nproc-per-node sets it; launch/torchrun.sh takes NPROC_PER_NODE, or the number of GPUs)"
        )
    yield from _sequence_problems(flags, options, tp, cp)
    yield from _batch_problems(flags, options, pp, virtual, world // (tp * pp * cp))


def _expert_problems(flags, shapes, tp: int, pp: int, world: int) -> Iterator[str]:
    ep, etp = flags.expert_model_parallel_size, flags.expert_tensor_parallel_size or tp
    if ep > 1 and not shapes["the student"].get("num-experts"):
        yield f"--expert-model-parallel-size {ep}, but the student has no experts"
    for role, shape in shapes.items():
        num_experts = shape.get("num-experts")
        if not num_experts:
            continue
        if num_experts % ep:
            possible = ", ".join(str(n) for n in range(1, num_experts + 1) if num_experts % n == 0)
            yield (
                f"--expert-model-parallel-size {ep} does not divide the experts of {role} ({num_experts}); possible: "
                f"{possible}"
            )
        if shape["moe-ffn-hidden-size"] // 16 % etp:
            yield (
                f"the expert tensor-parallel size {etp} does not divide the 16-element blocks of an expert of {role} "
                f"({shape['moe-ffn-hidden-size'] // 16}); --expert-tensor-parallel-size sets it independently of TP"
            )
        if tp > 1 and not flags.sequence_parallel:
            yield f"--tensor-model-parallel-size {tp} with experts ({role}) needs --sequence-parallel"
        if world % (etp * ep * pp):
            yield (
                f"experts at EP {ep} x expert TP {etp} x PP {pp} need a multiple of {etp * ep * pp} ranks; this job "
                f"has {world}"
            )


def _mamba_problems(shapes, tp: int, cp: int) -> Iterator[str]:
    for role, shape in shapes.items():
        if "M" not in shape["hybrid-layer-pattern"] or cp == 1:
            continue
        heads, groups = shape["mamba-num-heads"] // tp, shape["mamba-num-groups"] // tp
        if heads % cp or groups % cp and cp % groups:
            yield (
                f"--context-parallel-size {cp} does not divide the {heads} Mamba heads and {groups} groups of {role} "
                "on a tensor-parallel rank"
            )


def _sequence_problems(flags, options, tp: int, cp: int) -> Iterator[str]:
    length = flags.seq_length
    if length is not None:
        if cp > 1 and length % (2 * cp):
            yield f"--seq-length {length} is not a multiple of {2 * cp}, twice --context-parallel-size {cp}"
        if flags.sequence_parallel and length // cp % tp:
            yield f"--sequence-parallel: {length // cp} tokens per context-parallel rank are not divisible by TP {tp}"
    multiple = options.qad_pad_documents_to
    if multiple is not None:
        if not flags.dataloader_inter_document_masking:
            yield "--qad-pad-documents-to applies to packed rows only: add --dataloader-inter-document-masking"
        if multiple < 1 or cp > 1 and multiple % (2 * cp) or length is not None and length % multiple:
            yield (
                f"--qad-pad-documents-to {multiple} must divide --seq-length {length}"
                + (f" and be a multiple of {2 * cp}, twice --context-parallel-size {cp}" if cp > 1 else "")
            )


def _batch_problems(flags, options, pp: int, virtual: int, dp: int) -> Iterator[str]:
    if virtual > 1 and pp == 1:
        yield f"{_VIRTUAL_STAGES} {virtual} without pipeline parallelism"
    micro, total = flags.micro_batch_size, flags.global_batch_size
    if micro is None or total is None or flags.rampup_batch_size is not None:
        return
    if total % (micro * dp):
        yield (
            f"--global-batch-size {total} is not a multiple of {micro * dp}, --micro-batch-size {micro} x DP {dp}; "
            f"the nearest multiples are {total // (micro * dp) * (micro * dp) or micro * dp} and "
            f"{-(-total // (micro * dp)) * micro * dp}"
        )
    num_microbatches = total // (micro * dp)
    if virtual > 1 and num_microbatches % pp:
        yield (
            f"virtual stages need a number of microbatches that is divisible by PP {pp}; this job has "
            f"{num_microbatches} per step"
        )
    teacher = options.qad_teacher_micro_batch_size
    if teacher is None:
        return
    if teacher % micro or num_microbatches % (teacher // micro):
        yield (
            f"--qad-teacher-micro-batch-size {teacher} must be a multiple of --micro-batch-size {micro}, and its "
            f"{max(teacher // micro, 1)} microbatches must divide the {num_microbatches} microbatches of a step"
        )
    elif virtual > 1 and num_microbatches // (teacher // micro) % pp:
        yield (
            f"virtual stages need a number of teacher microbatches that is divisible by PP {pp}; this job has "
            f"{num_microbatches // (teacher // micro)}"
        )


def _possible(flags, options, shapes, world: int) -> Iterator[tuple[int, int, int]]:
    """Yield every (TP, PP, CP) that passes the checks without virtual stages, in order of TP."""
    sizes = [set(possible_tensor_parallel(shape)[1]) for shape in shapes.values()]
    max_pp = min(len(shape["hybrid-layer-pattern"]) for shape in shapes.values())
    for tp, pp, cp in itertools.product(sorted(set.intersection(*sizes)), range(1, max_pp + 1), range(1, world + 1)):
        if world % (tp * pp * cp):
            continue
        dp = world // (tp * pp * cp)
        if any(_expert_problems(flags, shapes, tp, pp, world)) or any(_mamba_problems(shapes, tp, cp)):
            continue
        if any(_sequence_problems(flags, options, tp, cp)) or any(_batch_problems(flags, options, pp, 1, dp)):
            continue
        yield tp, pp, cp
