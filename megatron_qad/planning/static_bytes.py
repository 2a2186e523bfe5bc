"""Bytes of weights, gradients, optimizer state and scales on each pipeline rank, before any microbatch runs."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from megatron_qad.config.parallelism import is_row_parallel, ranks_of_layers, split_into_stages
from megatron_qad.formats.format_registry import FORMATS
from megatron_qad.models.families.base import ParamMapping
from megatron_qad.planning.layer_sizes import PlannedModel
from megatron_qad.planning.layout import Layout
from megatron_qad.quantization.scale_settings import ScaleSetting, moments_bytes


@dataclass(frozen=True)
class Numel:
    """Numbers of elements, by what divides them."""

    replicated: int = 0
    """On every tensor-parallel rank: norms, routers, projections to and from a latent space."""
    sharded: int = 0
    """Divided by tensor parallelism."""
    experts: int = 0
    """Of routed experts, divided by expert and expert tensor parallelism."""

    def __add__(self, other: "Numel") -> "Numel":
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Numel(*(a + b for a, b in pairs))

    def on_rank(self, layout: Layout) -> "RankNumel":
        """Return the elements on a rank, averaged over expert-parallel ranks."""
        dense = self.replicated + -(-self.sharded // layout.tp)
        return RankNumel(dense, -(-self.experts // (layout.ep * layout.etp)))


@dataclass(frozen=True)
class RankNumel:
    """Numbers of elements on one rank."""

    dense: int = 0
    """Outside of routed experts."""
    experts: int = 0
    """In routed experts."""

    def __add__(self, other: "RankNumel") -> "RankNumel":
        return RankNumel(self.dense + other.dense, self.experts + other.experts)

    @property
    def total(self) -> int:
        return self.dense + self.experts


def is_routed_expert(tensor: ParamMapping) -> bool:
    return ".experts.experts." in tensor.megatron


def _numel(tensor: ParamMapping) -> Numel:
    numel = prod(tensor.shape)
    if is_routed_expert(tensor):
        return Numel(experts=numel)
    is_replicated = tensor.kind in ("norm", "router") or "latent_proj" in tensor.megatron
    return Numel(replicated=numel) if is_replicated else Numel(sharded=numel)


class ModelParams:
    """Elements of a model's parameters by layer, counted once for many layouts.

    Example::

        ModelParams(model).on_ranks(Layout(tp=2, pp=4))[0].total  # elements on the first pipeline rank
    """

    def __init__(self, model: PlannedModel):
        self._pattern, self._is_tied = model.pattern, model.is_tied
        self._layers = [Numel() for _ in model.pattern]
        self._embedding = self._end = Numel()
        for tensor in model.tensors:
            if tensor.layer is not None:
                self._layers[tensor.layer] += _numel(tensor)
            elif tensor.kind == "embedding":
                self._embedding += _numel(tensor)
            else:
                self._end += _numel(tensor)

    @property
    def total(self) -> int:
        return sum(sum(vars(numel).values()) for numel in (*self._layers, self._embedding, self._end))

    def on_ranks(self, layout: Layout, num_virtual_stages: int | None = None) -> list[RankNumel]:
        """Return the elements on each pipeline rank. A tied output layer on another rank is a copy of the embedding."""
        stages = layout.pp * (layout.vpp if num_virtual_stages is None else num_virtual_stages)
        held = [Numel() for _ in range(layout.pp)]
        pattern = split_into_stages(self._pattern, stages)
        for rank, numel in zip(ranks_of_layers(pattern, layout.pp), self._layers, strict=True):
            held[rank] += numel
        held[0] += self._embedding
        held[-1] += self._end
        if self._is_tied and layout.pp > 1:
            held[-1] += self._embedding
        return [numel.on_rank(layout) for numel in held]

    def offloaded(self, layout: Layout) -> int:
        """Return an offloaded model's elements on a device: those outside of layers, and twice the largest layer."""
        outside = (self._embedding + self._end).on_rank(layout).total
        return outside + 2 * max(numel.on_rank(layout).total for numel in self._layers)


def training_state(params: RankNumel, layout: Layout) -> dict[str, int]:
    """Return the bytes of gradients and of Adam's state."""
    # Two moments, and a float32 master if the weights have 16 bits.
    per_param = 12 if layout.element_bytes == 2 else 8
    shards = (layout.dp * layout.cp, layout.num_expert_copies) if layout.distributed_optimizer else (1, 1)
    state = params.dense * per_param // shards[0] + params.experts * per_param // shards[1]
    return {"gradients": params.total * layout.gradient_bytes, "optimizer state": state}


class ScaleBytes:
    """Bytes that depend on how scales are obtained: frozen block scales, and input moments of ``local_hessian``.

    Args:
        formats, scales: of the linears, by Megatron weight name.
    """

    def __init__(self, model: PlannedModel, formats: Mapping[str, str], scales: Mapping[str, ScaleSetting]):
        self._pattern = model.pattern
        self._moments = [
            t for t in model.family.linears(model.hf) if t.megatron in scales and scales[t.megatron].needs_moments
        ]
        self._frozen = [Numel() for _ in model.pattern]
        self._frozen_outside = Numel()
        for linear in model.family.linears(model.hf):
            if linear.megatron in scales and scales[linear.megatron].is_frozen:
                numel = _frozen_numel(linear, FORMATS[formats[linear.megatron]].block_size)
                if linear.layer is None:
                    self._frozen_outside += numel
                else:
                    self._frozen[linear.layer] += numel

    def frozen(self, layout: Layout) -> list[int]:
        """Return the bytes of frozen scales on each pipeline rank: a byte per block, and the amax of each weight."""
        held = [Numel() for _ in range(layout.pp)]
        for rank, numel in zip(self._ranks(layout), self._frozen, strict=True):
            held[rank] += numel
        held[-1] += self._frozen_outside
        return [numel.on_rank(layout).total for numel in held]

    def moments(self, layout: Layout) -> list[int]:
        """Return the bytes of input moments on each pipeline rank, during the calibration."""
        held = [0] * layout.pp
        rank_of = self._ranks(layout) if self._moments else []
        for linear in self._moments:
            shards = layout.ep if is_routed_expert(linear) else 1
            if is_row_parallel(linear):
                shards *= layout.etp if is_routed_expert(linear) else layout.tp
            held[-1 if linear.layer is None else rank_of[linear.layer]] += moments_bytes(linear.shape[1]) // shards
        return held

    def _ranks(self, layout: Layout) -> list[int]:
        return ranks_of_layers(split_into_stages(self._pattern, layout.pp * layout.vpp), layout.pp)


def _frozen_numel(linear: ParamMapping, block_size: int) -> Numel:
    """Return the bytes of a weight's frozen scales; a float8 scale is a byte, an amax a float32."""
    blocks = prod(linear.shape) // block_size
    return Numel(experts=blocks + 4) if is_routed_expert(linear) else Numel(replicated=4, sharded=blocks)
