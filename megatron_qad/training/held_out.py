"""Held-out microbatches on which a tool compares a model with a reference, without training."""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from megatron.core import mpu
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.training.training import build_train_valid_test_data_iterators

from megatron_qad.data.validation_set import samples_per_iteration
from megatron_qad.engine.errors import QADError
from megatron_qad.training.batch import Batch, iterators
from megatron_qad.training.job import QADJob
from megatron_qad.training.teacher import Teacher


class HeldOut:
    """The first microbatches of a job's validation split.

    Args:
        job: a job that validates (``--eval-iters``) and whose parallel state is initialized.
        num_microbatches: microbatches per data-parallel rank; fewer if the validation set is smaller.
    """

    def __init__(self, job: QADJob, num_microbatches: int):
        self._job, args = job, job.args
        args.iteration = args.consumed_train_samples = args.consumed_valid_samples = 0
        _, self._iterator, _ = build_train_valid_test_data_iterators(job.datasets_provider)
        at_once = args.micro_batch_size * args.data_parallel_size
        available = args.eval_iters * samples_per_iteration(args) // at_once
        num_microbatches = min(num_microbatches, available)  # the data would repeat after that
        self._shape = {"seq_length": args.seq_length, "micro_batch_size": args.micro_batch_size}
        self.batches = job.reader.read(self._iterator, num_microbatches, args.micro_batch_size, args.seq_length)
        self._reference: list = []

    def set_reference(self, chunks: Sequence[torch.nn.Module]) -> None:
        """Run a frozen model and keep its outputs, with which ``kl`` compares. Collective."""
        job = self._job
        teacher = Teacher(chunks, job.forward, keeps_hidden=job.config.output_mode.teacher_hidden)
        shape = job.reader.schedule_shape(**self._shape)
        teacher.attach_outputs(self.batches, **shape, decoder_seq_length=None)
        self._reference = [batch.teacher_output for batch in self.batches]

    def kl(self, chunks: Sequence[torch.nn.Module]) -> tuple[float, int]:
        """Return KL(reference || model) in nats per token, and the number of counted tokens. Collective.

        Raises:
            QADError: no token of the microbatches counts in the loss.
        """
        for batch, output in zip(self.batches, self._reference, strict=True):
            batch.teacher_output = output  # the loss removes it from the batch
        with torch.no_grad():
            get_forward_backward_func()(
                forward_step_func=self._forward_step,
                data_iterator=iterators(self.batches, self._iterator),
                model=list(chunks),
                num_microbatches=len(self.batches),
                forward_only=True,
                **self._job.reader.schedule_shape(**self._shape),
            )
        total = self._job.loss.take_metrics().all_reduce(mpu.get_data_parallel_group(with_context_parallel=True))
        if mpu.get_pipeline_model_parallel_world_size() > 1:  # only the last stage computes a loss
            total = total.all_reduce(mpu.get_pipeline_model_parallel_group())
        means = total.means()
        if not means["num_tokens"]:
            raise QADError(
                f"no token of the {len(self.batches)} microbatches of held-out text counts in the loss, so there is "
                "nothing to measure. Use more microbatches (--num-microbatches) or other data."
            )
        return means["kl_to_teacher"], means["num_tokens"]

    def _forward_step(self, batches: Iterator[Batch], model: torch.nn.Module):
        batch = next(batches)
        return self._job.student_pass(model, batch), partial(self._job.loss, batch, model)
