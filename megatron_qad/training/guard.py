"""Stands between a step's gradients and the optimizer: updates only from finite numbers, and looks out for spikes.

Megatron's ``train_step`` is wrapped, here and nowhere else. Before ``optimizer.step`` one all-reduce of three numbers
tells every rank whether any loss or gradient is not finite, the loss, and whether a token counts in it; all then do the
same: update, leave the update out (``skip``), stop with the step, rank and layer named (``stop``), or go back to the
last good checkpoint after a spike. Megatron counts an update that was left out as a skipped iteration: its data is used
up, its learning rate not.
"""

import argparse
import json
import statistics
from collections import deque
from pathlib import Path

import torch
from megatron.training import get_args, print_rank_0
from megatron.training import training as megatron_loop

from megatron_qad.engine import QADError
from megatron_qad.engine.heartbeat import heartbeat
from megatron_qad.engine.run_directory import whole_saves
from megatron_qad.engine.run_directory.run_files import TRACKER
from megatron_qad.models.weights import iteration_dir
from megatron_qad.training.not_finite import Trace, gradients_are_finite
from megatron_qad.training.roll_back import roll_back
from megatron_qad.training.schedule import QADStep
from megatron_qad.training.step_times import StepTimes

_HISTORY_FILE = "loss_history.json"
_WINDOW = 64
_MIN_HISTORY = 8
_MAX_SKIPS = 10
_MAX_NAMED = 4


class Guard:
    """The checks of one job.

    Args:
        step: what ran the schedule: it has the step's losses, and can run its forward passes again.
        on_nan: "stop" or "skip".
        spike_factor: a loss above this many times the median of the last 64 is a spike; None: none is.
    """

    def __init__(self, step: QADStep, on_nan: str, spike_factor: float | None):
        self._step, self._on_nan, self._spike_factor = step, on_nan, spike_factor
        self._losses: deque[float] = deque(maxlen=_WINDOW)
        self._skips_in_a_row = 0
        self._distrusted: set[int] = set()
        """Checkpoints gone back to since the last good step: the next spike goes back further."""
        self.spiked = False
        self.times = StepTimes()

    def start(self, args: argparse.Namespace) -> None:
        """Take the losses that the job saw before the checkpoint it resumes from, and have them saved with the next."""
        if self._spike_factor is None:
            return
        whole_saves.texts_beside[_HISTORY_FILE] = lambda: json.dumps(list(self._losses))
        if args.load is not None and (Path(args.load) / TRACKER).is_file():
            file = iteration_dir(args.load, args.ckpt_step or None) / _HISTORY_FILE
            if file.is_file():
                self._losses.extend(json.loads(file.read_text()))

    def update(self, update, model) -> tuple:
        """``optimizer.step`` if the numbers allow it; (False, None, None), as Megatron's own for FP16, if not.

        Raises:
            QADError: on every rank, what is not finite, and where; or that no token of the step counts.
        """
        loss, num_tokens, is_finite = self._agree(model)
        if not is_finite:
            self._not_finite(model)
            return self._leave_out()
        if not num_tokens and not get_args().qad.qad_ptq:  # which learns from no batch
            self._stop_or_skip(
                f"step {_step()}: no token of its batch counts in the loss, so there is nothing to learn from it",
                "Look at the loss masks of the data (tools/prepare_data.py), give longer or more sequences a step",
            )
            return self._leave_out()
        if self._is_spike(loss):
            self.spiked = True
            return self._leave_out()
        self._losses.append(loss)
        self._skips_in_a_row = 0
        self._distrusted.clear()
        heartbeat.beat("update")
        return update()

    def _agree(self, model) -> tuple[float, float, bool]:
        """The mean loss of a token, the tokens that count (as often as ranks compute their loss), and whether all
        numbers of all ranks are finite."""
        numbers = torch.zeros(3, dtype=torch.float64, device=torch.cuda.current_device())
        report = [one.get("total loss", next(iter(one.values()))).double() for one in self._step.losses or () if one]
        is_finite = gradients_are_finite(model)
        if report:
            numbers[:2] = torch.stack(report).sum(dim=0)
            is_finite = is_finite & numbers.isfinite().all()
        numbers = numbers.nan_to_num(0, 0, 0)
        numbers[2] = ~is_finite
        torch.distributed.all_reduce(numbers)
        total, count, num_bad = numbers.tolist()
        self.times.leave()
        return total / max(count, 1), count, num_bad == 0

    def _is_spike(self, loss: float) -> bool:
        if self._spike_factor is None or len(self._losses) < _MIN_HISTORY:
            return False
        median = statistics.median(self._losses)
        if loss <= self._spike_factor * median:
            return False
        print_rank_0(
            f"megatron_qad: WARNING: the loss of step {_step()} is {loss:.4g}, more than {self._spike_factor:g} times "
            f"{median:.4g}, the median of the last {len(self._losses)}"
        )
        return True

    def _leave_out(self) -> tuple:
        self._step.weights.were_not_updated()
        return False, None, None

    def _not_finite(self, model) -> None:
        trace = Trace()
        self._step.run_again(model, trace)
        trace.look_at_gradients(model, order=3)
        found = [f"rank {rank}, {said}" for rank, said in trace.gathered()]
        where = "; ".join(found[:_MAX_NAMED]) + (f"; and {len(found) - _MAX_NAMED} ranks" if found[_MAX_NAMED:] else "")
        if not found:
            where = "only the loss was: the same passes are finite now, so a device may have computed wrongly"
        self._stop_or_skip(
            f"step {_step()}: a loss or a gradient is NaN or Inf, and no weight was changed by it. Found: {where}",
            "Look at that layer and at the batch, train in another precision",
        )

    def _stop_or_skip(self, said: str, advice: str) -> None:
        self._skips_in_a_row += 1
        if self._on_nan == "stop":
            raise QADError(f"{said}. {advice}, or go on without such batches by --qad-on-nan skip")
        if self._skips_in_a_row == _MAX_SKIPS:
            raise QADError(f"{said}. The {_MAX_SKIPS} steps before were like this one: skipping does not help")
        print_rank_0(f"megatron_qad: WARNING: {said}. The step is skipped (--qad-on-nan skip)")

    def after_step(self, model, optimizer, scheduler) -> None:
        """Once Megatron has counted the step."""
        if self.spiked:
            self.spiked = False
            heartbeat.beat("rolling back", is_long=True)
            self._distrusted |= roll_back(model, optimizer, scheduler, self._distrusted)
            self._step.weights.were_loaded()
        self.times.end(get_args().log_interval, _step())
        heartbeat.beat("between steps")


def _step() -> int:
    return get_args().curr_iteration + 1  # Megatron counts a step when it is done


def wrap_train_step(guard: Guard, args: argparse.Namespace) -> None:
    """Once a process, after the schedule was wrapped."""
    guard.start(args)
    upstream = megatron_loop.train_step

    def train_step(forward_step_func, data_iterator, model, optimizer, scheduler, config, *rest, **named):
        heartbeat.beat("data", _step())
        guard.times.begin()
        before, update = optimizer.__dict__.get("step"), optimizer.step
        finalize = config.finalize_model_grads_func

        def finalize_model_grads(*args, **kwargs):
            guard.times.arrive()
            heartbeat.beat("gradients")
            return finalize(*args, **kwargs)

        optimizer.step = lambda: guard.update(update, model)
        config.finalize_model_grads_func = finalize_model_grads
        try:
            found = upstream(forward_step_func, data_iterator, model, optimizer, scheduler, config, *rest, **named)
        finally:
            config.finalize_model_grads_func = finalize
            optimizer.__dict__.pop("step", None)
            if before is not None:
                optimizer.step = before
        guard.after_step(model, optimizer, scheduler)
        return found

    megatron_loop.train_step = train_step
