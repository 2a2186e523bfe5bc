"""Runs teacher and student on the tokens of a job's validation and collects the metrics of every counted token."""

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch
from megatron.core import mpu
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import unwrap_model
from megatron.training import print_rank_0
from torch import Tensor

from megatron_qad.distillation import VocabShard
from megatron_qad.distillation.token_metrics import TOKEN_METRICS, token_metrics
from megatron_qad.engine.errors import QADError
from megatron_qad.evaluation.record import INTEGERS
from megatron_qad.models.context_parallel import take_chunks
from megatron_qad.models.output_layer import ModelOutput
from megatron_qad.training.batch import Batch, iterators
from megatron_qad.training.job import QADJob
from megatron_qad.training.loss import logits_in_chunks
from megatron_qad.training.ptq import data_iterators
from megatron_qad.training.teacher import Teacher

Arrays = dict[str, np.ndarray]


class TokenCollector:
    """Collects the metrics of this rank's tokens, on the last pipeline stage.

    Args:
        job: a job that validates and whose parallel state is initialized.
    """

    def __init__(self, job: QADJob):
        self._job = job
        self._first_rows: dict[int, int] = {}
        """Index of the first row of a running microbatch among all rows, by the identity of the microbatch."""
        self._parts: list[Arrays] = []
        self._read: list[Arrays] = []

    def begin(self, batches: Sequence[Batch], first_microbatch: int) -> None:
        """Note which rows the microbatches hold. Megatron's sampler gives each data-parallel rank the next rows."""
        size, rank = mpu.get_data_parallel_world_size(), mpu.get_data_parallel_rank()
        num_rows = self._job.args.eval_micro_batch_size
        self._first_rows = {
            id(batch): ((first_microbatch + i) * size + rank) * num_rows for i, batch in enumerate(batches)
        }

    def __call__(self, batch: Batch, model: torch.nn.Module, output: Tensor) -> tuple[Tensor, Tensor, dict]:
        """Collect the metrics of one microbatch; arguments and result are those of ``training.loss.Loss``."""
        job = self._job
        student = ModelOutput(output, unwrap_model(model) if job.config.output_mode.fused else None)
        group = mpu.get_tensor_model_parallel_group()
        shard = VocabShard.for_rank(student.width, job.config.student.vocab_size, group)
        teacher, batch.teacher_output = batch.teacher_output, None
        labels = batch.labels.flatten()
        chunks = [
            token_metrics(logits, teacher_logits, labels[rows], shard)
            for rows, logits, teacher_logits in logits_in_chunks(student, teacher)
        ]
        counted = batch.loss_mask.flatten() != 0
        columns = {name: torch.cat([chunk.values[name] for chunk in chunks]) for name in TOKEN_METRICS}
        places = _places(batch, job.args.seq_length, self._first_rows[id(batch)])
        columns |= places | {"position": batch.position_ids.flatten(), "label": labels}
        for name in ("student_top", "teacher_top"):
            columns[name] = torch.cat([getattr(chunk, name) for chunk in chunks])
        if group.rank() == 0:  # the others have the same values
            self._parts.append({name: _to_numpy(columns[name][counted]) for name in (*TOKEN_METRICS, *INTEGERS)})
            self._read.append({name: _to_numpy(x) for name, x in (places | {"token": batch.tokens.flatten()}).items()})
        return output.new_zeros(()), counted.sum().int(), {}

    def gather(self) -> tuple[Arrays, np.ndarray]:
        """Return the tokens and rows of ``record.Evaluation`` on rank 0, and empty ones on the others. Collective."""
        parts, read = _gather(self._parts), _gather(self._read)
        if not parts:
            return {}, np.empty((0, 0), np.int32)
        tokens = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        order = np.lexsort((tokens["column"], tokens["row"]))
        tokens = {name: values[order] for name, values in tokens.items()}
        rows = np.zeros((1 + max(part["row"].max() for part in read), self._job.args.seq_length), np.int32)
        for part in read:
            rows[part["row"], part["column"]] = part["token"]
        return tokens, rows[: 1 + tokens["row"].max()] if len(order) else rows[:0]  # fillers have no counted token


def collect_tokens(job: QADJob, chunks: Sequence[torch.nn.Module], teacher: Teacher) -> tuple[Arrays, np.ndarray]:
    """Evaluate a frozen model on the job's validation set. Returns ``TokenCollector.gather``. Collective."""
    args = job.args
    args.iteration = args.consumed_train_samples = args.consumed_valid_samples = 0
    _, iterator = data_iterators(job.datasets_provider, len(chunks))
    num_microbatches = args.eval_global_batch_size // (args.eval_micro_batch_size * args.data_parallel_size)
    shape = job.reader.schedule_shape(seq_length=args.seq_length, micro_batch_size=args.eval_micro_batch_size)
    collector = TokenCollector(job)

    def forward_step(batches: Iterator[Batch], model: torch.nn.Module):
        batch = next(batches)
        return job.student_pass(model, batch), partial(collector, batch, model)

    for i in range(args.eval_iters):
        batches = job.reader.read(iterator, num_microbatches, args.eval_micro_batch_size, args.seq_length)
        collector.begin(batches, i * num_microbatches)
        teacher.attach_outputs(batches, **shape, decoder_seq_length=None)
        with torch.no_grad():
            get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=iterators(batches, iterator),
                model=list(chunks),
                num_microbatches=num_microbatches,
                forward_only=True,
                **shape,
            )
        if (i + 1) % max(1, args.eval_iters // 10) == 0:
            print_rank_0(f"megatron_qad: evaluated {i + 1} of {args.eval_iters} iterations")
    return collector.gather()


def check_tokens(tokens: Arrays) -> None:
    """Check the tokens of an evaluation.

    Raises:
        QADError: there are none, or a metric is NaN or Inf.
    """
    if not tokens or not len(tokens["row"]):
        raise QADError("no token of the validation set counts in the loss, so there is nothing to evaluate.")
    for name in TOKEN_METRICS:
        if len(bad := np.flatnonzero(~np.isfinite(tokens[name]))):
            row, column = tokens["row"][bad[0]], tokens["column"][bad[0]]
            raise QADError(
                f"{name} is {tokens[name][bad[0]]} for {len(bad)} of {len(tokens['row'])} tokens, first in row {row}, "
                f"column {column}. Expected finite values: the model's weights or scales are damaged."
            )


def _places(batch: Batch, seq_length: int, first_row: int) -> dict[str, Tensor]:
    """Return the row and the column, among all rows, of this rank's tokens of a microbatch, int64 [tokens]."""
    group, documents = mpu.get_context_parallel_group(), batch.documents
    num_tokens = batch.tokens.numel() * group.size()
    index = torch.arange(num_tokens, device=batch.tokens.device).view(-1, seq_length)
    lengths = [seq_length]
    if documents is not None:
        index, lengths = index.view(1, -1), documents.document_lengths
    if group.size() > 1:
        index = take_chunks(index, lengths, group.rank(), group.size())
    index = index.flatten()
    return {"row": first_row + index // seq_length, "column": index % seq_length}


def _to_numpy(tensor: Tensor) -> np.ndarray:
    return tensor.to(torch.float32 if tensor.is_floating_point() else torch.int32).cpu().numpy()


def _gather(parts: list[Arrays]) -> list[Arrays]:
    """Return the parts of all ranks on rank 0. Collective."""
    gathered = [None] * torch.distributed.get_world_size() if torch.distributed.get_rank() == 0 else None
    torch.distributed.gather_object(parts, gathered)
    return [part for of_rank in gathered or () for part in of_rank]
