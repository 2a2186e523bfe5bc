"""Updates only from finite numbers, and only from batches in which a token counts.

A step whose loss or gradients are NaN or Inf, or in which no token counts, ends the job (``--qad-on-nan stop``) or
leaves its update out (``skip``); the step, and of NaN rank and layer, are named.
"""

from megatron.training import print_rank_0

from megatron_qad.engine.errors import QADError
from megatron_qad.engine.events import Callback, Update
from megatron_qad.training.nan_trace import Trace, trace_last_step

_MAX_SKIPS = 10
_MAX_NAMED = 4


class NaNGuard(Callback):
    def __init__(self, job):
        self._job = job
        self._on_nan = job.config.options.qad_on_nan
        self._learns = not job.config.options.qad_ptq  # calibration alone learns from no batch
        self._skips_in_a_row = 0

    def before_update(self, update: Update) -> None:
        """
        Raises:
            QADError: on every rank, what is not finite, and where; or that no token of the step counts.
        """
        if not update.is_finite:
            self._not_finite(update)
        elif not update.num_tokens and self._learns:
            self._stop_or_skip(
                update,
                f"step {update.step}: no token of its batch counts in the loss, so there is nothing to learn from it",
                "Look at the loss masks of the data (tools/prepare_data.py), give longer or more sequences a step",
            )

    def after_update(self, update: Update) -> None:
        if not update.is_left_out:
            self._skips_in_a_row = 0

    def _not_finite(self, update: Update) -> None:
        trace = Trace()
        trace_last_step(self._job, update.model, trace)
        trace.look_at_gradients(update.model, order=3)
        found = [f"rank {rank}, {said}" for rank, said in trace.gathered()]
        where = "; ".join(found[:_MAX_NAMED]) + (f"; and {len(found) - _MAX_NAMED} ranks" if found[_MAX_NAMED:] else "")
        if not found:
            where = "only the loss was: the same passes are finite now, so a device may have computed wrongly"
        self._stop_or_skip(
            update,
            f"step {update.step}: a loss or a gradient is NaN or Inf, and no weight was changed by it. Found: {where}",
            "Look at that layer and at the batch, train in another precision",
        )

    def _stop_or_skip(self, update: Update, said: str, advice: str) -> None:
        self._skips_in_a_row += 1
        if self._on_nan == "stop":
            raise QADError(f"{said}. {advice}, or go on without such batches by --qad-on-nan skip")
        if self._skips_in_a_row == _MAX_SKIPS:
            raise QADError(f"{said}. The {_MAX_SKIPS} steps before were like this one: skipping does not help")
        print_rank_0(f"megatron_qad: WARNING: {said}. The step is skipped (--qad-on-nan skip)")
        update.is_left_out = True
