"""What a model leaves of a microbatch: logits, or final hidden states and, beside them, the layer that turns them into
logits.

Hidden states are smaller than logits wherever H < V/tp, and a loss that is fused with the output layer needs nothing
else. ``stopped_before_output_layer`` makes a last stage return them; ``ModelOutput`` goes on from there.
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
    """A last stage returns its final hidden states, after the final norm: [s, b, H], under sequence parallelism
    [s/tp, b, H]. Other stages return what they always do."""
    stage = unwrap_model(model)
    before, stage.post_process = stage.post_process, False  # of the model only: the stack still ends with its norm
    try:
        yield
    finally:
        stage.post_process = before


@dataclass(frozen=True)
class ModelOutput:
    """A last stage's output of one microbatch."""

    tensor: Tensor
    """Logits [b, s, V/tp], or final hidden states as ``stopped_before_output_layer`` leaves them."""
    model: torch.nn.Module | None = None
    """Of hidden states: the last stage that they are from. None: ``tensor`` are logits."""

    @property
    def width(self) -> int:
        """V/tp, padding included."""
        return self.tensor.shape[-1] if self.model is None else len(self.weight)

    @property
    def weight(self) -> Tensor:
        """The output layer's [V/tp, H]; the embedding's where the two are tied."""
        return self._shared_weight if self._is_tied else self.model.output_layer.weight

    def logits(self) -> Tensor:
        """[b, s, V/tp]."""
        if self.model is None:
            return self.tensor
        logits, _ = self.model.output_layer(self.tensor, weight=self._shared_weight if self._is_tied else None)
        return logits.transpose(0, 1).contiguous()

    def hidden(self) -> Tensor:
        """The output layer's input [b, s, H], whole on every tensor-parallel rank, and quantized where that layer's
        input is. Under sequence parallelism the gradient of this is summed over the ranks by its own backward pass."""
        layer, hidden = self.model.output_layer, self.tensor
        if layer.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, group=layer.tp_group)
        if hasattr(layer, "input_quantizer"):
            hidden = layer.input_quantizer(hidden)
        return hidden.transpose(0, 1)

    @property
    def sums_hidden_grad(self) -> bool:
        """Whether the gradient of ``hidden`` is summed over tensor-parallel ranks by ``hidden`` itself."""
        return self.model.output_layer.sequence_parallel

    @property
    def _is_tied(self) -> bool:
        return self.model.share_embeddings_and_output_weights

    @property
    def _shared_weight(self) -> Tensor:
        return self.model.shared_embedding_or_output_weight()
