"""The one seam in Megatron's loop that has no hook: the schedule.

``megatron.training.training`` asks ``get_forward_backward_func`` for the function that runs all microbatches of a step.
``wrap_schedule`` wraps what it answers, there and nowhere else, because a step of QAD is: read the microbatches, run
the teacher over them, put the student's weights on the NVFP4 grid, then run the student's own schedule unchanged.
"""

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from megatron.core import mpu
from megatron.core.utils import unwrap_model
from megatron.training import get_args, print_rank_0
from megatron.training import training as megatron_loop
from megatron.training.checkpointing import checkpoint_exists
from megatron.training.utils import is_rank0
from tqdm import tqdm

from megatron_qad.engine.heartbeat import heartbeat
from megatron_qad.engine.run_directory import json_records
from megatron_qad.engine.run_directory.run_files import CALIBRATION_FILE
from megatron_qad.models.output_layer import Output
from megatron_qad.quantization.activations import ActivationQuantizers
from megatron_qad.quantization.weights import InPlaceWeights
from megatron_qad.training.batch import (
    Batch,
    iterators,
    num_calibration_batches,
    output_of,
    read_batches,
    schedule_shape,
)
from megatron_qad.training.expert_load import expert_load
from megatron_qad.training.hidden_states import HiddenStates
from megatron_qad.training.loss import job_losses
from megatron_qad.training.not_finite import Trace
from megatron_qad.training.outputs import Outputs
from megatron_qad.training.scale_penalty import ScalePenalty
from megatron_qad.training.teacher import Teacher

_MAX_PRINTED = 8


class QADStep:
    """What surrounds the student's schedule in every step, training and evaluation alike.

    Args:
        teacher: None for a loss that needs none.
        weights: the student's weights to quantize in place.
        activations: the student's activation quantizers; calibrated here before they are first used.
        calibration_samples: sequences that calibration sees, over all data-parallel ranks.
    """

    def __init__(
        self,
        teacher: Teacher | None,
        weights: InPlaceWeights,
        activations: ActivationQuantizers,
        calibration_samples: int,
    ):
        self.teacher = teacher
        self.weights = weights
        self.activations = activations
        self.calibration_samples = calibration_samples
        self.hidden_states: HiddenStates | None = None
        """The hidden-state losses of the job, if it has any."""
        self.scale_penalty: ScalePenalty | None = None
        """Its penalty on scale growth."""
        self.losses: list[dict] | None = None
        """What the loss function reported of each microbatch of the last training step, on the last stage."""
        self._ran: dict = {}
        self._is_calibrated = False  # as far as all ranks know
        self._read_ahead: list[Batch] = []
        self._read_ahead_in_evaluation = False

    def run(self, schedule: Callable, *, data_iterator, model, num_microbatches: int, forward_step_func, **rest):
        shape = {name: rest.get(name) for name in ("seq_length", "micro_batch_size", "decoder_seq_length")}
        # The rank's place in Megatron's loop, because ranks without data have no iterator to tell by.
        evaluates = bool(rest.get("forward_only"))
        if self._must_calibrate():
            self._calibrate(schedule, data_iterator, model, forward_step_func, shape)
            self._read_ahead_in_evaluation = evaluates
        batches = self._next_batches(data_iterator, num_microbatches, shape, evaluates)
        shape = schedule_shape(**shape)
        expert_load.is_measuring = evaluates
        hidden_states, penalty = (None, None) if evaluates else (self.hidden_states, self.scale_penalty)
        heartbeat.beat("teacher's pass of an evaluation" if evaluates else "teacher's pass")
        with hidden_states.active() if hidden_states else nullcontext():
            if self._uses_teacher(evaluates):
                self.teacher.annotate(batches, **shape)
            if self.weights.is_stale:
                gather_parameters(model)
            heartbeat.beat("student's pass of an evaluation" if evaluates else "student's passes")
            with self.weights.on_grid(then_updated=not evaluates):
                if penalty:
                    penalty.add_gradient(batches)
                reports = schedule(
                    data_iterator=iterators(batches, data_iterator),
                    model=model,
                    num_microbatches=num_microbatches,
                    forward_step_func=forward_step_func,
                    **rest | shape,
                )
        for part in (hidden_states, penalty):
            if part:
                part.report(reports)
        if not evaluates:
            self.losses = reports
            # Not the iterator itself: its worker processes must end with Megatron's last reference to it.
            stages = [None] * len(data_iterator) if isinstance(data_iterator, list) else None
            self._ran = {"schedule": schedule, "batches": batches, "stages": stages, "shape": shape}
        return reports

    @torch.no_grad()
    def run_again(self, model, trace: Trace) -> None:
        """The forward passes of the training step that ran last, up to the logits, once more, with ``trace`` watching
        both models."""
        batches, shape = self._ran["batches"], self._ran["shape"]
        if self._uses_teacher(evaluates=False):
            with trace.watching(self.teacher.chunks, "the teacher", order=0):
                self.teacher.annotate(batches, **shape)
                for batch in batches:
                    if batch.teacher_output is not None:
                        batch.teacher_output.logits()
                        batch.teacher_output = None
        with trace.watching(model, "the student", order=1):
            self._ran["schedule"](
                data_iterator=iterators(batches, self._ran["stages"]),
                model=model,
                num_microbatches=len(batches),
                forward_step_func=partial(_without_loss, Output.logits, lambda: None),
                forward_only=True,
                **shape,
            )

    def _uses_teacher(self, evaluates: bool) -> bool:
        """A loss without a teacher (QAT) is trained without its pass; evaluations report the KL to it all the same."""
        return self.teacher is not None and (evaluates or job_losses().needs_teacher)

    def _must_calibrate(self) -> bool:
        """Whether any rank has a quantizer without an amax. One without quantizers runs the passes, too."""
        if not self._is_calibrated:
            missing = torch.tensor(not self.activations.calibrated, dtype=int, device=torch.cuda.current_device())
            torch.distributed.all_reduce(missing, op=torch.distributed.ReduceOp.MAX)
            self._is_calibrated = True
            return bool(missing)
        return False

    def _next_batches(self, data_iterator, number: int, shape: dict, evaluates: bool) -> list[Batch]:
        """What calibration read ahead comes first, but only where it was read: an evaluation between the first steps
        must not be given training data."""
        ready: list[Batch] = []
        if evaluates == self._read_ahead_in_evaluation:
            ready, self._read_ahead = self._read_ahead[:number], self._read_ahead[number:]
        missing = number - len(ready)
        if missing:
            ready += self._read(data_iterator, missing, shape)
        return ready

    def _read(self, data_iterator, number: int, shape: dict) -> list[Batch]:
        everywhere = self.hidden_states is not None or self.scale_penalty is not None
        rows = shape["micro_batch_size"], shape["seq_length"]
        return read_batches(data_iterator, number, *rows, on_every_stage=everywhere)

    def _calibrate(self, schedule, data_iterator, model, forward_step_func, shape) -> None:
        """Calibration with unquantized weights. Its microbatches go back: training sees the data it would have
        seen."""
        number = num_calibration_batches(self.calibration_samples, shape["micro_batch_size"])
        heartbeat.beat("calibration")
        batches = self._read(data_iterator, number, shape)
        self._read_ahead = batches
        bar = tqdm(total=number, unit="microbatch", desc="calibrating", disable=None if is_rank0() else True)
        with self.activations.calibrating(), bar:
            schedule(
                data_iterator=iterators(batches, data_iterator),
                model=model,
                num_microbatches=number,
                forward_step_func=partial(_without_loss, Output.hidden, bar.update),
                forward_only=True,
                **schedule_shape(**shape),
            )
        report_fallbacks(self.activations.fallbacks)


def report_fallbacks(fallbacks: dict[str, tuple[str, int]]) -> None:
    """Say which experts' linears saw too few tokens in calibration, of all pipeline stages; beside the checkpoints they
    are in ``calibration.json``."""
    stages: list[dict] = [{} for _ in range(mpu.get_pipeline_model_parallel_world_size())]
    torch.distributed.all_gather_object(stages, fallbacks, group=mpu.get_pipeline_model_parallel_group())
    found = {name: fallback for stage in stages for name, fallback in stage.items()}
    for name, (other, tokens) in list(found.items())[:_MAX_PRINTED]:
        print_rank_0(f"megatron_qad: calibration: {name} saw {tokens} tokens and takes the amax of {other}")
    if len(found) > _MAX_PRINTED:
        print_rank_0(f"megatron_qad: calibration: and {len(found) - _MAX_PRINTED} linears of experts more")
    save = get_args().save
    if save is not None and is_rank0():
        entries = {name: {"tokens": tokens, "amax_of": other} for name, (other, tokens) in found.items()}
        json_records.write_or_say(Path(save) / CALIBRATION_FILE, {"few_tokens": entries})


def gather_parameters(model) -> None:
    """Finish the parameter gather that ``--overlap-param-gather`` leaves to the forward pass: a weight must be whole
    before it is quantized. What was gathered here, the forward pass does not gather again."""
    for chunk in model if isinstance(model, list) else [model]:
        if getattr(getattr(chunk, "ddp_config", None), "overlap_param_gather", False):
            chunk.start_param_sync(force_sync=True)


def _without_loss(finish: Callable[[Output], torch.Tensor], seen: Callable, batches, model):
    """A forward step of Megatron's that ends before the loss. ``finish`` runs on the output where the output layer is
    fused with the loss, and so has not run in the model; ``seen`` is called once a microbatch."""
    batch, fused = next(batches), Outputs.chosen(get_args().qad).fused

    def no_loss(output):
        if fused:
            finish(Output(output, unwrap_model(model)))
        return output.new_zeros(()), output.new_zeros((), dtype=int), {}

    seen()
    return output_of(model, batch, hidden=fused), no_loss


def say_if_masters_are_lost(args: argparse.Namespace) -> None:
    """Warn where a job resumes without the float32 masters that its optimizer saved."""
    if args.skip_train or args.load is None or not checkpoint_exists(args.load):
        return
    if not (args.no_load_optim or args.finetune):
        return
    flag = "--no-load-optim" if args.no_load_optim else "--finetune"
    if args.bf16:
        print_rank_0(
            f"megatron_qad: WARNING: {flag}: resuming from {args.load} without its optimizer state. The high-precision "
            "masters are lost: new ones are made of the checkpoint's 16-bit weights, which a validation may have left "
            f"on the NVFP4 grid. Leave out {flag} to continue exactly"
        )


def wrap_schedule(step: QADStep) -> None:
    """Make Megatron's loop run ``step`` around every schedule. Once a process."""
    say_if_masters_are_lost(get_args())
    upstream = megatron_loop.get_forward_backward_func

    def get_forward_backward_func(*args, **kwargs):
        schedule = upstream(*args, **kwargs)
        return lambda **call: step.run(schedule, **call)

    megatron_loop.get_forward_backward_func = get_forward_backward_func
