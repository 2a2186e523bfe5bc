"""The planner's output: the best layouts, the flags of the first, and what does not fit."""

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_qad.distillation import parse_loss
from megatron_qad.engine.errors import QADError
from megatron_qad.engine.local_models import missing_config
from megatron_qad.engine.text_files import read_json
from megatron_qad.models.families import family_of
from megatron_qad.planning.activations import Kernels
from megatron_qad.planning.layer_sizes import PlannedModel
from megatron_qad.planning.layout import Layout
from megatron_qad.planning.memory import ACTIVATIONS, PlannedJob
from megatron_qad.planning.proposals import Planner, Proposal, command_line
from megatron_qad.planning.time_lines import phases
from megatron_qad.quantization import policy as policies
from megatron_qad.quantization.format_table import aligned

NUM_SHOWN = 8
"""Rows of the table of layouts."""
_COLUMNS = {
    "student": ("student weights",),
    "teacher": ("teacher weights", "teacher weights, offloaded"),
    "grads": ("gradients",),
    "optim": ("optimizer state",),
    "scales": ("frozen block scales", "input moments of local_hessian"),
    "acts": (ACTIVATIONS,),
}
"""Column -> rows of ``rows_of_ranks``. The rest are the outputs: logits or chunks, and what is kept of the teacher."""


def read_job(
    hf_model: str, teacher: str | None, policy: str, rules: Sequence[str], kernels: Kernels, *, images: bool = False
) -> PlannedJob:
    """Read the job to plan from the ``config.json`` of its models.

    Args:
        hf_model, teacher: Hugging Face directories or ``config.json`` files. Without a teacher, it equals the student.
        images: the data has images, so the job runs the student's vision encoder.

    Raises:
        QADError: a missing file, an unsupported architecture, an invalid policy, or images without a vision encoder.
    """
    student_hf = _read_config(hf_model)
    teacher_hf = student_hf if teacher is None else _read_config(teacher)
    family, student_policy = family_of(student_hf), policies.load(policy, rules, flag="--rule")
    if images and family.vision is None:
        raise QADError(f"--images: {hf_model} ({family.architecture}) has no vision encoder. Leave out the flag.")
    linears, kinds = family.linears(student_hf), family.layer_kinds(student_hf)
    formats = policies.resolve(student_policy, linears, kinds)
    return PlannedJob(
        student=PlannedModel(family, student_hf, formats, student_policy.kv_cache != "bf16"),
        teacher=PlannedModel(family_of(teacher_hf), teacher_hf),
        kernels=kernels,
        scales=policies.resolve_scales(student_policy, linears, kinds),
        vision=family.vision(student_hf) if images else None,
    )


def _read_config(model: str) -> dict:
    file = Path(model) if Path(model).is_file() else Path(model) / "config.json"
    if not file.is_file():
        raise QADError(missing_config(model, "Give the directory of a Hugging Face model, or that file."))
    return read_json(file)


LOSSES = parse_loss("kl", temperature=1.0)
"""The loss that is planned for. Others take the same bytes, except those that cannot be fused with the output layer."""


def lines(planner: Planner, num_tokens: float) -> Iterator[str]:
    """Yield the plan."""
    fitting, request = planner.fitting(), planner.request
    yield f"{len(planner.all)} valid layouts, {len(fitting)} fit into {request.memory / 1e9:.1f} GB a GPU; the fastest:"
    shown = _different(fitting)[:NUM_SHOWN]
    if shown:
        yield from table(shown, num_tokens)
        yield ""
        yield f"seconds of a step of 1: {phases(shown[0].time)}"
        yield "flags of 1:"
        flags = " ".join(command_line(shown[0], bool(planner.job.student.args.get("num-experts"))))
        yield from (f"  {line}" for line in textwrap.wrap(flags, 116, break_on_hyphens=False))
    else:
        yield "  none"
    large = planner.not_fitting()
    if large:
        yield ""
        yield f"too large{' and faster' if shown else ''}, the nearest {min(len(large), NUM_SHOWN)} of {len(large)}:"
        for proposal in large[:NUM_SHOWN]:
            yield "  " + _reason(planner, proposal)


def _different(proposals: Sequence[Proposal]) -> list[Proposal]:
    """Leave out layouts that only have a larger microbatch or virtual stages than a faster one."""
    kept: dict[tuple, Proposal] = {}
    for proposal in proposals:
        layout = proposal.layout
        kept.setdefault((layout.tp, layout.pp, layout.cp, layout.ep, layout.recompute), proposal)
    return list(kept.values())


def describe(layout: Layout, has_experts: bool) -> str:
    """Return a layout in a few words."""
    sizes = {"TP": layout.tp, "PP": layout.pp, "VPP": layout.vpp, "CP": layout.cp, "EP": layout.ep, "DP": layout.dp}
    shown = ("TP", "PP", "DP", "EP") if has_experts else ("TP", "PP", "DP")
    words = [f"{name}{size}" for name, size in sizes.items() if size > 1 or name in shown]
    return " ".join([*words, f"micro{layout.micro_batch_size}", *(["recompute"] if layout.recompute == "full" else [])])


def table(proposals: Sequence[Proposal], num_tokens: float) -> Iterator[str]:
    """Yield a table of proposals: GB on the largest rank by part, and time."""
    cells = [("", "layout", "GB:", *_COLUMNS, "outputs", "sum", "s/step", "tokens/s", "hours", "GPU-hours")]
    for index, proposal in enumerate(proposals, 1):
        parts = [sum(proposal.rows.get(name, 0) for name in names) for names in _COLUMNS.values()]
        parts += [proposal.bytes - sum(parts), proposal.bytes]
        hours = num_tokens / proposal.tokens_per_second / 3600
        has_experts = bool(proposal.job.student.args.get("num-experts"))
        cells.append(
            (
                *(str(index), describe(proposal.layout, has_experts), ""),
                *(f"{part / 1e9:.1f}" for part in parts),
                *(f"{proposal.time.total:.2f}", f"{proposal.tokens_per_second:,.0f}"),
                *(f"{hours:,.1f}", f"{hours * proposal.layout.world_size:,.0f}"),
            )
        )
    yield from aligned(cells, right=range(3, len(cells[0])))


def _reason(planner: Planner, proposal: Proposal) -> str:
    """Return why a layout does not fit, and what would make it fit."""
    name, size = max(proposal.rows.items(), key=lambda row: row[1])
    text = describe(proposal.layout, bool(planner.job.student.args.get("num-experts")))
    text += f": {proposal.bytes / 1e9:.1f} GB, most of it {name} ({size / 1e9:.1f} GB). "
    remedy = planner.remedy(proposal)
    if remedy is None:
        return text + "No single change makes it fit."
    return text + f"Fits with {remedy.change}: {remedy.bytes / 1e9:.1f} GB, {remedy.time.total:.2f} s a step."
