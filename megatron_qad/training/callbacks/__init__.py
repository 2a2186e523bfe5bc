"""Callbacks: optional parts of a job, one file each, as classes that subscribe to its events (``engine.events``)."""

from megatron_qad.distillation.hidden_states import HiddenLoss
from megatron_qad.distillation.scale_growth import ScaleGrowth
from megatron_qad.engine.events import Callback
from megatron_qad.training.callbacks.best_checkpoints import BestCheckpoints
from megatron_qad.training.callbacks.checkpoint_keeper import CheckpointKeeper
from megatron_qad.training.callbacks.expert_load import ExpertLoad
from megatron_qad.training.callbacks.frozen_scale_mask import FrozenScaleMask
from megatron_qad.training.callbacks.hang_watchdog import HangWatchdog
from megatron_qad.training.callbacks.hidden_state_losses import HiddenStateLosses
from megatron_qad.training.callbacks.loss_spike import LossSpike
from megatron_qad.training.callbacks.nan_guard import NaNGuard
from megatron_qad.training.callbacks.preemption import Preemption
from megatron_qad.training.callbacks.run_header import RunHeader
from megatron_qad.training.callbacks.scale_penalty import ScalePenalty
from megatron_qad.training.callbacks.step_log import StepLog
from megatron_qad.training.callbacks.step_times import StepTimes
from megatron_qad.training.callbacks.validation import Validation
from megatron_qad.training.callbacks.validation_advice import ValidationAdvice


def build_callbacks(job) -> list[Callback]:
    """Build the callbacks of a job, in the order in which they receive events. Add a new callback to this list."""
    losses, trains = job.config.losses, not job.config.options.qad_ptq
    best = BestCheckpoints(job)
    return [
        RunHeader(job),
        StepTimes(job),
        *([StepLog(job)] if trains else []),
        NaNGuard(job),
        LossSpike(job),
        *([HiddenStateLosses(job)] if trains and losses.terms_of_type(HiddenLoss) else []),
        *([ScalePenalty(job)] if trains and losses.terms_of_type(ScaleGrowth) else []),
        *([FrozenScaleMask(job)] if trains and any(x.is_frozen for x in job.config.scales.values()) else []),
        ExpertLoad(job),
        best,
        Validation(),
        *([ValidationAdvice(job)] if trains and job.config.teacher is not None else []),
        CheckpointKeeper(job, best),
        Preemption(job),
        HangWatchdog(job),  # after the callbacks that may skip an update
    ]
