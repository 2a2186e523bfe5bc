"""Prints one line per log interval: losses, speed, memory and the time left. docs/log.md explains its fields.

The last rank prints it, which has the losses. The metrics (``engine.metric_writer``) also have speed and memory.
Megatron writes losses, gradient norm and learning rate to them.
"""

import statistics
import time
from collections import deque
from collections.abc import Sequence
from datetime import datetime, timedelta

import torch
from megatron.core import mpu
from megatron.core.num_microbatches_calculator import get_current_global_batch_size
from megatron.core.optimizer_param_scheduler import get_canonical_lr_for_logging
from megatron.training import get_tensorboard_writer, is_last_rank

from megatron_qad.engine import capabilities
from megatron_qad.engine.chips import bf16_peak
from megatron_qad.engine.events import Callback, TrainedStep
from megatron_qad.models.flops import BACKWARD, ForwardFlops, forward_flops

_RECENT = 64
"""Number of steps whose median duration predicts the time left."""


class StepLog(Callback):
    """Prints a line for the steps since the one before it; each number is a mean over them unless noted."""

    def __init__(self, job):
        config, self._args = job.config, job.args
        self._is_packed = config.is_packed
        self._student = forward_flops(config.student.family, config.student.hf)
        has_teacher = config.teacher is not None and config.losses.needs_teacher
        self._teacher = forward_flops(config.teacher.family, config.teacher.hf) if has_teacher else ForwardFlops(0, 0)
        self._peak = bf16_peak(torch.cuda.get_device_name()) if capabilities().device == "cuda" else None
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._reset()

    def _reset(self) -> None:
        self._seconds = 0.0
        self._num_sequences = self._sum_of_squares = self._num_skipped = 0
        self._losses: list[dict[str, torch.Tensor]] = []

    def step_begins(self, step: int, model) -> None:
        self._began = time.perf_counter()
        self._num_sequences += get_current_global_batch_size()

    def forward_begins(self, batches: Sequence, is_training: bool) -> None:
        if is_training and self._is_packed:
            lengths = (length for batch in batches for length in batch.documents.document_lengths)
            self._sum_of_squares += sum(length**2 for length in lengths)

    def step_ended(self, step: TrainedStep) -> None:
        seconds = time.perf_counter() - self._began
        self._seconds += seconds
        self._recent.append(seconds)
        if step.grad_norm is None:
            self._num_skipped += 1
        else:
            self._losses.append(step.losses)
        if step.number % self._args.log_interval == 0:
            self._report(step)
            self._reset()

    def _report(self, step: TrainedStep) -> None:
        scalars = self._scalars()
        if not is_last_rank():
            return
        if writer := get_tensorboard_writer():
            for name, value in scalars.items():
                writer.add_scalar(name, value, step.number)
        means = {
            name: torch.stack([losses[name].float() for losses in self._losses]).mean().item()
            for name in _names(self._losses)
        }
        remaining = (self._args.train_iters - step.number) * statistics.median(self._recent)
        learning_rate = get_canonical_lr_for_logging(step.optimizer.param_groups)
        print(
            _format_line(step, self._args.train_iters, means, self._num_skipped, learning_rate, scalars, remaining),
            flush=True,
        )

    def _scalars(self) -> dict[str, float]:
        """Return speed and memory by name, the same on every rank. Collective."""
        num_tokens = self._num_sequences * self._args.seq_length
        sum_of_squares = num_tokens * self._args.seq_length
        if self._is_packed:
            total = torch.tensor(self._sum_of_squares, dtype=torch.float64, device=torch.cuda.current_device())
            torch.distributed.all_reduce(total, group=mpu.get_data_parallel_group())
            sum_of_squares = int(total)
        memory = torch.tensor(
            torch.cuda.max_memory_allocated(), dtype=torch.float64, device=torch.cuda.current_device()
        )
        torch.distributed.all_reduce(memory, op=torch.distributed.ReduceOp.MAX)
        rank_seconds = self._seconds * torch.distributed.get_world_size()
        student = (1 + BACKWARD) * self._student.of_sums(num_tokens, sum_of_squares) / rank_seconds
        teacher = self._teacher.of_sums(num_tokens, sum_of_squares) / rank_seconds
        scalars = {
            "speed/tokens_per_second": num_tokens / self._seconds,
            "speed/student_tflops_per_rank": student / 1e12,
        }
        if teacher:
            scalars["speed/teacher_tflops_per_rank"] = teacher / 1e12
        if self._peak is not None:
            scalars["speed/mfu"] = (student + teacher) / self._peak
        return scalars | {"memory/peak_gb": memory.item() / 1e9}


def _names(losses: Sequence[dict]) -> Sequence[str]:
    return list(losses[-1]) if losses else []


def _format_line(
    step: TrainedStep,
    num_iterations: int,
    losses: dict[str, float],
    num_skipped: int,
    learning_rate: float | None,
    scalars: dict[str, float],
    seconds_left: float,
) -> str:
    """Format the line.

    Args:
        losses: mean of each loss over the updates that were made; empty if none was.
        scalars: see ``StepLog._scalars``.
    """
    parts = [f"{datetime.now():%Y-%m-%d %H:%M:%S}", f"iteration {step.number}/{num_iterations}"]
    parts += [f"{name}: {value:.6g}" for name, value in losses.items()]
    if num_skipped:
        parts.append(f"skipped updates: {num_skipped}")
    if step.grad_norm is not None:
        parts.append(f"grad norm: {float(step.grad_norm):.4g}")
    if learning_rate is not None:
        parts.append(f"lr: {learning_rate:.5g}")
    parts.append(f"{scalars['speed/tokens_per_second']:,.0f} tokens/s")
    models = (
        f"{model} {scalars[tag]:.3g}"
        for model in ("student", "teacher")
        if (tag := f"speed/{model}_tflops_per_rank") in scalars
    )
    parts.append(f"TFLOP/s per rank: {', '.join(models)}")
    if "speed/mfu" in scalars:
        parts.append(f"MFU: {scalars['speed/mfu']:.1%}")
    parts.append(f"peak memory: {scalars['memory/peak_gb']:.3g} GB")
    parts.append(f"left: {timedelta(seconds=round(seconds_left))}")
    return " | ".join(parts)
