"""Masks the gradients of weights that are beyond their frozen scales, before each update."""

from megatron_qad.engine.events import Callback, Update


class FrozenScaleMask(Callback):
    """Sets the gradient of a saturated element to zero (``quantization.frozen_scales``).

    Args:
        job: the ``QADJob``.
    """

    def __init__(self, job):
        self._job = job

    def before_update(self, update: Update) -> None:
        self._job.weights.mask_gradients_(update.optimizer)
