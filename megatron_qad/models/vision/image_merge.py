"""Merges the features of images into a model's token embeddings.

Each token has a feature index: -1 for text, else the row of the feature that takes the token's place. It is split for
context parallelism like the tokens. The model embeds all tokens, splits them for sequence parallelism, and then the
rows of this rank that belong to images are overwritten. The gradient of the embedding is zero there.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core import mpu
from megatron.core.utils import unwrap_model
from torch import Tensor


@contextmanager
def merged_features(model: torch.nn.Module, feature_index: Tensor, features: Tensor) -> Iterator[None]:
    """Context manager: forward passes of ``model`` inside it see features in place of the embeddings of placeholders.

    Args:
        model: a chunk of a ``HybridModel``, wrapped or not. One without an embedding is left as it is.
        feature_index: int64 [b, s/cp], row of ``features`` for each token of this rank, -1 for text.
        features: [n, hidden], n > 0, without gradients.
    """
    embedding = getattr(unwrap_model(model), "embedding", None)
    if embedding is None:
        yield
        return

    def overwrite(_module, _inputs, output: Tensor) -> Tensor:
        # [s/cp, b], as the embeddings. Stages send tensors with the strides that the result gets from this one.
        index = feature_index.t().contiguous()
        if output.shape[0] != index.shape[0]:  # sequence parallelism
            index = index.chunk(mpu.get_tensor_model_parallel_world_size())[mpu.get_tensor_model_parallel_rank()]
        rows = features[index.clamp(min=0)].to(output.dtype)
        return torch.where((index >= 0).unsqueeze(-1), rows, output)

    handle = embedding.register_forward_hook(overwrite)
    try:
        yield
    finally:
        handle.remove()
