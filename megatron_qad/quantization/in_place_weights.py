"""The student's weights on their format's grid (NVFP4, FP8), in place, once per optimizer step.

The optimizer holds the high-precision masters, so the parameter itself can hold ``fake_quant(bf16(master))``: the
straight-through estimator is then exact and free, since the gradient of the parameter is the gradient of the master,
and no weight quantizer runs in any forward pass. Inside ``quantized_weights()``, which spans one schedule (all
microbatches), the weights are quantized; the next ``optimizer.step`` overwrites them from its masters. Between two
steps they are quantized once, whatever evaluations run: NVFP4 is not idempotent where block scales are subnormal, so
that quantizing twice could move a weight.

In float32 training Megatron's optimizer keeps no masters: the parameters are the masters. There ``quantized_weights``
keeps a copy and restores it afterwards."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from megatron_qad.engine.errors import QADError
from megatron_qad.formats.format import NumberFormat
from megatron_qad.formats.format_registry import FORMATS, UNQUANTIZED
from megatron_qad.formats.nvfp4_multi_tensor import amax_list
from megatron_qad.quantization.names import is_expert, named_modules_globally


class InPlaceWeights:
    """The quantized weights of one student, over all its model chunks on this rank.

    Args:
        chunks: model chunks, wrapped or not.
        formats: format of every linear, by global Megatron weight name (``policy.resolve``).
        tp_group: tensor-parallel group; a weight's global scale is shared by its shards. None: one rank.
        expert_tp_group: that of the experts, whose tensor parallelism may be another. None: ``tp_group``.
        scale_rule: how NVFP4 block scales are chosen, one of ``nvfp4.SCALE_RULES``.

    Raises:
        QADError: a weight's shard has a number of columns that its format's blocks do not divide.
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
        found: dict[str, torch.nn.Parameter] = {}
        self._number_formats: dict[str, NumberFormat] = {}
        for chunk in chunks:
            for name, module in named_modules_globally(chunk):
                number_format = FORMATS[formats.get(f"{name}.weight", UNQUANTIZED.name)].weight
                if number_format is not None:
                    _check_columns(f"{name}.weight", module.weight, number_format)
                    found[f"{name}.weight"] = module.weight
                    self._number_formats[f"{name}.weight"] = number_format
        self.formats = {name: number_format.name for name, number_format in self._number_formats.items()}
        """Name of each weight's number format."""
        self.weights = {name: found[name] for name in sorted(found, key=is_expert)}
        """By global Megatron name, the experts' last: one run of them a tensor-parallel group."""
        experts_from = sum(not is_expert(name) for name in self.weights)
        runs = ((tp_group, slice(experts_from)), (expert_tp_group or tp_group, slice(experts_from, None)))
        self._shards = [
            (group, run)
            for group, run in runs
            if group is not None and group.size() > 1 and list(self.weights)[run]  # on all ranks or on none of a group
        ]
        self.num_quantizations = 0
        """How often the weights have been quantized: once per optimizer step."""
        self.seconds = 0.0
        """What quantizing has taken so far, wall time of this process."""
        self._may_be_on_grid = True  # a checkpoint may have been saved on the grid
        self.is_stale = True
        """Whether the next ``quantized_weights`` quantizes: the optimizer has written the weights since the last
        one."""

    @contextmanager
    def quantized_weights(self, *, then_updated: bool) -> Iterator[None]:
        """Quantize, run the block, and leave the parameters to the optimizer (or restore float32 ones).

        Args:
            then_updated: an optimizer step follows the block (training), so that the weights must be quantized again.
        """
        masters = {name: w.detach().clone() for name, w in self.weights.items() if w.dtype == torch.float32}
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
        """The optimizer step that was announced did not happen: the weights are still on the grid, where quantizing
        them again could move one (float32 ones were restored)."""
        self.is_stale = any(w.dtype == torch.float32 for w in self.weights.values())

    def were_loaded(self) -> None:
        """The weights are those of a checkpoint, which may have been saved on the grid."""
        self.is_stale = self._may_be_on_grid = True

    @torch.no_grad()
    def quantize_(self) -> None:
        """Replace every weight by its fake-quantized self. The amaxes of all weights travel in one all-reduce.

        Raises:
            QADError: a weight holds NaN or Inf; named.
        """
        if not self.weights:
            return
        began = time.perf_counter()
        amaxes = dict(zip(self.weights, self.amaxes(), strict=True))
        for number_format in sorted(set(self._number_formats.values()), key=lambda fmt: fmt.name):
            names = [name for name in self.weights if self._number_formats[name] is number_format]
            self._quantize_format(number_format, names, torch.stack([amaxes[name] for name in names]))
        self._may_be_on_grid = False
        self.num_quantizations += 1
        self.seconds += time.perf_counter() - began

    @torch.no_grad()
    def quantized_copies(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and what that weight is on its grid, [out, in], one at a time; the weights stay as they are. Collective
        at the first."""
        amaxes = self.amaxes()
        for i, (name, weight) in enumerate(self.weights.items()):
            number_format, copy = self._number_formats[name], weight.detach().clone()
            scale = number_format.scales_from_amaxes(amaxes[i : i + 1], [name])
            number_format.fake_quant_list_([copy], scale, [name], self.scale_rule)
            yield name, copy

    def _quantize_format(self, number_format: NumberFormat, names: list[str], amaxes: torch.Tensor) -> None:
        scales = number_format.scales_from_amaxes(amaxes, names)
        tensors = [self.weights[name].data for name in names]
        if self._may_be_on_grid:
            off = [
                i
                for i, (w, name) in enumerate(zip(tensors, names, strict=True))
                if not number_format.is_representable(w, scales[i], name=name)
            ]
            tensors, names, scales = [tensors[i] for i in off], [names[i] for i in off], scales[off]
        number_format.fake_quant_list_(tensors, scales, names, self.scale_rule)

    def amaxes(self) -> torch.Tensor:
        """float32 [weights]: the largest magnitude of each whole weight, over its tensor-parallel shards."""
        amaxes = amax_list([weight.data for weight in self.weights.values()])
        for group, run in self._shards:
            # max ignores NaN on some backends: make it infinite, so that no rank misses another's.
            shared = torch.where(amaxes[run].isnan(), torch.inf, amaxes[run])
            torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MAX, group=group)
            amaxes[run] = shared
        return amaxes


def _check_columns(name: str, weight: torch.Tensor, number_format: NumberFormat) -> None:
    if weight.shape[-1] % number_format.block_size:
        raise QADError(
            f"{name}: its shard on this rank has {weight.shape[-1]} columns; {number_format.name} needs a multiple of "
            f"{number_format.block_size}. Choose a smaller tensor-parallel size, or another format for this layer."
        )
