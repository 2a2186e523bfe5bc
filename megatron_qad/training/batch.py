"""Microbatches on this rank, and forward passes of a model on them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from megatron.core import mpu
from torch import Tensor

from megatron_qad.models.context_parallel import Documents
from megatron_qad.models.output_layer import ModelOutput, stopped_before_output_layer
from megatron_qad.models.vision.image_merge import merged_features
from megatron_qad.training.image_features import JoinedImages, MicrobatchImages


@dataclass
class Batch:
    """One microbatch on this rank's device. Tensors are int64 [b, s/cp] unless noted; packed: [1, b * s/cp].

    Example::

        tokens = torch.tensor([[5, 7, 9]])
        batch = Batch(tokens, position_ids=torch.arange(3)[None])
        output = job.forward(model, batch)  # a ForwardPass; returns logits [1, 3, V/tp] on the last stage
    """

    tokens: Tensor | None = None
    position_ids: Tensor | None = None
    labels: Tensor | None = None
    loss_mask: Tensor | None = None
    """float32 [b, s/cp], weight of each label in the loss; 0 excludes it."""
    documents: Documents | None = None
    """Ends of the documents in a packed row. None means that each row is one sequence."""
    images: MicrobatchImages | None = None
    """Images of the rows, on the first stage. None: there are none."""
    after_image: Tensor | None = None
    """bool [b, s/cp], on the last stage: whether an image comes before the token in its document. None: no data of the
    job has images."""
    teacher_output: ModelOutput | None = None
    """Output of the teacher on the last stage, set by the teacher's pass and removed by the loss."""
    teacher_states: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    """Outputs of the teacher's layers on this rank, [s, b, H], for hidden-state losses."""


def round_up_to_pipeline(num_microbatches: int) -> int:
    """Round a number of microbatches up to a multiple of the pipeline size if there are virtual stages."""
    if mpu.get_virtual_pipeline_model_parallel_world_size() is None:
        return num_microbatches
    num_stages = mpu.get_pipeline_model_parallel_world_size()
    return -(-num_microbatches // num_stages) * num_stages


def num_calibration_batches(samples: int, micro_batch_size: int) -> int:
    """Return the microbatches per rank that calibrate with ``samples`` sequences, divided among data-parallel ranks.

    The total, and so the result of the calibration, does not depend on the number of ranks.
    """
    return round_up_to_pipeline(-(-samples // (micro_batch_size * mpu.get_data_parallel_world_size())))


class ForwardPass:
    """Runs forward passes of a job's models, and keeps track of the microbatch that is running.

    Args:
        keeps_precision: return outputs in the model's precision. Megatron's wrapper for 16-bit models would otherwise
            make a float32 copy of all logits.
    """

    def __init__(self, keeps_precision: bool):
        self._options = {"fp32_output": False} if keeps_precision else {}
        self._running: list[Batch] = []

    def __call__(self, model: torch.nn.Module, batch: Batch, *, hidden: bool = False) -> Tensor:
        """Run a model on a microbatch.

        Returns logits [b, s, V/tp] on the last stage, or its final hidden states if ``hidden`` (see
        ``models.output_layer``). Other stages return the hidden states for the next stage.
        """
        images = batch.images
        merge = merged_features(model, images.feature_index, images.features) if images else nullcontext()
        with self.running(batch), merge, stopped_before_output_layer(model) if hidden else nullcontext():
            return model(batch.tokens, batch.position_ids, None, packed_seq_params=batch.documents, **self._options)

    @contextmanager
    def running(self, batch: Batch) -> Iterator[None]:
        """Context manager: ``batch`` is the microbatch of the layers' forward passes inside."""
        self._running.append(batch)
        try:
            yield
        finally:
            self._running.pop()

    @property
    def batch(self) -> Batch:
        """The microbatch being processed, for hooks on layers."""
        return self._running[-1]


def join(batches: Sequence[Batch]) -> Batch:
    """Join several microbatches into one, for a forward pass without a loss; packed rows become one longer row."""
    if len(batches) == 1:
        return batches[0]
    documents = batches[0].documents
    if documents is not None:
        lengths = [length for batch in batches for length in batch.documents.document_lengths]
        documents = Documents.from_lengths(lengths, documents.cu_seqlens_q.device)
    if batches[0].tokens is None:
        return Batch(documents=documents)
    dim = 0 if documents is None else 1
    tokens, position_ids = (torch.cat([getattr(b, n) for b in batches], dim) for n in ("tokens", "position_ids"))
    images = None
    if any(batch.images is not None for batch in batches):
        images = JoinedImages([batch.images for batch in batches], [batch.tokens.shape for batch in batches], dim)
    return Batch(tokens, position_ids, documents=documents, images=images)


def iterators(batches: Sequence[Batch], data_iterator) -> Iterator[Batch] | list[Iterator[Batch]]:
    """Return ``batches`` in the form of the schedule's ``data_iterator``: an iterator, or one per virtual stage."""
    if isinstance(data_iterator, list):
        return [iter(batches) for _ in data_iterator]
    return iter(batches)
