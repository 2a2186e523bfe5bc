"""Model output of one microbatch: logits, or final hidden states plus the output layer.

Hidden states are smaller than logits if H < V/tp, and a loss that is fused with the output layer needs nothing else.
``stopped_before_output_layer`` makes the last stage return them, and ``ModelOutput`` computes logits from them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.utils import unwrap_model
from torch import Tensor


@contextmanager
def stopped_before_output_layer(model: torch.nn.Module) -> Iterator[None]:
    """Context manager in which the last stage returns its final hidden states, after the final norm.

    They are [s, b, H], or [s/tp, b, H] under sequence parallelism. Other stages are not affected.
    """
    stage = unwrap_model(model)
    before, stage.post_process = stage.post_process, False  # of the model only: the stack still applies its final norm
    try:
        yield
    finally:
        stage.post_process = before


@dataclass(frozen=True)
class ModelOutput:
    """Output of the last stage for one microbatch."""

    tensor: Tensor
    """Logits [b, s, V/tp], or final hidden states as in ``stopped_before_output_layer``."""
    model: torch.nn.Module | None = None
    """Last stage that computed the hidden states. None means that ``tensor`` contains logits."""

    @property
    def width(self) -> int:
        """Number of logits per token on this rank, V/tp, including vocabulary padding."""
        return self.tensor.shape[-1] if self.model is None else len(self.weight)

    @property
    def weight(self) -> Tensor:
        """Weight of the output layer, [V/tp, H]; the embedding's weight if they are tied."""
        return self._shared_weight if self._is_tied else self.model.output_layer.weight

    def logits(self) -> Tensor:
        """Return the logits, [b, s, V/tp]."""
        if self.model is None:
            return self.tensor
        logits, _ = self.model.output_layer(self.tensor, weight=self._shared_weight if self._is_tied else None)
        return logits.transpose(0, 1).contiguous()

    def hidden(self) -> Tensor:
        """Return the input of the output layer, [b, s, H], complete on every tensor-parallel rank.

        It is quantized if that layer's input is. Under sequence parallelism its backward pass sums the gradient over
        the ranks.
        """
        layer, hidden = self.model.output_layer, self.tensor
        if layer.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, group=layer.tp_group)
        if hasattr(layer, "input_quantizer"):
            hidden = layer.input_quantizer(hidden)
        return hidden.transpose(0, 1)

    @property
    def sums_hidden_grad(self) -> bool:
        """Whether the backward pass of ``hidden`` sums the gradient over tensor-parallel ranks."""
        return self.model.output_layer.sequence_parallel

    @property
    def _is_tied(self) -> bool:
        return self.model.share_embeddings_and_output_weights

    @property
    def _shared_weight(self) -> Tensor:
        return self.model.shared_embedding_or_output_weight()
