"""The seam to Megatron's training loop: the one place that replaces functions of it.

``Loop.install`` replaces four functions of ``megatron.training.training``, where Megatron looks them up; each calls
Megatron's own and reports events around it:

- ``get_forward_backward_func``: the schedule that it returns is given to ``run_schedule``, which runs it.
- ``train_step``: a step; its optimizer is one whose update callbacks may leave out.
- ``save_checkpoint``: a save.
- ``maybe_finalize_async_save``: the end of a save in the background; only with ``--async-save``.

Megatron's hook for the end of the backward passes, ``finalize_model_grads_func``, is an official one.
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


class Loop:
    """Megatron's loop as a job sees it.

    Args:
        args: Megatron's global arguments, which its loop counts in.
        events: told what happens.
    """

    def __init__(self, args: argparse.Namespace, events: Events):
        self.args, self.events = args, events
        self._reports: list[dict[str, torch.Tensor]] = []
        self._replaced: list[str] = []
        self.exit_status: int | None = None
        """What a job that leaves early ends with; None: as Megatron says."""

    @property
    def step(self) -> int:
        """The training step that is running or has just run, counted from 1."""
        return self.args.curr_iteration + 1  # Megatron counts a step when it is done

    @property
    def iteration(self) -> int:
        """Steps that were trained so far, as an evaluation counts them."""
        # Megatron counts an iteration after its evaluation. Where nothing is trained curr_iteration stays 0, and under
        # --skip-train it is not there.
        trained = getattr(self.args, "curr_iteration", -1) + 1 if self.args.consumed_train_samples else 0
        return max(self.args.iteration, trained)

    def install(self, student: Sequence[torch.nn.Module], run_schedule: Callable) -> None:
        """Let Megatron's loop report to this object. Once a job, before the student is wrapped.

        Args:
            student: its chunks.
            run_schedule: ``(schedule, *, data_iterator, model, num_microbatches, forward_step_func, **rest)``, called
                in place of ``schedule`` with what Megatron would call that with.
        """
        config = get_model_config(student[0])
        assert config.finalize_model_grads_func is None, "another builder has installed its finalize_model_grads_func"
        config.finalize_model_grads_func = self._finalize_gradients
        self._replace("get_forward_backward_func", lambda upstream: self._schedules(upstream, run_schedule))
        self._replace("train_step", self._train_step)
        self._replace("save_checkpoint", self._save_checkpoint)
        if self.args.async_save:
            self._replace("maybe_finalize_async_save", self._finalize_async_save)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around ``pretrain``: reports how the job ended, and gives Megatron its functions back."""
        try:
            yield
            self.events.job_ends(is_done=True)
        except SystemExit as left:  # Megatron leaves so when it was asked to, or when its time or its steps are up
            self.events.job_ends(is_done=False)
            raise SystemExit(left.code if self.exit_status is None else self.exit_status) from left
        finally:
            self.events.closes()
            while self._replaced:
                restore(self._replaced.pop())

    def _replace(self, name: str, make: Callable[[Callable], Callable]) -> None:
        replace(f"{_LOOP}:{name}", make)
        self._replaced.append(f"{_LOOP}:{name}")

    def _schedules(self, upstream: Callable, run_schedule: Callable) -> Callable:
        def get_forward_backward_func(*args, **kwargs):
            schedule = upstream(*args, **kwargs)

            def run(**call):
                self._reports = run_schedule(schedule, **call)
                return self._reports

            return run

        return get_forward_backward_func

    def _finalize_gradients(self, *args, **kwargs) -> None:
        self.events.gradients_begin()
        finalize_model_grads(*args, **kwargs)
        self.events.gradients_ready()

    def _train_step(self, upstream: Callable) -> Callable:
        def train_step(forward_step_func, data_iterator, model, optimizer, scheduler, *rest, **named):
            self.events.step_begins(self.step, model)
            guarded = _GuardedOptimizer(optimizer, lambda: self._update(optimizer, model))
            found = upstream(forward_step_func, data_iterator, model, guarded, scheduler, *rest, **named)
            self.events.step_ended(TrainedStep(self.step, found[0], found[5], model, optimizer, scheduler))
            return found

        return train_step

    def _update(self, optimizer, model) -> tuple:
        """``optimizer.step`` if no callback leaves it out; (False, None, None), as Megatron's own for FP16, if one
        does. Megatron then counts a skipped iteration: its data is used up, its learning rate not."""
        update = Update(self.step, model, *_agree(self._reports, model))
        self.events.before_update(update)
        found = (False, None, None) if update.is_left_out else optimizer.step()
        self.events.after_update(update)
        return found

    def _save_checkpoint(self, upstream: Callable) -> Callable:
        def save_checkpoint(iteration, *rest, **named):
            save = Save(iteration, is_last=iteration >= self.args.train_iters)
            self._run(save, lambda: upstream(iteration, *rest, **named))

        return save_checkpoint

    def _finalize_async_save(self, upstream: Callable) -> Callable:
        def maybe_finalize_async_save(*rest, **named):
            save = Save(None, is_last=named.get("terminate", False))
            self._run(save, lambda: upstream(*rest, **named), waits=named.get("blocking", False))

        return maybe_finalize_async_save

    def _run(self, save: Save, work: Callable[[], None], waits: bool = True) -> None:
        try:
            if waits:
                self.events.save_begins(save)
            work()
        except (SaveFailed, CheckpointException) as error:
            save.error = error
        self.events.save_ended(save)
        if save.error is not None and not save.is_survived:
            raise save.error


class _GuardedOptimizer:
    """A step's optimizer with another ``step``; everything else is its own."""

    def __init__(self, optimizer, step: Callable[[], tuple]):
        self._optimizer, self.step = optimizer, step

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)


def _agree(reports: list[dict[str, torch.Tensor]], model) -> tuple[float, float, bool]:
    """The mean loss of a token, the tokens that count (as often as ranks compute their loss), and whether all numbers
    of all ranks are finite. One all-reduce of three numbers."""
    numbers = torch.zeros(3, dtype=torch.float64, device=torch.cuda.current_device())
    totals = [one.get("total loss", next(iter(one.values()))).double() for one in reports or () if one]
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
    """Finish the parameter gather that ``--overlap-param-gather`` leaves to the forward pass: a weight must be whole
    before it is quantized. What was gathered here, the forward pass does not gather again."""
    for chunk in model if isinstance(model, list) else [model]:
        if getattr(getattr(chunk, "ddp_config", None), "overlap_param_gather", False):
            chunk.start_param_sync(force_sync=True)
