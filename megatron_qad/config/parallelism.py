"""Parallelism: how a layer pattern is cut into pipeline stages, and which parallel layouts a job can have.

``check_parallelism`` runs before Megatron's own checks and before any weight is built, and its errors name layouts that
would work for this model on these ranks.
"""

import itertools
import math
from collections.abc import Iterator, Mapping

from megatron_qad.config.megatron_flags import MegatronFlags
from megatron_qad.config.qad_options import QADOptions
from megatron_qad.engine.errors import QADError

_VIRTUAL_STAGES = "--num-virtual-stages-per-pipeline-rank"
_MAX_NAMED = 12  # layouts in an error


def teacher_virtual_stages(num_layers: int, flags: MegatronFlags, options: QADOptions) -> int:
    """The student's virtual stages, or as many as a teacher of fewer layers has layers for; one if it is streamed."""
    if options.qad_teacher_cpu_offload:
        return 1
    return max(1, min(flags.num_virtual_stages, num_layers // flags.pipeline_model_parallel_size))


def with_stages(pattern: str, num_stages: int) -> str:
    """Cut a layer pattern into pipeline stages with ``|``, as evenly as its number of layers allows."""
    if num_stages > len(pattern):
        raise QADError(f"{num_stages} pipeline stages for {len(pattern)} layers ({pattern}): at most one stage a layer")
    cuts = [round(i * len(pattern) / num_stages) for i in range(num_stages + 1)]
    return "|".join(pattern[a:b] for a, b in itertools.pairwise(cuts))


def ranks_of_layers(pattern: str, num_ranks: int) -> list[int]:
    """The pipeline rank of each layer of a pattern cut into stages: virtual stages go round the ranks."""
    return [stage % num_ranks for stage, layers in enumerate(pattern.split("|")) for _ in layers]


def possible_tensor_parallel(shape: Mapping) -> tuple[dict[str, int], list[int]]:
    """What tensor parallelism must divide in a model, by name, and the sizes that divide all of it."""
    pattern, parts = shape["hybrid-layer-pattern"], {}
    if "*" in pattern:
        parts |= {
            "the attention heads": shape["num-attention-heads"],
            "the key-value heads": shape["num-query-groups"],
            "the 16-element blocks of the attention output": shape["num-attention-heads"] * shape["kv-channels"] // 16,
        }
    if "-" in pattern:
        widths = shape.get("mlp-widths") or [shape["ffn-hidden-size"]]
        parts["the 16-element blocks of the MLP"] = math.gcd(*widths) // 16
    if "M" in pattern:
        parts |= {
            "the Mamba heads": shape["mamba-num-heads"],
            "the Mamba groups": shape["mamba-num-groups"],
            "the 16-element blocks of the Mamba output": shape["mamba-num-heads"] * shape["mamba-head-dim"] // 16,
        }
    if shape.get("moe-shared-expert-intermediate-size"):
        parts["the 16-element blocks of the shared expert"] = shape["moe-shared-expert-intermediate-size"] // 16
    sizes = range(1, min(parts.values()) + 1)
    return parts, [size for size in sizes if all(number % size == 0 for number in parts.values())]


def _tensor_parallel_problems(shape: Mapping, tp: int, who: str) -> Iterator[str]:
    parts, possible = possible_tensor_parallel(shape)
    for name, number in parts.items():
        if number % tp:
            yield (
                f"--tensor-model-parallel-size {tp} does not divide {name} ({number}); possible for {who}: "
                f"{', '.join(map(str, possible))}"
            )


def check_parallelism(flags: MegatronFlags, options: QADOptions, shapes: Mapping[str, Mapping], world: int) -> None:
    """Refuse a layout that one of the models, the sequence or the batch cannot have.

    Args:
        shapes: Megatron options of each model ("the student", "the teacher") with its pattern uncut; "mlp-widths" are
            the inner widths of its layers' MLPs, if they differ.
        world: number of ranks.

    Raises:
        QADError: what does not fit, and layouts that do.
    """
    problem = next(_problems(flags, options, shapes, world), None)
    if problem is None:
        return
    named = [
        f"TP {tp} x PP {pp} x CP {cp} x DP {world // (tp * pp * cp)}"
        for tp, pp, cp in _possible(flags, options, shapes, world)
    ]
    more = f" and {len(named) - _MAX_NAMED} more" if len(named) > _MAX_NAMED else ""
    works = ", ".join(named[:_MAX_NAMED]) or "none: change the sequence length or the batch"
    raise QADError(f"{problem}. Layouts that would work on {world} rank(s): {works}{more}")


def _problems(flags, options, shapes, world: int) -> Iterator[str]:
    tp, pp, cp = flags.tensor_model_parallel_size, flags.pipeline_model_parallel_size, flags.context_parallel_size
    virtual = flags.num_virtual_stages
    for who, shape in shapes.items():
        yield from _tensor_parallel_problems(shape, tp, who)
    for who, shape in shapes.items():
        pattern = shape["hybrid-layer-pattern"]
        stages = pp * virtual if who == "the student" else pp  # a teacher takes as many virtual stages as it can
        if stages > len(pattern):
            yield (
                f"{pp} pipeline stages x {stages // pp} virtual ones for {len(pattern)} layers ({pattern}) of {who}: "
                "at most one stage a layer"
            )
    yield from _expert_problems(flags, shapes, tp, pp, world)
    yield from _mamba_problems(shapes, tp, cp)
    if world % (tp * pp * cp):
        yield f"TP {tp} x PP {pp} x CP {cp} needs a multiple of {tp * pp * cp} ranks; this job has {world}"
    yield from _sequence_problems(flags, options, tp, cp)
    yield from _batch_problems(flags, options, pp, virtual, world // (tp * pp * cp))


def _expert_problems(flags, shapes, tp: int, pp: int, world: int) -> Iterator[str]:
    ep, etp = flags.expert_model_parallel_size, flags.expert_tensor_parallel_size or tp
    if ep > 1 and not shapes["the student"].get("num-experts"):
        yield f"--expert-model-parallel-size {ep}, but the student has no experts"
    for who, shape in shapes.items():
        number = shape.get("num-experts")
        if not number:
            continue
        if number % ep:
            possible = ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)
            yield (
                f"--expert-model-parallel-size {ep} does not divide the experts of {who} ({number}); possible: "
                f"{possible}"
            )
        if shape["moe-ffn-hidden-size"] // 16 % etp:
            yield (
                f"the experts' tensor parallelism of {etp} does not divide the 16-element blocks of an expert of {who} "
                f"({shape['moe-ffn-hidden-size'] // 16}); --expert-tensor-parallel-size sets it apart from TP"
            )
        if tp > 1 and not flags.sequence_parallel:
            yield f"--tensor-model-parallel-size {tp} with experts ({who}) needs --sequence-parallel"
        if world % (etp * ep * pp):
            yield (
                f"experts at EP {ep} x expert TP {etp} x PP {pp} need a multiple of {etp * ep * pp} ranks; this job "
                f"has {world}"
            )


def _mamba_problems(shapes, tp: int, cp: int) -> Iterator[str]:
    for who, shape in shapes.items():
        if "M" not in shape["hybrid-layer-pattern"] or cp == 1:
            continue
        heads, groups = shape["mamba-num-heads"] // tp, shape["mamba-num-groups"] // tp
        if heads % cp or groups % cp and cp % groups:
            yield (
                f"--context-parallel-size {cp} does not divide the {heads} Mamba heads and {groups} groups that a "
                f"tensor-parallel rank has of {who}"
            )


def _sequence_problems(flags, options, tp: int, cp: int) -> Iterator[str]:
    length = flags.seq_length
    if length is not None:
        if cp > 1 and length % (2 * cp):
            yield f"--seq-length {length} is not a multiple of {2 * cp}, twice --context-parallel-size {cp}"
        if flags.sequence_parallel and length // cp % tp:
            yield f"--sequence-parallel: {length // cp} tokens of a rank's sequence are not divisible by TP {tp}"
    multiple = options.qad_pad_documents_to
    if multiple is not None:
        if not flags.dataloader_inter_document_masking:
            yield "--qad-pad-documents-to is for packed rows: add --dataloader-inter-document-masking"
        if multiple < 1 or cp > 1 and multiple % (2 * cp) or length is not None and length % multiple:
            yield (
                f"--qad-pad-documents-to {multiple} must divide --seq-length {length}"
                + (f" and be a multiple of {2 * cp}, twice --context-parallel-size {cp}" if cp > 1 else "")
            )


def _batch_problems(flags, options, pp: int, virtual: int, dp: int) -> Iterator[str]:
    if virtual > 1 and pp == 1:
        yield f"{_VIRTUAL_STAGES} {virtual} without pipeline parallelism"
    micro, whole = flags.micro_batch_size, flags.global_batch_size
    if micro is None or whole is None or flags.rampup_batch_size is not None:
        return
    if whole % (micro * dp):
        yield (
            f"--global-batch-size {whole} is not a multiple of {micro * dp}, --micro-batch-size {micro} x DP {dp}; "
            f"the next ones are {whole // (micro * dp) * (micro * dp) or micro * dp} and "
            f"{-(-whole // (micro * dp)) * micro * dp}"
        )
    number = whole // (micro * dp)
    if virtual > 1 and number % pp:
        yield f"virtual stages need a number of microbatches that PP {pp} divides; this job has {number} a step"
    teacher = options.qad_teacher_micro_batch_size
    if teacher is None:
        return
    if teacher % micro or number % (teacher // micro):
        yield (
            f"--qad-teacher-micro-batch-size {teacher} must be a multiple of --micro-batch-size {micro}, and its "
            f"{max(teacher // micro, 1)} microbatches must divide the {number} of a step"
        )
    elif virtual > 1 and number // (teacher // micro) % pp:
        yield f"virtual stages need a number of teacher microbatches that PP {pp} divides; this job has " + str(
            number // (teacher // micro)
        )


def _possible(flags, options, shapes, world: int) -> Iterator[tuple[int, int, int]]:
    """(TP, PP, CP) without virtual stages, in order of TP."""
    sizes = [set(possible_tensor_parallel(shape)[1]) for shape in shapes.values()]
    depth = min(len(shape["hybrid-layer-pattern"]) for shape in shapes.values())
    for tp, pp, cp in itertools.product(sorted(set.intersection(*sizes)), range(1, depth + 1), range(1, world + 1)):
        if world % (tp * pp * cp):
            continue
        dp = world // (tp * pp * cp)
        if any(_expert_problems(flags, shapes, tp, pp, world)) or any(_mamba_problems(shapes, tp, cp)):
            continue
        if any(_sequence_problems(flags, options, tp, cp)) or any(_batch_problems(flags, options, pp, 1, dp)):
            continue
        yield tp, pp, cp
