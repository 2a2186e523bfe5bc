"""Smoothing: inputs and weights that round better, in a model that computes what it computed before, bit for bit.

Sixteen values share an NVFP4 scale, so that one large channel takes the others' bits. What a channel is multiplied by
where it is made (the weight of a norm, the rows of an up or a value projection) may be divided out where it is read
(the columns of the linears behind): ``SmoothQuant`` (arXiv:2211.10438) moves scales so. Here each 16-element block
does it by itself, which needs nothing of other blocks or ranks, and factors are powers of two, which no float rounds.
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
from megatron_qad.quantization.activations import MIN_EXPERT_TOKENS
from megatron_qad.quantization.names import named_modules_globally

_SMALLEST = 2.0**-16
"""Of a block's largest mean square: channels below count as this. One that calibration never saw alive may wake."""


@dataclass(frozen=True)
class Groups:
    """Process groups over which a sum of squares is completed, in one all-reduce, so that all their ranks find the same
    bits; None: one rank."""

    tensor_and_data: object = None
    """Tensor, data and context parallel."""
    data: object = None
    """Data and context parallel."""
    expert_data: object = None
    """Ranks that hold the same experts."""


@dataclass
class SmoothingPair:
    """One tensor between two places of a model: made by rows, read by columns of linears.

    Args:
        name: global Megatron name of what reads it.
        rows: views that the factors divide, [channels, ...] (or [groups, channels of one, ...]).
        columns: weights [out, inputs] that they multiply.
        watch: calls its argument with the tensor, [..., inputs], in every forward pass, until the handle is removed.
        channel_of: int64 [inputs], the channel that each input column reads; None: its own.
        power: how often a row's factor arrives at the columns (2 behind a squared ReLU).
        group: the ranks over which the tensor's rows are spread.
        min_tokens: with fewer, nothing is exchanged.
        consumers: regular expression of the names of all linears that read it; None: ``name`` alone.
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
        """Add the tensor of a forward pass, [..., inputs], to what is known of its channels."""
        x = x.detach().reshape(-1, x.shape[-1])
        squares = x.float().square().sum(0, dtype=torch.float64)
        self._squares = squares if self._squares is None else self._squares + squares
        self._num_tokens += len(x)

    def apply_(self, alpha: float) -> Tensor:
        """Move the scales; return the factors, float32 [channels]. Collective over ``group``.

        Raises:
            QADError: the tensor held NaN or Inf.
        """
        inputs = self.columns[0].shape[1]
        device = self.columns[0].device
        squares = torch.zeros(inputs, dtype=torch.float64, device=device) if self._squares is None else self._squares
        seen = torch.cat([squares, squares.new_tensor([self._num_tokens])])
        if self.group is not None and self.group.size() > 1:
            torch.distributed.all_reduce(seen, group=self.group)
        if not bool(seen.isfinite().all()):
            raise QADError(f"the input of {self.name} held NaN or Inf. Look for them in the weights before it")
        squares, num_tokens = seen[:-1], seen[-1]
        if num_tokens < self.min_tokens:
            squares = torch.zeros_like(squares)
        channel_of = torch.arange(inputs, device=device) if self.channel_of is None else self.channel_of
        squares = squares.new_zeros(int(channel_of.max()) + 1).index_add_(0, channel_of, squares)
        factors = block_factors(squares, alpha, self.power)
        for rows in self.rows:
            rows.data.div_(_over_rows(factors.to(rows.dtype), rows))
        for weight in self.columns:
            weight.data.mul_((factors**self.power).to(weight.dtype)[channel_of])
        return factors


def block_factors(squares: Tensor, alpha: float, power: int = 1) -> Tensor:
    """By what each channel is divided where it is made: ``rms**alpha``, relative to its block, as a power of two.

    Args:
        squares: float64 [channels], sums or means of squares; a multiple of 16 channels.
        alpha: 0 moves nothing, 1 all of the input's range into the weights.
        power: how often the factor arrives at the reader.

    Returns:
        float32 [channels], powers of two with a geometric mean near 1 in each block of 16; 1 in blocks of zeros.
    """
    blocks = squares.view(-1, BLOCK_SIZE)
    largest = blocks.amax(1, keepdim=True)
    rms = torch.where(largest > 0, torch.maximum(blocks, largest * _SMALLEST), 1.0).log2() / 2
    relative = rms - rms.mean(1, keepdim=True)
    return torch.exp2((relative * (alpha / power)).round()).flatten().float()


def has_smoothed_input(fmt: str) -> bool:
    """Whether 16 values of the input share a scale in the linear format of this name, so that smoothing helps."""
    number_format = FORMATS[fmt].input
    return number_format is not None and number_format.block_size == BLOCK_SIZE


class Smoothing:
    """The pairs of one model, over all its chunks on this rank.

    Args:
        chunks: model chunks of the local layer spec, whose norms are modules of their own.
        formats: format of every linear, by global Megatron weight name: what no NVFP4 input reads stays as it is.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], formats: Mapping[str, str], groups: Groups):
        self.pairs = [found for chunk in chunks for found in _pairs(chunk, formats, groups)]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Forward passes in this block are what smoothing knows of the channels."""
        handles = [pair.watch(pair.observe) for pair in self.pairs]
        yield
        for handle in handles:
            handle.remove()

    @torch.no_grad()
    def apply_(self, alpha: float) -> dict[str, Tensor]:
        """Move the scales of the whole model in place; the factors by the reader's name."""
        return {pair.name: pair.apply_(alpha) for pair in self.pairs}


def _pairs(chunk: torch.nn.Module, formats: Mapping[str, str], groups: Groups) -> Iterator[SmoothingPair]:
    names = {id(module): name for name, module in named_modules_globally(chunk)}
    rounds = {name.removesuffix(".weight") for name, fmt in formats.items() if has_smoothed_input(fmt)}
    for layer in unwrap_model(chunk).decoder.layers:
        for pair in _of_layer(layer, names, groups):
            # By name and not by what this rank holds: experts of other ranks read the same norm.
            consumers = re.compile(pair.consumers or re.escape(pair.name))
            if any(map(consumers.fullmatch, rounds)) and pair.columns[0].shape[1] % BLOCK_SIZE == 0:
                yield pair


def _of_layer(layer: torch.nn.Module, names: dict[int, str], groups: Groups) -> Iterator[SmoothingPair]:
    whole = groups.tensor_and_data  # each rank has all channels of some tokens
    if (mixer := getattr(layer, "mixer", None)) is not None:
        yield _behind_norm(names[id(mixer.in_proj)], layer.norm, [mixer.in_proj], whole)
        yield _behind_norm(names[id(mixer.out_proj)], mixer.norm, [mixer.out_proj], groups.data)
    attention = getattr(layer, "self_attention", None)
    if hasattr(attention, "linear_qkv"):
        yield _behind_norm(names[id(attention.linear_qkv)], layer.input_layernorm, [attention.linear_qkv], whole)
        yield from _behind_values(names[id(attention.linear_proj)], attention, groups)
    mlp = getattr(layer, "mlp", None)
    if hasattr(mlp, "router"):
        yield _before_experts(names[id(mlp)], layer.pre_mlp_layernorm, mlp, whole)
        for expert in mlp.experts.local_experts:
            yield from _within_mlp(names[id(expert.linear_fc2)], expert, groups.expert_data, MIN_EXPERT_TOKENS)
        if mlp.shared_experts is not None:
            shared = mlp.shared_experts
            yield from _within_mlp(names[id(shared.linear_fc2)], shared, groups.data)
    elif hasattr(mlp, "linear_fc1"):
        yield _behind_norm(names[id(mlp.linear_fc1)], layer.pre_mlp_layernorm, [mlp.linear_fc1], whole)
        yield from _within_mlp(names[id(mlp.linear_fc2)], mlp, groups.data)


def _behind_norm(
    name: str, norm: torch.nn.Module, consumers: Sequence[torch.nn.Module], group, names: str | None = None
) -> SmoothingPair:
    def watch(observe):
        return norm.register_forward_hook(lambda _, inputs, output: observe(output))

    columns = [consumer.weight for consumer in consumers]
    return SmoothingPair(name, [norm.weight], columns, watch, group=group, consumers=names)


def _before_experts(name: str, norm: torch.nn.Module, moe: torch.nn.Module, group) -> SmoothingPair:
    """The norm that router, experts (or the projection into their space) and shared experts read."""
    latent = getattr(moe, "fc1_latent_proj", None)
    consumers = [moe.router] + ([latent] if latent is not None else [e.linear_fc1 for e in moe.experts.local_experts])
    if moe.shared_experts is not None:
        consumers.append(moe.shared_experts.linear_fc1)
        assert moe.shared_experts.gate_weight is None, "a gate of the shared experts reads the norm, too"
    routed = r"experts\.experts\.\d+\.linear_fc1" if latent is None else "fc1_latent_proj"
    return _behind_norm(name, norm, consumers, group, rf"{re.escape(name)}\.({routed}|shared_experts\.linear_fc1)")


def _behind_values(name: str, attention: torch.nn.Module, groups: Groups) -> Iterator[SmoothingPair]:
    """A value channel is read by all query heads of its group."""
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
    yield SmoothingPair(name, values, [proj.weight], _input_of(proj), channel_of, group=groups.data)


def _within_mlp(name: str, mlp: torch.nn.Module, group, min_tokens: int = 1) -> Iterator[SmoothingPair]:
    """Rows of the up projection, or of the only one before a squared ReLU."""
    fc1, fc2 = mlp.linear_fc1, mlp.linear_fc2
    power = 1 if mlp.config.gated_linear_unit else 2
    if power == 2 and mlp.config.activation_func is not squared_relu:
        return  # no factor passes through another activation
    inner = fc2.weight.shape[1]
    rows = [tensor[-inner:] for tensor in (fc1.weight, fc1.bias) if tensor is not None]  # behind the gate's
    watch = _input_of(fc2)
    yield SmoothingPair(name, rows, [fc2.weight], watch, power=power, group=group, min_tokens=min_tokens)


def _input_of(linear: torch.nn.Module) -> Callable:
    return lambda observe: linear.register_forward_pre_hook(lambda _, inputs: observe(inputs[0]))


def _over_rows(factors: Tensor, rows: Tensor) -> Tensor:
    """The factors in the shape of the leading axes of ``rows`` that count channels, for broadcasting over the rest."""
    leading = 1
    while rows.shape[:leading].numel() < factors.numel():
        leading += 1
    return factors.view(*rows.shape[:leading], *[1] * (rows.dim() - leading))
