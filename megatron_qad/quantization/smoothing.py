"""Outlier smoothing with power-of-two scales: fewer rounding errors, and the same model, bit for bit.

Sixteen values share an NVFP4 scale, so an outlier channel costs the others precision. As in SmoothQuant
(arXiv:2211.10438), a channel is divided by a factor in the weights that produce it (a norm's weight, the rows of an up
or value projection) and multiplied by it in the columns of the linears that consume it. Each block of 16 channels is
smoothed independently, without data from other blocks or ranks. Factors are powers of two, so no value is rounded.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from megatron.core.activations import squared_relu
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_qad.engine.errors import QADError
from megatron_qad.formats.format_registry import FORMATS
from megatron_qad.formats.nvfp4 import BLOCK_SIZE
from megatron_qad.quantization.names import named_modules_globally, of_expert

MIN_EXPERT_TOKENS = 16
"""Minimum number of tokens for which an expert's channel statistics are reliable. With fewer, it is not smoothed."""

_MIN_RELATIVE_SQUARE = 2.0**-16
"""Lower bound of a channel's mean square, relative to its block. A channel that was zero in calibration may change."""


@dataclass(frozen=True)
class Groups:
    """Process groups over which sums of squares are all-reduced, so that all ranks compute the same factors.

    None means one rank."""

    tensor_and_data: object = None
    """Tensor-, data- and context-parallel group."""
    data: object = None
    """Data- and context-parallel group."""
    expert_data: object = None
    """Group of the ranks that hold the same experts."""


@dataclass
class SmoothingPair:
    """An activation, the weight rows that produce it, and the columns of the linears that consume it.

    Args:
        name: global Megatron name of the consumer.
        rows: weight views that the factors divide, [channels, ...] (or [groups, channels per group, ...]).
        columns: weights [..., inputs] that the factors multiply.
        watch: registers a hook that calls its argument with the activation, [..., inputs]; returns the hook's handle.
        channel_of: channel index of each input column, int64 [inputs]. None means that column i reads channel i.
        power: exponent with which a row's factor reaches the columns (2 after a squared ReLU, else 1).
        group: process group over which the tokens of the activation are split.
        min_tokens: minimum number of observed tokens. With fewer, all factors are 1.
        consumers: regular expression that matches the names of all consumers. None means only ``name``.
    """

    name: str
    rows: Sequence[Tensor]
    columns: Sequence[Tensor]
    watch: Callable
    channel_of: Tensor | None = None
    power: int = 1
    group: object = None
    min_tokens: int = 1
    consumers: str | None = None
    _squares: Tensor | None = field(init=False, default=None)
    _num_tokens: int = field(init=False, default=0)

    def observe(self, x: Tensor) -> None:
        """Add the activation of a forward pass, [..., inputs], to the channel statistics."""
        x = x.detach().reshape(-1, x.shape[-1])
        squares = x.float().square().sum(0, dtype=torch.float64)
        self._squares = squares if self._squares is None else self._squares + squares
        self._num_tokens += len(x)

    def apply_(self, alpha: float) -> Tensor:
        """Apply the factors in place and return them, float32 [channels]. Collective over ``group``.

        Raises:
            QADError: the activation contained NaN or Inf.
        """
        inputs = self.columns[0].shape[-1]
        device = self.columns[0].device
        squares = torch.zeros(inputs, dtype=torch.float64, device=device) if self._squares is None else self._squares
        totals = torch.cat([squares, squares.new_tensor([self._num_tokens])])
        if self.group is not None and self.group.size() > 1:
            torch.distributed.all_reduce(totals, group=self.group)
        if not bool(totals.isfinite().all()):
            raise QADError(
                f"the input of {self.name} contains NaN or Inf; expected finite values. Look for them in the weights "
                "of the layers before it."
            )
        squares, num_tokens = totals[:-1], totals[-1]
        if num_tokens < self.min_tokens:
            squares = torch.zeros_like(squares)
        channel_of = torch.arange(inputs, device=device) if self.channel_of is None else self.channel_of
        squares = squares.new_zeros(int(channel_of.max()) + 1).index_add_(0, channel_of, squares)
        factors = block_factors(squares, alpha, self.power)
        for rows in self.rows:
            rows.data.div_(_broadcast_to_rows(factors.to(rows.dtype), rows))
        for weight in self.columns:
            weight.data.mul_((factors**self.power).to(weight.dtype)[channel_of])
        return factors


def block_factors(squares: Tensor, alpha: float, power: int = 1) -> Tensor:
    """Return the factor that divides each channel: ``rms**alpha`` relative to its block, rounded to a power of two.

    Args:
        squares: sums or means of squares, float64 [channels]. The number of channels is a multiple of 16.
        alpha: part of the range that moves from the input into the weights, from 0 (none) to 1 (all).
        power: exponent with which the factor reaches the consumer.

    Returns:
        float32 [channels], powers of two with a geometric mean near 1 in each block of 16; 1 in blocks of zeros.

    Example:
        >>> squares = torch.tensor([2.0**16] + [1.0] * 15, dtype=torch.float64)  # one outlier, rms 256
        >>> block_factors(squares, alpha=0.5)[:3]
        tensor([16.,  1.,  1.])
    """
    blocks = squares.view(-1, BLOCK_SIZE)
    largest = blocks.amax(1, keepdim=True)
    rms = torch.where(largest > 0, torch.maximum(blocks, largest * _MIN_RELATIVE_SQUARE), 1.0).log2() / 2
    relative = rms - rms.mean(1, keepdim=True)
    return torch.exp2((relative * (alpha / power)).round()).flatten().float()


def has_smoothed_input(fmt: str) -> bool:
    """Whether the inputs of a linear format have block scales of 16 values, so that smoothing helps."""
    number_format = FORMATS[fmt].input
    return number_format is not None and number_format.block_size == BLOCK_SIZE


class Smoothing:
    """The smoothing pairs of one model, over all its chunks on this rank.

    Args:
        chunks: model chunks of the local layer spec, whose norms are separate modules.
        formats: the format of every linear, by global Megatron weight name. Pairs without an NVFP4 input are left out.
        groups: process groups for the channel statistics.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], formats: Mapping[str, str], groups: Groups):
        self.pairs = [pair for chunk in chunks for pair in _pairs(chunk, formats, groups)]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Context manager that collects channel statistics from the forward passes inside it."""
        handles = [pair.watch(pair.observe) for pair in self.pairs]
        yield
        for handle in handles:
            handle.remove()

    @torch.no_grad()
    def apply_(self, alpha: float) -> dict[str, Tensor]:
        """Smooth the model in place and return the factors by consumer name."""
        return {pair.name: pair.apply_(alpha) for pair in self.pairs}


def _pairs(chunk: torch.nn.Module, formats: Mapping[str, str], groups: Groups) -> Iterator[SmoothingPair]:
    names = {id(module): name for name, module in named_modules_globally(chunk)}
    smoothed = {name.removesuffix(".weight") for name, fmt in formats.items() if has_smoothed_input(fmt)}
    for layer in unwrap_model(chunk).decoder.layers:
        for pair in _layer_pairs(layer, names, groups):
            # Match names from the policy, not local modules: experts on other ranks consume the same norm output.
            consumers = re.compile(pair.consumers or re.escape(pair.name))
            if any(map(consumers.fullmatch, smoothed)) and pair.columns[0].shape[-1] % BLOCK_SIZE == 0:
                yield pair


def _layer_pairs(layer: torch.nn.Module, names: dict[int, str], groups: Groups) -> Iterator[SmoothingPair]:
    norm_group = groups.tensor_and_data  # each rank has all channels of some tokens
    if (mixer := getattr(layer, "mixer", None)) is not None:
        yield _norm_pair(names[id(mixer.in_proj)], layer.norm, [mixer.in_proj], norm_group)
        yield _norm_pair(names[id(mixer.out_proj)], mixer.norm, [mixer.out_proj], groups.data)
    attention = getattr(layer, "self_attention", None)
    if hasattr(attention, "linear_qkv"):
        yield _norm_pair(names[id(attention.linear_qkv)], layer.input_layernorm, [attention.linear_qkv], norm_group)
        yield from _value_pairs(names[id(attention.linear_proj)], attention, groups)
    mlp = getattr(layer, "mlp", None)
    if hasattr(mlp, "router"):
        yield _moe_norm_pair(names[id(mlp)], layer.pre_mlp_layernorm, mlp, norm_group)
        yield from _expert_pairs(names[id(mlp.experts.linear_fc2)], mlp.experts, groups.expert_data)
        if mlp.shared_experts is not None:
            shared = mlp.shared_experts
            yield from _mlp_pairs(names[id(shared.linear_fc2)], shared, groups.data)
    elif hasattr(mlp, "linear_fc1"):
        yield _norm_pair(names[id(mlp.linear_fc1)], layer.pre_mlp_layernorm, [mlp.linear_fc1], norm_group)
        yield from _mlp_pairs(names[id(mlp.linear_fc2)], mlp, groups.data)


def _norm_pair(
    name: str, norm: torch.nn.Module, consumers: Sequence[torch.nn.Module], group, names: str | None = None
) -> SmoothingPair:
    def watch(observe):
        return norm.register_forward_hook(lambda _, inputs, output: observe(output))

    columns = [consumer.weight for consumer in consumers]
    return SmoothingPair(name, [norm.weight], columns, watch, group=group, consumers=names)


def _moe_norm_pair(name: str, norm: torch.nn.Module, moe: torch.nn.Module, group) -> SmoothingPair:
    """Return the pair of the norm before router, experts (or their latent projection) and shared experts."""
    latent = getattr(moe, "fc1_latent_proj", None)
    consumers = [moe.router, moe.experts.linear_fc1 if latent is None else latent]
    if moe.shared_experts is not None:
        consumers.append(moe.shared_experts.linear_fc1)
        assert moe.shared_experts.gate_weight is None, "not supported: a gate of the shared experts that reads the norm"
    routed = r"experts\.experts\.\d+\.linear_fc1" if latent is None else "fc1_latent_proj"
    return _norm_pair(name, norm, consumers, group, rf"{re.escape(name)}\.({routed}|shared_experts\.linear_fc1)")


def _value_pairs(name: str, attention: torch.nn.Module, groups: Groups) -> Iterator[SmoothingPair]:
    """Yield the pair of values and output projection. All query heads of a group read its value channels."""
    qkv, proj = attention.linear_qkv, attention.linear_proj
    size = attention.hidden_size_per_attention_head
    if size % BLOCK_SIZE:
        return
    num_groups = attention.num_query_groups_per_partition
    values = [
        tensor.view(num_groups, -1, size, *tensor.shape[1:])[:, -1]
        for tensor in (qkv.weight, qkv.bias)
        if tensor is not None
    ]
    channels = torch.arange(num_groups * size, device=proj.weight.device).view(num_groups, 1, size)
    channel_of = channels.expand(-1, proj.weight.shape[1] // (num_groups * size), -1).flatten()
    yield SmoothingPair(name, values, [proj.weight], _input_watcher(proj), channel_of, group=groups.data)


def _mlp_pairs(name: str, mlp: torch.nn.Module, group) -> Iterator[SmoothingPair]:
    """Yield the pair of the up projection, or of the single projection before a squared ReLU, and ``linear_fc2``."""
    fc1, fc2 = mlp.linear_fc1, mlp.linear_fc2
    if (power := _power(mlp.config)) is not None:
        inner = fc2.weight.shape[1]
        rows = [tensor[-inner:] for tensor in (fc1.weight, fc1.bias) if tensor is not None]  # after those of the gate
        yield SmoothingPair(name, rows, [fc2.weight], _input_watcher(fc2), power=power, group=group)


def _expert_pairs(name: str, experts: torch.nn.Module, group) -> Iterator[SmoothingPair]:
    """Yield the pair of ``_mlp_pairs`` for each local expert, whose activations are consecutive rows."""
    fc1, fc2 = experts.linear_fc1, experts.linear_fc2
    if (power := _power(experts.config)) is None:
        return
    for i in range(len(fc2.weight)):

        def watch(observe, i=i):
            return fc2.register_forward_pre_hook(lambda _, inputs: observe(inputs[0].split(inputs[1])[i]))

        up, down = fc1.weight.data[i, -fc2.weight.shape[2] :], fc2.weight.data[i]
        expert = of_expert(name, fc2.first_expert + i)
        yield SmoothingPair(expert, [up], [down], watch, power=power, group=group, min_tokens=MIN_EXPERT_TOKENS)


def _power(config) -> int | None:
    """Return the exponent with which a factor of the up projection reaches its output. None: it does not commute."""
    if config.gated_linear_unit:
        return 1
    return 2 if config.activation_func is squared_relu else None


def _input_watcher(linear: torch.nn.Module) -> Callable:
    return lambda observe: linear.register_forward_pre_hook(lambda _, inputs: observe(inputs[0]))


def _broadcast_to_rows(factors: Tensor, rows: Tensor) -> Tensor:
    """Reshape the factors to broadcast over ``rows``, whose leading dimensions hold the channels."""
    num_dims = 1
    while rows.shape[:num_dims].numel() < factors.numel():
        num_dims += 1
    return factors.view(*rows.shape[:num_dims], *[1] * (rows.dim() - num_dims))
