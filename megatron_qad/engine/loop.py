"""The interface to Megatron's training loop: replaces four of its functions, so that they report events.

``Loop.install`` replaces four functions in ``megatron.training.training``, where Megatron looks them up. Each calls
the original function and reports events around it:

- ``get_forward_backward_func``: the returned schedule is passed to ``run_schedule``, which runs it.
- ``train_step``: a step, with an optimizer whose update callbacks may skip.
- ``save_checkpoint``: a save.
- ``maybe_finalize_async_save``: the end of a background save; only with ``--async-save``.

The end of the backward passes is reported through an official hook of Megatron, ``finalize_model_grads_func``.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.utils import get_model_config
from torch.distributed.checkpoint.api import CheckpointException

from megatron_qad.engine.events import Events, Save, TrainedStep, Update
from megatron_qad.engine.finite import gradients_are_finite
from megatron_qad.engine.patches import replace, restore
from megatron_qad.engine.run_directory.atomic_checkpoint import SaveFailed

_LOOP = "megatron.training.training"


class JobIsDone(Exception):
    """Raised inside ``Loop.running`` if nothing is left to do; the job then ends as after its last step."""


class Loop:
    """Megatron's training loop, with events.

    Args:
        args: Megatron's global arguments, where its loop keeps the iteration counters.
        events: receives the events.
    """

    def __init__(self, args: argparse.Namespace, events: Events):
        self.args, self.events = args, events
        self._reports: list[dict[str, torch.Tensor]] = []
        self._replaced: list[str] = []
        self.exit_status: int | None = None
        """Exit status of a job that stops early. None means Megatron's exit status."""

    @property
    def step(self) -> int:
        """The current training step, or the last one between two steps, counted from 1."""
        return self.args.curr_iteration + 1  # Megatron increments the counter after the step

    @property
    def iteration(self) -> int:
        """Number of steps trained so far, as counted in an evaluation."""
        # Megatron counts an iteration after its evaluation. Without training, curr_iteration stays 0; with --skip-train
        # it does not exist.
        trained = getattr(self.args, "curr_iteration", -1) + 1 if self.args.consumed_train_samples else 0
        return max(self.args.iteration, trained)

    def install(self, student: Sequence[torch.nn.Module], run_schedule: Callable) -> None:
        """Make Megatron's loop report to this object. Called once in a job, before the student is wrapped.

        Args:
            student: the student's chunks.
            run_schedule: ``(schedule, *, data_iterator, model, num_microbatches, forward_step_func, **kwargs)``, called
                instead of ``schedule`` with the same arguments.
        """
        config = get_model_config(student[0])
        assert config.finalize_model_grads_func is None, "another builder has set finalize_model_grads_func"
        config.finalize_model_grads_func = self._finalize_gradients
        self._replace("get_forward_backward_func", lambda upstream: self._wrap_schedules(upstream, run_schedule))
        self._replace("train_step", self._train_step)
        self.install_saves()

    def install_saves(self) -> None:
        """Make Megatron report saves to this object; all that a job without a training loop needs."""
        self._replace("save_checkpoint", self._save_checkpoint)
        if self.args.async_save:
            self._replace("maybe_finalize_async_save", self._finalize_async_save)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Context around ``pretrain`` that reports the end of the job and restores Megatron's functions."""
        try:
            yield
            self.events.job_ends(is_done=True)
        except JobIsDone:
            self.events.job_ends(is_done=True)
        except SystemExit as error:  # Megatron exits on a stop request, or at the limit of its time or steps
            self.events.job_ends(is_done=False)
            raise SystemExit(error.code if self.exit_status is None else self.exit_status) from error
        finally:
            self.events.closes()
            while self._replaced:
                restore(self._replaced.pop())

    def _replace(self, name: str, make: Callable[[Callable], Callable]) -> None:
        replace(f"{_LOOP}:{name}", make)
        self._replaced.append(f"{_LOOP}:{name}")

    def _wrap_schedules(self, upstream: Callable, run_schedule: Callable) -> Callable:
        def get_forward_backward_func(*args, **kwargs):
            schedule = upstream(*args, **kwargs)

            def run(**schedule_kwargs):
                self._reports = run_schedule(schedule, **schedule_kwargs)
                return self._reports

            return run

        return get_forward_backward_func

    def _finalize_gradients(self, *args, **kwargs) -> None:
        self.events.gradients_begin()
        finalize_model_grads(*args, **kwargs)
        self.events.gradients_ready()

    def _train_step(self, upstream: Callable) -> Callable:
        def train_step(forward_step_func, data_iterator, model, optimizer, scheduler, *args, **kwargs):
            self.events.step_begins(self.step, model)
            guarded = _GuardedOptimizer(optimizer, lambda: self._update(optimizer, model))
            result = upstream(forward_step_func, data_iterator, model, guarded, scheduler, *args, **kwargs)
            self.events.step_ended(TrainedStep(self.step, result[0], result[5], model, optimizer, scheduler))
            return result

        return train_step

    def _update(self, optimizer, model) -> tuple:
        """Call ``optimizer.step``, unless a callback skips the update.

        A skipped update returns (False, None, None), as Megatron's FP16 optimizer does. Megatron then counts a skipped
        iteration: its data is consumed, and the learning rate does not advance.
        """
        update = Update(self.step, model, *_reduce_over_ranks(self._reports, model), optimizer)
        self.events.before_update(update)
        result = (False, None, None) if update.is_left_out else optimizer.step()
        self.events.after_update(update)
        return result

    def _save_checkpoint(self, upstream: Callable) -> Callable:
        def save_checkpoint(iteration, *args, **kwargs):
            save = Save(iteration, is_last=iteration >= self.args.train_iters)
            self._run_save(save, lambda: upstream(iteration, *args, **kwargs))

        return save_checkpoint

    def _finalize_async_save(self, upstream: Callable) -> Callable:
        def maybe_finalize_async_save(*args, **kwargs):
            save = Save(None, is_last=kwargs.get("terminate", False))
            self._run_save(save, lambda: upstream(*args, **kwargs), is_blocking=kwargs.get("blocking", False))

        return maybe_finalize_async_save

    def _run_save(self, save: Save, work: Callable[[], None], is_blocking: bool = True) -> None:
        try:
            if is_blocking:
                self.events.save_begins(save)
            work()
        except (SaveFailed, CheckpointException) as error:
            save.error = error
        self.events.save_ended(save)
        if save.error is not None and not save.is_survived:
            raise save.error


class _GuardedOptimizer:
    """A proxy of the optimizer with a different ``step``."""

    def __init__(self, optimizer, step: Callable[[], tuple]):
        self._optimizer, self.step = optimizer, step

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)


def _reduce_over_ranks(reports: list[dict[str, torch.Tensor]], model) -> tuple[float, float, bool]:
    """Return mean loss per token, number of tokens summed over all ranks that compute a loss, and whether losses and
    gradients are finite on every rank. One all-reduce of three numbers."""
    numbers = torch.zeros(3, dtype=torch.float64, device=torch.cuda.current_device())
    totals = [report.get("total loss", next(iter(report.values()))).double() for report in reports or () if report]
    is_finite = gradients_are_finite(model)
    if totals:
        numbers[:2] = torch.stack(totals).sum(dim=0)
        is_finite = is_finite & numbers.isfinite().all()
    numbers = numbers.nan_to_num(0, 0, 0)
    numbers[2] = ~is_finite
    torch.distributed.all_reduce(numbers)
    total, count, num_bad = numbers.tolist()
    return total / max(count, 1), count, num_bad == 0


def gather_parameters(model) -> None:
    """Finish the parameter gather that ``--overlap-param-gather`` defers to the forward pass.

    A weight must be gathered before it is quantized. The forward pass does not gather it a second time.
    """
    for chunk in model if isinstance(model, list) else [model]:
        if getattr(getattr(chunk, "ddp_config", None), "overlap_param_gather", False):
            chunk.start_param_sync(force_sync=True)
