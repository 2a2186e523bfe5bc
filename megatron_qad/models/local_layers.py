"""Torch layers of the local layer spec, which replace Transformer Engine's where it is not installed.

They cover what Megatron has no torch version of: a norm that supports sequence parallelism, a hybrid stack with that
norm as its final norm, and a linear that is replicated on every tensor-parallel rank. Other linears are Megatron's.
"""

import torch
from megatron.core.models.hybrid.hybrid_block import HybridStack
from megatron.core.tensor_parallel import get_cuda_rng_tracker, get_data_parallel_rng_tracker_name


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm over the last dimension, for any floating dtype, with float32 statistics.

    Megatron's ``WrappedTorchNorm`` does not support sequence parallelism. Like Transformer Engine's norm, this one
    marks its weight ``sequence_parallel``, so that Megatron all-reduces the gradient over the tensor-parallel group.
    """

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **_unused_by_rms_norm):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x):
        return torch.nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


class LocalHybridStack(HybridStack):
    """``HybridStack`` without Transformer Engine. Its final norm is ``RMSNorm`` instead of Megatron's ``TENorm``."""

    def __init__(self, config, *args, post_layer_norm: bool = True, **kwargs):
        super().__init__(config, *args, post_layer_norm=False, **kwargs)
        self.post_layer_norm = post_layer_norm
        if self.post_process and post_layer_norm:
            self.final_norm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)


class DuplicatedLinear(torch.nn.Linear):
    """Replicated linear like Transformer Engine's ``TELinear`` in mode "duplicated", for any floating dtype.

    It maps [..., in] to ([..., out], None). Every tensor-parallel rank holds the full weight. Under sequence
    parallelism ranks see different tokens, so the weight is marked for Megatron to all-reduce its gradient.
    """

    def __init__(self, input_size: int, output_size: int, *, config, init_method, bias: bool, **_unused_in_this_mode):
        device = torch.cuda.current_device()
        super().__init__(input_size, output_size, bias=bias, device=device, dtype=config.params_dtype)
        with get_cuda_rng_tracker().fork(get_data_parallel_rng_tracker_name()):  # the same values on all ranks
            init_method(self.weight)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel

    def forward(self, x):
        return super().forward(x), None
