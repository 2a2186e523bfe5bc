"""The job object: owns the two models, the loss and the callbacks, and provides the parts of a step.

It is built once from a configuration and passed to the code that needs it. ``pretrain_qad.py`` calls the parts of a
step in order.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import mpu
from megatron.training import print_rank_0
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.checkpointing import checkpoint_exists
from megatron.training.config import PretrainConfigContainer

from megatron_qad.config.job_config import JobConfig
from megatron_qad.data.provider import DatasetsProvider
from megatron_qad.engine.console import JobOutput
from megatron_qad.engine.errors import QADError
from megatron_qad.engine.events import Callback, Events, Update
from megatron_qad.engine.loggers import Loggers
from megatron_qad.engine.loop import JobIsDone, Loop, gather_parameters
from megatron_qad.engine.megatron_args import megatrons_refusals
from megatron_qad.engine.run_directory.atomic_checkpoint import AtomicCheckpoints, on_first_rank
from megatron_qad.engine.run_directory.iterations import iteration_dir
from megatron_qad.engine.run_directory.linked_weights import has_linked_weights
from megatron_qad.engine.run_directory.resume_point import select_resume_checkpoint
from megatron_qad.engine.run_directory.run_files import EVENTS_FILE, RUN_RECORDS, record_text
from megatron_qad.models.builder import QADModelConfig, freeze
from megatron_qad.models.weight_loading import has_amaxes, load_weights
from megatron_qad.quantization.activations import ActivationQuantizers
from megatron_qad.quantization.in_place_weights import InPlaceWeights
from megatron_qad.quantization.input_moments import InputMoments
from megatron_qad.quantization.smoothing import Groups
from megatron_qad.training.batch import Batch, ForwardPass, iterators
from megatron_qad.training.batch_reader import BatchReader
from megatron_qad.training.calibration_pass import CalibrationPass
from megatron_qad.training.callbacks import build_callbacks
from megatron_qad.training.loss import Loss
from megatron_qad.training.models import build_image_encoder, build_teacher, check_disjoint, model_config
from megatron_qad.training.resume_check import check_resume, nothing_to_do
from megatron_qad.training.run_description import check_expert_state, check_scale_state, describe_run
from megatron_qad.training.teacher import Teacher


@dataclass
class Step:
    """Microbatches and schedule of one training step, or of one iteration of an evaluation."""

    batches: list[Batch]
    is_training: bool
    shape: dict
    """Sequence length and microbatch size, as arguments of a schedule."""
    schedule: Callable
    """Megatron's schedule, which runs the forward and, in training, the backward pass of all microbatches."""
    call: dict[str, Any]
    """Other arguments that Megatron passed to the schedule."""
    stages: list[None] | None
    """One None per virtual stage of the rank, or None without virtual stages. It does not hold the data iterators,
    whose worker processes must end with Megatron's last reference to them."""

    def run_student(self, **changes) -> list[dict]:
        """Run the student's schedule. Returns the loss report of each microbatch on the last stage.

        Args:
            changes: replacements of arguments of the schedule.
        """
        call = {**self.call, **self.shape, "num_microbatches": len(self.batches), **changes}
        return self.schedule(data_iterator=iterators(self.batches, self.stages), **call)


class QADJob:
    """Owns the models, the loss, the data, the callbacks and the training loop of one job.

        job = start_job(read_command_line(["--config", "job.yaml"]))  # training.start
        with job.loop.running():  # arguments of Megatron's pretrain: see pretrain_qad.py
            pretrain(job.pretrain_config(qad_step), job.datasets_provider, ...)

    Args:
        config: configuration of the job.
        args: Megatron's global arguments, as parsed by ``start_job``.
        loggers: provides the record of event files that checkpoints contain.
        output: receives what other packages print; opened and closed by a callback (``callbacks.run_header``).
        callbacks: additional callbacks, which run after the job's own.
    """

    def __init__(
        self,
        config: JobConfig,
        args: argparse.Namespace,
        loggers: Loggers,
        output: JobOutput,
        callbacks: Sequence[Callback],
    ):
        self.config, self.args, self.loggers, self.output = config, args, loggers, output
        self.saves = AtomicCheckpoints()
        self.forward = ForwardPass(keeps_precision=args.bf16)
        encoder = None if config.images is None else build_image_encoder(config)
        self.reader = BatchReader(config.is_packed, config.data_on_every_stage, encoder)
        self.loss = Loss(config.losses, config.student.vocab_size, config.output_mode.fused)
        self.datasets_provider = DatasetsProvider(args, config.data_options)
        self.student: Sequence[torch.nn.Module] = ()
        """Model chunks of the student on this rank, without wrappers."""
        self.teacher: Teacher | None = None
        """The teacher on this rank. None if the job has no teacher."""
        self.weights: InPlaceWeights | None = None
        self.activations: ActivationQuantizers | None = None
        self.calibration: CalibrationPass | None = None
        self.last_step: Step | None = None
        """The latest training step, which the NaN trace replays."""
        self.num_passes = 0
        """Number of forward passes of the student's microbatches so far."""
        self.events = Events([_SkippedUpdates(self), *build_callbacks(self), *callbacks])
        self.loop = Loop(args, self.events)

    # The parts of a step, in the order in which pretrain_qad.py runs them ------------------------------------------

    def teacher_pass(self, step: Step) -> None:
        """Run the teacher and store its output in each microbatch, on the last stage.

        Training with a loss that needs no teacher (QAT) skips this pass; evaluations run it to report the KL.
        """
        self.events.forward_begins(step.batches, step.is_training)
        if self.teacher is not None and (not step.is_training or self.config.losses.needs_teacher):
            self.teacher.attach_outputs(step.batches, **step.shape)

    @contextmanager
    def quantized_weights(self, step: Step) -> Iterator[None]:
        """Context manager: inside, the student's weights hold the quantized values of their formats."""
        if self.weights.is_stale:
            gather_parameters(step.call["model"])
        with self.weights.quantized_weights(then_updated=step.is_training):
            self.events.student_begins(step.batches, step.is_training)
            yield

    def student_pass(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Run the student on one microbatch. Returns logits [b, s, V/tp], or hidden states for a fused output layer."""
        self.num_passes += 1
        return self.forward(model, batch, hidden=self.config.output_mode.fused)

    # What Megatron calls ------------------------------------------------------------------------------------------

    def model_config(self, qad_step: Callable[["QADJob", Step], list[dict]]) -> QADModelConfig:
        """Return the config from which ``pretrain`` builds the student. Its hook completes the setup of the job.

        Args:
            qad_step: runs the parts of a step.
        """
        student_config = model_config(self.config, self.args, self.config.student)
        student_config.pre_wrap_hooks.append(partial(self._prepare, qad_step))
        return student_config

    def pretrain_config(self, qad_step: Callable[["QADJob", Step], list[dict]]) -> PretrainConfigContainer:
        """Return the config of ``pretrain``, with that of the student.

        Args:
            qad_step: runs the parts of a step.

        Raises:
            QADError: Megatron refuses the flags.
        """
        student_config = self.model_config(qad_step)
        with megatrons_refusals("__post_init__", "pretrain_cfg_container_from_args"):
            return pretrain_cfg_container_from_args(self.args, student_config)

    def evaluated(self, model) -> dict[str, float]:
        """Reduce the metrics of an evaluation over the data-parallel ranks and report them, at the end of each one."""
        group, has_teacher = mpu.get_data_parallel_group(with_context_parallel=True), self.config.teacher is not None
        total = self.loss.take_metrics().all_reduce(group)
        means = total.means(has_teacher=has_teacher)
        if self.reader.encoder is not None:
            after_image = self.loss.take_metrics_after_image().all_reduce(group)
            for suffix, part in (("after_image", after_image), ("text_only", total - after_image)):
                means |= {f"{name}_{suffix}": value for name, value in part.means(has_teacher=has_teacher).items()}
        self.events.evaluation_ended(self.loop.iteration, means)
        return means

    def _prepare(
        self, qad_step: Callable[["QADJob", Step], list[dict]], chunks: list[torch.nn.Module]
    ) -> list[torch.nn.Module]:
        """Load and quantize the student, build the teacher and hook into Megatron's loop, before wrapping."""
        config, args, events = self.config, self.args, self.events
        self.student = chunks
        resumes = self.begin()
        if not resumes or self.needs_initial_weights:
            events.phase("loading the student", is_long=True)
            load_weights(chunks, config.student.checkpoint)
        if not resumes:
            print_rank_0(f"megatron_qad: student starts from {config.student.checkpoint}")
        self.describe(resumes)
        self.activations = self.quantize_activations(chunks)
        if resumes and has_amaxes(args.load):
            self.activations.expect_amax(device=torch.cuda.current_device())
        events.phase("loading the teacher", is_long=True)
        if config.runs_teacher:
            self.teacher = build_teacher(config, args, self.forward)
            check_disjoint(self.teacher.chunks, chunks)
        self.weights = self.quantize_weights(chunks)
        if not resumes or self.needs_initial_weights:  # otherwise the checkpoint has them
            self.weights.initialize_scales()
        print_rank_0(f"megatron_qad: {config.output_mode.describe()}")
        counts = ", ".join(f"{n} {fmt}" for fmt, n in Counter(self.weights.formats.values()).items()) or "none"
        print_rank_0(
            f"megatron_qad: weights of this rank quantized in place: {counts} (policy {config.options.qad_policy})"
        )
        self.calibration = CalibrationPass(self)
        events.student_ready(chunks)
        self._warn_if_masters_are_lost()
        self.saves.install()
        self.loop.install(chunks, partial(self._run_step, qad_step))
        events.phase("Megatron's setup: optimizer, checkpoint, index of the data", is_long=True)
        return [freeze(chunk) for chunk in chunks] if config.options.qad_ptq else chunks

    def _run_step(self, qad_step: Callable[["QADJob", Step], list[dict]], schedule: Callable, **call) -> list[dict]:
        """Replaces ``schedule``: read the microbatches, calibrate before the first of them, run ``qad_step``."""
        # Taken from the call, because ranks without data have no iterator that would show it.
        is_training = not call.get("forward_only")
        shape = {name: call.pop(name, None) for name in ("seq_length", "micro_batch_size", "decoder_seq_length")}
        data_iterator, num_batches = call.pop("data_iterator"), call.pop("num_microbatches")
        stages = [None] * len(data_iterator) if isinstance(data_iterator, list) else None
        batches = self.calibration.next_batches(schedule, data_iterator, num_batches, shape, call["model"], is_training)
        step = Step(batches, is_training, self.reader.schedule_shape(**shape), schedule, call, stages)
        if is_training:
            self.loss.begin_step(self.loop.step)
            self.last_step = step
        reports = qad_step(self, step)
        self.events.forward_ended(reports, is_training)
        return reports

    def begin(self) -> bool:
        """Select the checkpoint from which the job resumes, and report its beginning. Returns whether it resumes.

        Raises:
            JobIsDone: the job has trained and validated its last iteration already.
        """
        args = self.args
        resumes_at = select_resume_checkpoint(args.load, args.save, args.ckpt_step)
        resumes = args.load is not None and checkpoint_exists(args.load)
        is_trained = bool(resumes_at) and check_resume(Path(args.load) / f"iter_{resumes_at:07d}", args)
        if resumes and not (args.skip_train or args.no_load_optim or args.finetune):
            check_expert_state(self.config, Path(args.load), resumes_at)
        if resumes:
            check_scale_state(self.config, Path(args.load))
        self.events.job_begins(self, resumes_at)
        if is_trained and nothing_to_do(Path(args.load), resumes_at, args):
            self.describe(resumes)  # refuses other formats and scales than those of the run
            raise JobIsDone
        if resumes and args.swiglu and has_linked_weights(iteration_dir(args.load, args.ckpt_step or None)):
            raise QADError(
                f"--load {args.load}: --qad-ptq-sequential has written this run, with gate and up of each MLP as one "
                "tensor; Megatron resumes from two. Start from it with --qad-student."
            )
        return resumes

    # Quantization and run directory ------------------------------------------------------------------------------

    @property
    def needs_initial_weights(self) -> bool:
        """Whether some callback needs the weights from which training started, also after a resume."""
        return any(callback.needs_initial_weights for callback in self.events.callbacks)

    def quantize_activations(self, chunks: Sequence[torch.nn.Module]) -> ActivationQuantizers:
        """Add the policy's quantizers of linear inputs, keys and values to a model."""
        return ActivationQuantizers(
            chunks,
            self.config.formats,
            groups=(
                mpu.get_tensor_model_parallel_group(),
                mpu.get_data_parallel_group(with_context_parallel=True),
            ),
            kv_cache=self.config.policy.kv_cache,
            percentile=self.config.options.qad_calibration_percentile,
            headroom=self.config.options.qad_calibration_headroom,
        )

    def quantize_weights(self, chunks: Sequence[torch.nn.Module]) -> InPlaceWeights:
        """Return the weights of a model that the policy quantizes in place."""
        return InPlaceWeights(
            chunks,
            self.config.formats,
            mpu.get_tensor_model_parallel_group(),
            expert_tp_group=mpu.get_expert_tensor_parallel_group(),
            scales=self.config.scales,
        )

    def input_moments(self, chunks: Sequence[torch.nn.Module], weights: InPlaceWeights) -> InputMoments:
        """Return what observes the inputs of the weights that wait for their scales."""
        groups = Groups(
            mpu.get_tensor_and_data_parallel_group(with_context_parallel=True),
            mpu.get_data_parallel_group(with_context_parallel=True),
            mpu.get_expert_data_parallel_group(),
        )
        return InputMoments(chunks, weights.waiting, groups)

    def describe(self, resumes: bool) -> None:
        """Write the files that describe the run to ``--save``, and register those that each checkpoint gets."""
        save = self.args.save
        if save is None:
            return
        for name in RUN_RECORDS:
            self.saves.extra_texts[name] = partial(record_text, save, name)
        if (event_record := self.loggers.event_record()) is not None:
            self.saves.extra_texts[EVENTS_FILE] = event_record
        load = Path(self.args.load) if resumes else None
        on_first_rank(lambda: describe_run(self.config, Path(save), load, self._max_lr()))

    def _max_lr(self) -> float | None:
        """Return a bound of the distance by which a step moves a weight, for the validator of exports."""
        if self.config.options.qad_ptq:
            return 0.0
        # The updates of Adam are about the learning rate or less; those of other optimizers depend on the gradient.
        rates = [self.args.lr, self.args.decoupled_lr or 0.0]
        return max(rates) if self.args.optimizer == "adam" and None not in rates else None

    def _warn_if_masters_are_lost(self) -> None:
        """Warn if a job resumes without the saved float32 masters of its optimizer."""
        args = self.args
        if args.skip_train or args.load is None or not checkpoint_exists(args.load):
            return
        if not (args.no_load_optim or args.finetune):
            return
        flag = "--no-load-optim" if args.no_load_optim else "--finetune"
        if args.bf16:
            print_rank_0(
                f"megatron_qad: WARNING: {flag}: resuming from {args.load} without its optimizer state. The "
                "high-precision masters are lost: new ones are made from the checkpoint's 16-bit weights, which may "
                f"have been quantized to NVFP4 by a validation. Leave out {flag} to resume exactly."
            )


class _SkippedUpdates(Callback):
    """Records that weights stay quantized after a skipped update."""

    def __init__(self, job: QADJob):
        self._job = job

    def after_update(self, update: Update) -> None:
        if update.is_left_out:
            self._job.weights.were_not_updated()
