"""Memory of a job: the bytes of each part on each pipeline rank. The dry run and the planner print these rows."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

from megatron_qad.config.output_mode import OutputMode, OutputSizes
from megatron_qad.models.families.radio_vision import VisionSettings, passthrough_tensors
from megatron_qad.planning.activations import Kernels
from megatron_qad.planning.layer_sizes import PlannedModel
from megatron_qad.planning.layout import Layout
from megatron_qad.planning.schedule import activation_bytes
from megatron_qad.planning.static_bytes import ModelParams, ScaleBytes, training_state
from megatron_qad.quantization.scale_settings import ScaleSetting

ACTIVATIONS = "activations kept for backward"
"""Name of the row that a formula estimates; the others are sums of tensor sizes."""


@dataclass(frozen=True)
class PlannedJob:
    """What a job computes, apart from its layout."""

    student: PlannedModel
    teacher: PlannedModel | None
    """None if the job runs no teacher."""
    kernels: Kernels
    scales: Mapping[str, ScaleSetting] = field(default_factory=dict)
    """How the scales of the student's weights are obtained, by Megatron weight name."""
    output_mode: OutputMode = OutputMode()
    num_logit_losses: int = 1
    trains: bool = True
    """Whether there are gradients and an optimizer; not in PTQ."""
    offloads_teacher: bool = False
    vision: VisionSettings | None = None
    """Vision encoder that the job runs; None if its data has no images."""

    @cached_property
    def student_params(self) -> ModelParams:
        return ModelParams(self.student)

    @cached_property
    def teacher_params(self) -> ModelParams | None:
        return None if self.teacher is None else ModelParams(self.teacher)

    @cached_property
    def scale_bytes(self) -> ScaleBytes:
        return ScaleBytes(self.student, self.student.formats, self.scales)

    def teacher_virtual_stages(self, layout: Layout) -> int:
        """Return the teacher's virtual stages (``config.parallelism.teacher_virtual_stages``)."""
        if self.offloads_teacher:
            return 1
        return max(1, min(layout.vpp, len(self.teacher.pattern) // layout.pp))


def rows_of_ranks(job: PlannedJob, layout: Layout, sizes: OutputSizes) -> list[dict[str, int]]:
    """Return the bytes of each part, by name, on each pipeline rank.

    Args:
        sizes: of the outputs of a microbatch (``OutputSizes``).
    """
    ranks: list[dict[str, int]] = [{} for _ in range(layout.pp)]

    def add(name: str, values: list[int]) -> None:
        for rows, value in zip(ranks, values, strict=True):
            if value:
                rows[name] = value

    width, params = layout.element_bytes, job.student_params.on_ranks(layout)
    add("student weights", [p.total * width for p in params])
    if job.teacher is not None:
        if job.offloads_teacher:
            add("teacher weights, offloaded", [job.teacher_params.offloaded(layout) * width] * layout.pp)
        else:
            held = job.teacher_params.on_ranks(layout, job.teacher_virtual_stages(layout))
            add("teacher weights", [p.total * width for p in held])
    if job.trains:
        states = [training_state(p, layout) for p in params]
        for name in states[0]:
            add(name, [state[name] for state in states])
    add("frozen block scales", job.scale_bytes.frozen(layout))
    add("input moments of local_hessian", job.scale_bytes.moments(layout))
    if job.trains:
        add(ACTIVATIONS, activation_bytes(job.student, layout, job.kernels))
    if job.vision is not None:  # on the first stage, complete on each of its ranks
        numel = sum(prod(tensor.shape) for tensor in passthrough_tensors(job.vision))
        tokens = layout.seq_length * layout.micro_batch_size * layout.num_microbatches
        ranks[0]["vision encoder and projector"] = numel * width
        ranks[0]["image features, if all tokens are"] = tokens * job.vision.hidden_size * width
    ranks[-1] |= _outputs(job, layout, sizes)
    return ranks


def _outputs(job: PlannedJob, layout: Layout, sizes: OutputSizes) -> dict[str, int]:
    """Return the bytes of both models' outputs, which are on the last pipeline rank."""
    rows = {}
    if job.output_mode.fused:
        fused = sizes.fused(job.num_logit_losses, job.student.hidden_size)
        rows["logits of both models, one chunk"] = fused["chunk"]
        if job.trains:
            rows["output weight's gradient, float32"] = fused["gradient"]
    else:
        rows["student logits, one microbatch"] = sizes.logits()
    if job.teacher is not None:
        kept = "hidden" if job.output_mode.teacher_hidden else "logits"
        rows[f"teacher {kept}, {layout.num_microbatches} microbatch(es)"] = (
            teacher_output(job, sizes, kept) * layout.num_microbatches
        )
    return rows


def teacher_output(job: PlannedJob, sizes: OutputSizes, kind: str) -> int:
    """Return the bytes of the teacher's output of one microbatch, "hidden" or "logits"."""
    return sizes.hidden(job.teacher.hidden_size) if kind == "hidden" else sizes.logits()


def largest(ranks: list[dict[str, int]]) -> tuple[int, dict[str, int]]:
    """Return the pipeline rank with the most bytes, and its rows."""
    rank = max(range(len(ranks)), key=lambda i: sum(ranks[i].values()))
    return rank, ranks[rank]
