"""Torch layers for the local layer spec: what Megatron takes from Transformer Engine where that is not installed.

Only what Megatron has no torch version of: a norm that works with sequence parallelism, a hybrid stack whose final norm
is that norm, and a linear that every tensor-parallel rank holds whole. Other linears are Megatron's own.
"""

import torch
from megatron.core.models.hybrid.hybrid_block import HybridStack
from megatron.core.tensor_parallel import get_cuda_rng_tracker, get_data_parallel_rng_tracker_name


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm over the last axis, any floating dtype, statistics in float32.

    Megatron's ``WrappedTorchNorm`` refuses sequence parallelism; this marks its weight ``sequence_parallel`` so that
    Megatron all-reduces the weight's gradient over the tensor-parallel group, as Transformer Engine's does.
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
    """``HybridStack`` without Transformer Engine: the final norm, which upstream fixes to ``TENorm``, is
    ``RMSNorm``."""

    def __init__(self, config, *args, post_layer_norm: bool = True, **kwargs):
        super().__init__(config, *args, post_layer_norm=False, **kwargs)
        self.post_layer_norm = post_layer_norm
        if self.post_process and post_layer_norm:
            self.final_norm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)


class DuplicatedLinear(torch.nn.Linear):
    """Transformer Engine's ``TELinear`` in its mode "duplicated": [..., in] -> ([..., out], None), any floating dtype.

    Every tensor-parallel rank holds the whole weight. Under sequence parallelism each sees its own tokens, so the
    weight is marked for Megatron to all-reduce its gradient over the tensor-parallel group.
    """

    def __init__(self, input_size: int, output_size: int, *, config, init_method, bias: bool, **_of_other_modes):
        device = torch.cuda.current_device()
        super().__init__(input_size, output_size, bias=bias, device=device, dtype=config.params_dtype)
        with get_cuda_rng_tracker().fork(get_data_parallel_rng_tracker_name()):  # alike on all of them
            init_method(self.weight)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel

    def forward(self, x):
        return super().forward(x), None
