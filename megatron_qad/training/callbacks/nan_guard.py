"""Stops the job, or skips the update, if the loss or a gradient is NaN or Inf or if no token counts (``--qad-on-nan``).

The message names the step, and for NaN and Inf the rank and the layer.
"""

from megatron.training import print_rank_0

from megatron_qad.engine.errors import QADError
from megatron_qad.engine.events import Callback, Update
from megatron_qad.training.nan_trace import NaNTrace, replay_last_step

_MAX_SKIPS = 10
_MAX_LISTED = 4


class NaNGuard(Callback):
    """Checks each step before its update."""

    def __init__(self, job):
        self._job = job
        self._on_nan = job.config.options.qad_on_nan
        self._skips_in_a_row = 0

    def before_update(self, update: Update) -> None:
        """
        Raises:
            QADError: on every rank, if a value is not finite or no token of the step counts, and ``--qad-on-nan`` is
                ``stop`` or too many steps were skipped.
        """
        if not update.is_finite:
            self._handle_nan(update)
        elif not update.num_tokens:
            self._stop_or_skip(
                update,
                f"step {update.step}: no token of its batch counts in the loss, so there is nothing to learn from it",
                "Check the loss masks of the data (megatron-qad prepare), use longer or more sequences per step",
            )

    def after_update(self, update: Update) -> None:
        if not update.is_left_out:
            self._skips_in_a_row = 0

    def _handle_nan(self, update: Update) -> None:
        trace = NaNTrace()
        replay_last_step(self._job, update.model, trace)
        trace.check_gradients(update.model, order=3)
        results = [f"rank {rank}, {message}" for rank, message in trace.gather()]
        num_more = len(results) - _MAX_LISTED
        where = "; ".join(results[:_MAX_LISTED]) + (f"; and {num_more} more ranks" if num_more > 0 else "")
        if not results:
            where = "nothing; all values were finite when the step was replayed"
        advice = "Check that layer and the batch, train in another precision"
        self._stop_or_skip(
            update,
            f"step {update.step}: a loss or a gradient is NaN or Inf, and no weight was changed by it. Found: {where}",
            advice if results else "This is not reproducible: suspect the hardware",
        )

    def _stop_or_skip(self, update: Update, message: str, advice: str) -> None:
        self._skips_in_a_row += 1
        if self._on_nan == "stop":
            raise QADError(f"{message}. {advice}, or skip such steps with --qad-on-nan skip.")
        if self._skips_in_a_row == _MAX_SKIPS:
            raise QADError(f"{message}. It is the {_MAX_SKIPS}th such step in a row: skipping does not help.")
        print_rank_0(f"megatron_qad: WARNING: {message}. The step is skipped (--qad-on-nan skip)")
        update.is_left_out = True
