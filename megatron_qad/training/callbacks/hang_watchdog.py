"""Ends a job without progress, and names the rank that is behind (``--qad-hang-timeout``)."""

from pathlib import Path

import torch

from megatron_qad.engine.events import Callback, Save, TrainedStep, Update
from megatron_qad.engine.heartbeat import Heartbeat


class HangWatchdog(Callback):
    """Reports each event, and each microbatch of the student, as progress to the heartbeat."""

    def __init__(self, job):
        self._job = job
        self._heartbeat = Heartbeat(passes=lambda: job.num_passes)

    def job_begins(self, job, resumes_at: int) -> None:
        args = self._job.args
        seconds = self._job.config.options.qad_hang_timeout
        if seconds is None:
            seconds = 0.9 * 60 * args.distributed_timeout_minutes
        if seconds > 0:
            directory = Path(args.save) / "heartbeats" if args.save is not None else None
            rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
            self._heartbeat.start(directory, rank, size, seconds)

    def phase(self, name: str, is_long: bool) -> None:
        self._heartbeat.beat(name, is_long=is_long)

    def step_begins(self, step: int, model) -> None:
        self._heartbeat.beat("data", step)

    def forward_begins(self, batches, is_training: bool) -> None:
        self._heartbeat.beat("teacher's pass" if is_training else "teacher's pass of an evaluation")

    def student_begins(self, batches, is_training: bool) -> None:
        self._heartbeat.beat("student's passes" if is_training else "student's pass of an evaluation")

    def gradients_begin(self) -> None:
        self._heartbeat.beat("gradients")

    def before_update(self, update: Update) -> None:
        if not update.is_left_out:
            self._heartbeat.beat("update")

    def step_ended(self, step: TrainedStep) -> None:
        self._heartbeat.beat("between steps")

    def closes(self) -> None:
        self._heartbeat.stop()

    def save_begins(self, save: Save) -> None:
        self._heartbeat.beat("end of a save" if save.iteration is None else "save", is_long=True)
