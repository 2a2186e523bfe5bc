"""In-place fake quantization (NVFP4, FP8, INT4) of the student's weights, once per optimizer step.

The optimizer holds the high-precision masters, so the parameter itself can hold ``fake_quant(bf16(master))``. The
straight-through estimator is then exact and free, because the gradient of the parameter is the gradient of the master,
and no weight quantizer runs in a forward pass. Weights are quantized inside ``quantized_weights()``, which spans one
schedule (all microbatches); the next ``optimizer.step`` overwrites them from its masters. Between two steps they are
quantized only once, even if evaluations run, because quantizing twice could change a weight: NVFP4 is not idempotent
where block scales are subnormal.

In float32 training Megatron's optimizer has no separate masters: the parameters are the masters. In that case
``quantized_weights`` keeps a copy and restores it afterwards."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from megatron_qad.formats.format import NumberFormat, check_columns
from megatron_qad.formats.format_registry import FORMATS, UNQUANTIZED
from megatron_qad.formats.nvfp4_multi_tensor import amax_list
from megatron_qad.quantization.names import (
    LinearWeight,
    WeightViews,
    is_expert,
    linear_weights,
    named_modules_globally,
)


class InPlaceWeights:
    """The quantized weights of one student, over all its model chunks on this rank.

    Args:
        chunks: model chunks, wrapped or not.
        formats: the format of every linear, by global Megatron weight name (``policy.resolve``).
        tp_group: tensor-parallel group, over which the shards of a weight share its global scale. None means one rank.
        expert_tp_group: tensor-parallel group of the experts. None means ``tp_group``.
        scale_rule: how NVFP4 block scales are chosen, one of ``block_scales.SCALE_RULES``.

    Raises:
        QADError: the number of columns of a weight's shard is not a multiple of its format's block size.

    Example:
        >>> weights = InPlaceWeights(chunks, formats, tp_group)
        >>> with weights.quantized_weights(then_updated=True):
        ...     run_microbatches(chunks)
        >>> optimizer.step()
    """

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        formats: dict[str, str],
        tp_group=None,
        scale_rule: str = "max",
        expert_tp_group=None,
    ):
        self.scale_rule = scale_rule
        linears: dict[str, LinearWeight] = {}
        self._number_formats: dict[str, NumberFormat] = {}
        for chunk in chunks:
            for module_name, module in named_modules_globally(chunk):
                if not isinstance(getattr(module, "weight", None), torch.nn.Parameter):
                    continue
                for name, weight in linear_weights(module_name, module).items():
                    number_format = FORMATS[formats.get(name, UNQUANTIZED.name)].weight
                    if number_format is not None:
                        check_columns(name, module.weight.shape[-1], number_format)
                        linears[name] = weight
                        self._number_formats[name] = number_format
        self.formats = {name: number_format.name for name, number_format in self._number_formats.items()}
        """Names of the weights' number formats, by global Megatron weight name."""
        self.linears = {name: linears[name] for name in sorted(linears, key=is_expert)}
        """Where each weight is stored, by global Megatron name. Experts are last, so that each tensor-parallel group
        has a contiguous range."""
        self.weights = WeightViews(self.linears)
        """The weights [out, in] themselves, in the same order."""
        first_expert = sum(not is_expert(name) for name in self.weights)
        ranges = ((tp_group, slice(first_expert)), (expert_tp_group or tp_group, slice(first_expert, None)))
        self._sharded_ranges = [
            (group, indices)
            for group, indices in ranges
            if group is not None and group.size() > 1 and list(self.weights)[indices]  # same on all ranks
        ]
        self.num_quantizations = 0
        """Number of times the weights have been quantized, once per optimizer step."""
        self.seconds = 0.0
        """Total wall time spent on quantization in this process, in seconds."""
        self._may_be_quantized = True  # a checkpoint may contain quantized weights
        self.is_stale = True
        """Whether the next ``quantized_weights`` must quantize, because the weights have changed since the last one."""

    @contextmanager
    def quantized_weights(self, *, then_updated: bool) -> Iterator[None]:
        """Context manager that quantizes the weights if they are stale, and restores float32 masters on exit.

        Args:
            then_updated: whether an optimizer step follows the block (training), after which the weights are stale.
        """
        float32 = [name for name, linear in self.linears.items() if linear.parameter.dtype == torch.float32]
        masters = {name: self.weights[name].detach().clone() for name in float32}
        if self.is_stale:
            self.quantize_()
        self.is_stale = then_updated or bool(masters)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, master in masters.items():
                    self.weights[name].copy_(master)

    def were_not_updated(self) -> None:
        """Record that the announced optimizer step was skipped: 16-bit weights are still quantized, and quantizing
        again could change one. Float32 weights were restored and stay stale."""
        self.is_stale = any(linear.parameter.dtype == torch.float32 for linear in self.linears.values())

    def were_loaded(self) -> None:
        """Record that the weights come from a checkpoint, which may contain quantized ones."""
        self.is_stale = self._may_be_quantized = True

    @torch.no_grad()
    def quantize_(self) -> None:
        """Fake-quantize every weight in place, with one all-reduce of the amaxes per tensor-parallel group.

        Raises:
            QADError: a weight contains NaN or Inf. The message names it.
        """
        if not self.weights:
            return
        start = time.perf_counter()
        amaxes = dict(zip(self.weights, self.amaxes(), strict=True))
        for number_format in sorted(set(self._number_formats.values()), key=lambda fmt: fmt.name):
            names = [name for name in self.weights if self._number_formats[name] is number_format]
            self._quantize_format(number_format, names, torch.stack([amaxes[name] for name in names]))
        self._may_be_quantized = False
        self.num_quantizations += 1
        self.seconds += time.perf_counter() - start

    @torch.no_grad()
    def quantized_copies(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the name and a quantized copy, [out, in], of each weight without changing it.

        The first step is collective over the tensor-parallel groups."""
        amaxes = self.amaxes()
        for i, (name, weight) in enumerate(self.weights.items()):
            number_format, copy = self._number_formats[name], weight.detach().clone()
            scale = number_format.scales_from_amaxes(amaxes[i : i + 1], [name], self.scale_rule)
            number_format.fake_quant_list_([copy], scale, [name], self.scale_rule)
            yield name, copy

    def _quantize_format(self, number_format: NumberFormat, names: list[str], amaxes: torch.Tensor) -> None:
        scales = number_format.scales_from_amaxes(amaxes, names, self.scale_rule)
        tensors = [self.weights[name].data for name in names]
        if self._may_be_quantized:
            todo = [
                i
                for i, (w, name) in enumerate(zip(tensors, names, strict=True))
                if not number_format.is_representable(w, scales[i], name=name)
            ]
            tensors, names, scales = [tensors[i] for i in todo], [names[i] for i in todo], scales[todo]
        number_format.fake_quant_list_(tensors, scales, names, self.scale_rule)

    def amaxes(self) -> torch.Tensor:
        """Return the amax of each weight over its tensor-parallel shards, float32 [num_weights]."""
        amaxes = amax_list([weight.data for weight in self.weights.values()])
        for group, indices in self._sharded_ranges:
            # A max all-reduce ignores NaN on some backends. Replacing it with Inf makes it visible to all ranks.
            shared = torch.where(amaxes[indices].isnan(), torch.inf, amaxes[indices])
            torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MAX, group=group)
            amaxes[indices] = shared
        return amaxes
