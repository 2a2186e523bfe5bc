"""Prints one line of advice after each validation (``training.advice``), from the KL and the noise of its change.

Every validation reads the same microbatches in the same order, so the change is measured microbatch by microbatch. Its
noise is 1.96 standard errors of the mean change over all microbatches: the text's part, not that of another training.
"""

import torch
from megatron.core import mpu
from megatron.training import get_tensorboard_writer, is_last_rank, print_rank_last
from torch import Tensor

from megatron_qad.engine.events import Callback
from megatron_qad.training.advice import CHANGE_NOISE, Measured, advice


class ValidationAdvice(Callback):
    """Keeps the validations of this start of the job."""

    def __init__(self, job):
        self._job = job
        self._history: list[Measured] = []
        self._before: Tensor | None = None
        """(KL sum, number of tokens) of each microbatch of the last validation on this rank, float64 [n, 2]."""

    def evaluation_ended(self, iteration: int, means: dict[str, float]) -> None:
        now = self._job.loss.microbatch_kl
        if mpu.get_context_parallel_world_size() > 1:  # context-parallel ranks have parts of the same rows
            torch.distributed.all_reduce(now, group=mpu.get_context_parallel_group())
        noise = change_noise(self._before, now, mpu.get_data_parallel_group())
        self._before = now
        if self._history and self._history[-1].iteration == iteration:
            return  # the end of training validates the last iteration again
        if not is_last_rank() or not means["num_tokens"]:
            return
        measured = Measured(iteration, means["kl_to_teacher"], means["teacher_cross_entropy"], noise)
        self._history.append(measured)
        if noise is not None and (writer := get_tensorboard_writer()):
            writer.add_scalar(CHANGE_NOISE, noise, iteration)
        print_rank_last(f"megatron_qad: {advice(self._history)}")


def change_noise(before: Tensor | None, now: Tensor, group) -> float | None:
    """Return 1.96 standard errors of the change of the mean KL, over the microbatches of all ranks. Collective.

    Args:
        before, now: (KL sum, number of tokens) of each microbatch of this rank, float64 [n, 2]; None before the first.

    Returns:
        In nats per token; None if there is no validation before on the same microbatches, or only one microbatch.
    """
    is_same = before is not None and before.shape == now.shape and torch.equal(before[:, 1], now[:, 1])
    change, tokens = (now[:, 0] - before[:, 0], now[:, 1]) if is_same else (now[:, 0], now[:, 1])
    moments = [change.square().sum(), (change * tokens).sum(), tokens.square().sum(), change.sum(), tokens.sum()]
    counts = [(tokens > 0).sum().double(), torch.as_tensor(float(not is_same), dtype=torch.float64, device=now.device)]
    packed = torch.stack([*moments, *counts])
    torch.distributed.all_reduce(packed, group=group)
    squares, products, token_squares, total, num_tokens, number, others = packed.tolist()
    if others or number < 2:
        return None
    # Ratio of two sums over microbatches: the residuals are the changes beyond the mean change of their tokens.
    mean = total / num_tokens
    residual = max(0.0, squares - 2 * mean * products + mean**2 * token_squares)
    return 1.96 * (residual * number / (number - 1)) ** 0.5 / num_tokens
