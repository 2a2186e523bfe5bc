"""Proposes layouts for a job on a number of GPUs: those that fit into memory, their time, and what makes others fit."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product

from megatron_qad.config.megatron_flags import MegatronFlags
from megatron_qad.config.output_mode import OutputSizes, resolve_output_mode
from megatron_qad.config.parallelism import parallelism_problem, possible_tensor_parallel
from megatron_qad.config.qad_options import QADOptions
from megatron_qad.distillation import LogitLoss, WeightedLosses
from megatron_qad.engine.errors import QADError
from megatron_qad.planning.layout import Layout
from megatron_qad.planning.memory import PlannedJob, largest, rows_of_ranks
from megatron_qad.planning.step_time import Machine, StepTime, StepTimes


@dataclass(frozen=True)
class Request:
    """What to plan for."""

    num_gpus: int
    memory: float
    """Bytes that a job may use on each GPU."""
    seq_length: int
    global_batch_size: int
    micro_batch_sizes: tuple[int, ...] = (1, 2)
    is_packed: bool = False


@dataclass(frozen=True)
class Proposal:
    """A layout with its memory and time."""

    job: PlannedJob
    layout: Layout
    rank: int
    """Pipeline rank with the most bytes."""
    rows: dict[str, int]
    """Bytes on that rank, by part."""
    time: StepTime
    change: str = ""
    """What was changed in a proposal that did not fit."""

    @cached_property
    def bytes(self) -> int:
        return sum(self.rows.values())

    @property
    def tokens_per_second(self) -> float:
        return self.layout.global_batch_size * self.layout.seq_length / self.time.total


class Planner:
    """Evaluates layouts of one job.

    Example::

        planner = Planner(job, losses, request, Machine(peak=989.5e12))
        best = planner.fitting()[0]
        print(best.layout, best.bytes, best.time.total)
    """

    def __init__(self, job: PlannedJob, losses: WeightedLosses, request: Request, machine: Machine):
        self.job, self.losses, self.request, self.machine = job, losses, request, machine
        self._times = {False: StepTimes(job, machine), True: StepTimes(replace(job, offloads_teacher=True), machine)}
        self._shapes = {
            role: model.args | {"mlp-widths": model.family.mlp_widths(model.hf)}
            for role, model in (("the student", job.student), ("the teacher", job.teacher))
            if model is not None
        }

    @cached_property
    def all(self) -> list[Proposal]:
        """Every valid layout, the fastest first.

        Raises:
            QADError: there is none.
        """
        proposals = [self.evaluate(self.job, layout) for layout in self._layouts()]
        if not proposals:
            raise QADError(
                f"no layout of {self.request.num_gpus} GPUs is valid for sequences of {self.request.seq_length} tokens "
                f"and a batch of {self.request.global_batch_size}. Choose another --gpus, --seq-length or "
                "--global-batch-size."
            )
        return sorted(proposals, key=lambda proposal: (proposal.time.total, proposal.bytes))

    def fitting(self) -> list[Proposal]:
        """Return the layouts that fit, the fastest first."""
        return [proposal for proposal in self.all if proposal.bytes <= self.request.memory]

    def not_fitting(self) -> list[Proposal]:
        """Return the layouts that do not fit and are faster than those that do, the least too large first; one for each
        TP, PP, CP and EP."""
        fitting = self.fitting()
        limit = fitting[0].time.total if fitting else float("inf")
        large = [p for p in self.all if p.bytes > self.request.memory and p.time.total <= limit]
        nearest: dict[tuple, Proposal] = {}
        for proposal in sorted(large, key=lambda proposal: proposal.bytes):
            layout = proposal.layout
            nearest.setdefault((layout.tp, layout.pp, layout.cp, layout.ep), proposal)
        return list(nearest.values())

    def remedy(self, proposal: Proposal) -> Proposal | None:
        """Return a changed proposal that fits: by one change, or by several together."""
        changes = list(self._changes(proposal))
        for changed in changes:
            if changed.bytes <= self.request.memory:
                return changed
        return None

    def _changes(self, proposal: Proposal) -> Iterator[Proposal]:
        job, layout = proposal.job, proposal.layout
        single: list[tuple[str, PlannedJob, Layout]] = []
        if layout.recompute == "none":
            single.append(("full recomputation", job, replace(layout, recompute="full")))
        if layout.micro_batch_size > 1:
            single.append(("--micro-batch-size 1", job, replace(layout, micro_batch_size=1)))
        for size, text in (("pp", "PP"), ("cp", "CP"), ("tp", "TP")):
            doubled = replace(layout, **{size: 2 * getattr(layout, size)})
            doubled = replace(doubled, dp=layout.dp // 2, sequence_parallel=doubled.tp > 1)
            if layout.dp % 2 == 0 and self._is_valid(doubled):
                single.append((f"{text} {2 * getattr(layout, size)}", job, doubled))
        if job.teacher is not None:
            single.append(("--qad-teacher-cpu-offload", replace(job, offloads_teacher=True), replace(layout, vpp=1)))
        for text, changed_job, changed in single:
            yield self.evaluate(changed_job, changed, text)
        if layout.recompute == "none":  # the same with recomputation
            for text, changed_job, changed in single[1:]:
                changed = replace(changed, recompute="full")
                yield self.evaluate(changed_job, changed, f"{text} and full recomputation")

    def evaluate(self, job: PlannedJob, layout: Layout, change: str = "") -> Proposal:
        """Return a layout's memory and time."""
        sizes = output_sizes(layout, job.student.vocab_size)
        hidden = None if job.teacher is None else job.teacher.hidden_size
        mode = resolve_output_mode(QADOptions(), sizes, self.losses, hidden)
        job = _with_mode(job, mode, len(self.losses.terms_of_type(LogitLoss)))
        rank, rows = largest(rows_of_ranks(job, layout, sizes))
        return Proposal(job, layout, rank, rows, self._times[job.offloads_teacher].of(layout), change)

    def _layouts(self) -> Iterator[Layout]:
        request, shapes = self.request, list(self._shapes.values())
        tps = set.intersection(*(set(possible_tensor_parallel(shape)[1]) for shape in shapes))
        num_experts = self.job.student.args.get("num-experts") or 1
        eps = [n for n in _divisors(request.num_gpus) if num_experts % n == 0]
        max_pp = min(len(model.pattern) for model in (self.job.student, self.job.teacher) if model is not None)
        sizes = product(
            sorted(tp for tp in tps if request.num_gpus % tp == 0 and tp <= self.machine.gpus_per_node),
            [pp for pp in _divisors(request.num_gpus) if pp <= max_pp],
            [cp for cp in _divisors(request.num_gpus) if cp <= 16],
        )
        for tp, pp, cp in sizes:
            if request.num_gpus % (tp * pp * cp):
                continue
            for ep, micro, vpp in product(eps, request.micro_batch_sizes, (1, 2) if pp > 1 else (1,)):
                layout = Layout(
                    tp=tp,
                    pp=pp,
                    vpp=vpp,
                    cp=cp,
                    ep=ep,
                    dp=request.num_gpus // (tp * pp * cp),
                    sequence_parallel=tp > 1,
                    seq_length=request.seq_length,
                    micro_batch_size=micro,
                    global_batch_size=request.global_batch_size,
                    is_packed=request.is_packed,
                    distributed_optimizer=True,
                    gradient_bytes=4,
                )
                if self._is_valid(layout):
                    yield layout
                    yield replace(layout, recompute="full")

    def _is_valid(self, layout: Layout) -> bool:
        flags = flags_of(layout)
        return parallelism_problem(flags, QADOptions(), self._shapes, self.request.num_gpus) is None


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _with_mode(job: PlannedJob, mode, num_losses: int) -> PlannedJob:
    if job.output_mode == mode and job.num_logit_losses == num_losses:
        return job
    changed = replace(job, output_mode=mode, num_logit_losses=num_losses)
    # Counted once for all layouts.
    for name in ("student_params", "teacher_params", "scale_bytes"):
        changed.__dict__[name] = getattr(job, name)
    return changed


def flags_of(layout: Layout) -> MegatronFlags:
    """Return the flags of a layout, for the checks that a job makes."""
    return MegatronFlags(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        num_virtual_stages_per_pipeline_rank=layout.vpp if layout.vpp > 1 else None,
        sequence_parallel=layout.sequence_parallel,
        seq_length=layout.seq_length,
        micro_batch_size=layout.micro_batch_size,
        global_batch_size=layout.global_batch_size,
        dataloader_inter_document_masking=layout.is_packed,
        bf16=layout.element_bytes == 2,
        use_distributed_optimizer=layout.distributed_optimizer,
    )


def output_sizes(layout: Layout, vocab_size: int) -> OutputSizes:
    return OutputSizes.from_flags(flags_of(layout), vocab_size)


def command_line(proposal: Proposal, has_experts: bool) -> Sequence[str]:
    """Return the flags of a proposal for pretrain_qad.py."""
    layout = proposal.layout
    flags = ["--bf16", "--use-distributed-optimizer"]
    sizes = {
        "--tensor-model-parallel-size": layout.tp,
        "--pipeline-model-parallel-size": layout.pp,
        "--num-virtual-stages-per-pipeline-rank": layout.vpp,
        "--context-parallel-size": layout.cp,
        "--expert-model-parallel-size": layout.ep,
    }
    for name, size in sizes.items():
        if size > 1:
            flags += [name, str(size)]
    if layout.sequence_parallel:
        flags.append("--sequence-parallel")
    if has_experts and layout.tp > 1:
        flags += ["--expert-tensor-parallel-size", str(layout.etp)]
    if layout.recompute == "full":
        flags += ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]
    if proposal.job.offloads_teacher:
        flags.append("--qad-teacher-cpu-offload")
    if layout.is_packed:
        flags.append("--dataloader-inter-document-masking")
    flags += ["--seq-length", str(layout.seq_length), "--micro-batch-size", str(layout.micro_batch_size)]
    return [*flags, "--global-batch-size", str(layout.global_batch_size)]
