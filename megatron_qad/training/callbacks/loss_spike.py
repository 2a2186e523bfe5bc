"""Rolls back to the last good checkpoint when the loss spikes (``--qad-spike-factor``)."""

import json
import statistics
from collections import deque
from pathlib import Path

from megatron.training import print_rank_0

from megatron_qad.engine.errors import QADError
from megatron_qad.engine.events import Callback, TrainedStep, Update
from megatron_qad.engine.rollback import roll_back
from megatron_qad.engine.run_directory.iterations import iteration_dir
from megatron_qad.engine.run_directory.run_files import TRACKER
from megatron_qad.engine.text_files import parse_json, read_text

_HISTORY_FILE = "loss_history.json"
_WINDOW = 64
_MIN_HISTORY = 8


class LossSpike(Callback):
    """Detects a spike: a loss above the factor times the median of the last 64 losses.

    The update of the step is skipped, and the job rolls back before the next step.
    """

    def __init__(self, job):
        self._job = job
        self._factor = job.config.options.qad_spike_factor
        self._losses: deque[float] = deque(maxlen=_WINDOW)
        self._has_spiked = False
        self._rejected: set[int] = set()
        """Checkpoints that a rollback since the last good step has used; the next spike rolls back further."""

    def job_begins(self, job, resumes_at: int) -> None:
        """Read the loss history of the checkpoint from which the job resumes, and register it for new checkpoints."""
        if self._factor is None:
            return
        args = self._job.args
        self._job.saves.extra_texts[_HISTORY_FILE] = lambda: json.dumps(list(self._losses))
        if args.load is not None and (Path(args.load) / TRACKER).is_file():
            file = iteration_dir(args.load, args.ckpt_step or None) / _HISTORY_FILE
            if file.is_file():
                self._losses.extend(_read_history(file))

    def before_update(self, update: Update) -> None:
        if update.is_left_out or self._factor is None or len(self._losses) < _MIN_HISTORY:
            return
        median = statistics.median(self._losses)
        if update.loss <= self._factor * median:
            return
        print_rank_0(
            f"megatron_qad: WARNING: the loss of step {update.step} is {update.loss:.4g}, more than {self._factor:g} "
            f"times {median:.4g}, the median of the last {len(self._losses)}"
        )
        self._has_spiked = update.is_left_out = True

    def after_update(self, update: Update) -> None:
        if not update.is_left_out:
            self._losses.append(update.loss)
            self._rejected.clear()

    def step_ended(self, step: TrainedStep) -> None:
        if self._has_spiked:
            self._has_spiked = False
            self._job.events.phase("rolling back", is_long=True)
            self._rejected |= roll_back(self._job.args, step.model, step.optimizer, step.scheduler, self._rejected)
            self._job.weights.were_loaded()


def _read_history(file: Path) -> list[float]:
    advice = "Remove the file to start without a history."
    losses = parse_json(read_text(file), str(file), advice)
    if not isinstance(losses, list) or not all(type(loss) in (int, float) for loss in losses):
        raise QADError(f"{file}: expected a list of losses, found {losses!r:.100}. {advice}")
    return losses
