"""Floating-point operations of a model's forward pass, from its config alone.

Counted are the matrix products that the model needs, with two operations per multiplication and addition: linears, the
output layer, routers, attention to the tokens before each one, and Mamba's convolution and recurrence. Not counted:
norms, activation functions, softmax, rotary embeddings, quantization, vocabulary padding, and what an implementation
computes in addition (masked scores, Mamba's products within a chunk, recomputation).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import prod

from megatron_qad.models.families.base import Family, ParamMapping, QKVMapping
from megatron_qad.models.families.nemotron_h import MambaMapping

BACKWARD = 2
"""FLOPs of a backward pass in those of its forward pass: each product has two gradients."""


@dataclass(frozen=True)
class ForwardFlops:
    """FLOPs of one forward pass, by what they grow with.

    Example::

        model = forward_flops(family_of(config), config)
        model.of([4096] * 8)  # 8 sequences of 4096 tokens
        3 * model.of([4096])  # forward and backward pass
    """

    per_token: int
    """All that grows with the number of tokens."""
    per_pair: int
    """Attention, per pair of a query and a key, summed over the layers."""

    def of(self, lengths: Sequence[int]) -> int:
        """Return the FLOPs for sequences, or for the documents of packed rows, of these lengths in tokens."""
        return self.of_sums(sum(lengths), sum(length**2 for length in lengths))

    def of_sums(self, num_tokens: int, sum_of_squares: int) -> int:
        """Return the FLOPs, given the sums of all lengths and of their squares.

        A sequence of s tokens has s (s + 1) / 2 pairs, because a token attends to itself and to those before it.
        """
        return self.per_token * num_tokens + self.per_pair * (sum_of_squares + num_tokens) // 2


def forward_flops(family: Family, hf_config: dict) -> ForwardFlops:
    """Return the FLOPs of a forward pass of the whole model.

    Args:
        hf_config: content of the model's config.json.
    """
    args, tensors = family.megatron_args(hf_config), family.tensors(hf_config)
    expert_share = args.get("moe-router-topk", 1), args.get("num-experts", 1)
    linears = [*family.linears(hf_config), *(t for t in tensors if t.kind == "router" and len(t.shape) == 2)]
    per_token = sum(_linear(tensor, *expert_share) for tensor in linears)
    per_token += sum(_mamba(tensor, args["mamba-state-dim"]) for tensor in tensors if isinstance(tensor, MambaMapping))
    return ForwardFlops(int(per_token), sum(_attention(tensor) for tensor in linears))


def _linear(tensor: ParamMapping, top_k: int, num_experts: int) -> Fraction | int:
    """Return the FLOPs per token of a weight [out, in], of which a routed expert's is used by a share of the tokens.

    All experts of a layer have the same shape, so the sum over them is a whole number.
    """
    flops = 2 * prod(tensor.shape)
    if ".experts.experts." not in tensor.megatron:
        return flops
    return Fraction(flops * top_k, num_experts)


def _attention(tensor: ParamMapping) -> int:
    """Return the FLOPs per pair of a layer, given its QKV projection: scores, and their product with the values."""
    return 4 * tensor.num_heads * tensor.head_dim if isinstance(tensor, QKVMapping) else 0


def _mamba(tensor: MambaMapping, state_dim: int) -> int:
    """Return the FLOPs per token of a Mamba layer, between its projections, from one of two tensors.

    Convolution: a product with a window of inputs per channel. Recurrence: the token's outer product x B^T, added to
    the state [heads, head dim, state dim], and the state's product with C.
    """
    if tensor.kind == "conv1d":
        return 2 * prod(tensor.shape) if tensor.megatron.endswith(".weight") else 0
    inner = dict(zip(tensor.parts, tensor.rows, strict=True))["x"]
    return 4 * inner * state_dim
