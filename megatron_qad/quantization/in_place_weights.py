"""In-place fake quantization (NVFP4, FP8, INT4) of the student's weights, once per optimizer step.

The optimizer holds the high-precision masters, so the parameter itself can hold ``fake_quant(bf16(master))``. The
straight-through estimator is then exact and free, because the gradient of the parameter is the gradient of the master,
and no weight quantizer runs in a forward pass. Weights are quantized inside ``quantized_weights()``, which spans one
schedule (all microbatches); the next ``optimizer.step`` overwrites them from its masters. Between two steps they are
quantized only once, even if evaluations run, because quantizing twice could change a weight: NVFP4 is not idempotent
where block scales are subnormal. Weights with frozen scales (``frozen_scales``) are quantized with them.

In float32 training Megatron's optimizer has no separate masters: the parameters are the masters. In that case
``quantized_weights`` keeps a copy and restores it afterwards."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from megatron_qad.formats.format import NumberFormat, check_columns
from megatron_qad.formats.format_registry import FORMATS, UNQUANTIZED
from megatron_qad.formats.nvfp4_multi_tensor import amax_list
from megatron_qad.quantization.frozen_scales import CarriedWeight, attach_scales, mask_gradients_
from megatron_qad.quantization.input_moments import InputMoments
from megatron_qad.quantization.names import (
    LinearWeight,
    WeightViews,
    is_expert,
    linear_weights,
    named_modules_globally,
)
from megatron_qad.quantization.scale_settings import ScaleSetting


class InPlaceWeights:
    """The quantized weights of one student, over all its model chunks on this rank.

    Args:
        chunks: model chunks, wrapped or not.
        formats: the format of every linear, by global Megatron weight name (``policy.resolve``).
        tp_group: tensor-parallel group, over which the shards of a weight share its global scale. None means one rank.
        expert_tp_group: tensor-parallel group of the experts. None means ``tp_group``.
        scale_rule: how NVFP4 block scales are chosen, one of ``block_scales.SCALE_RULES``, where ``scales`` has no
            setting.
        scales: how the scales of a weight are obtained (``policy.resolve_scales``). Weights whose scales are carried
            give their chunk a module that saves and loads them. Call ``initialize_scales`` unless a checkpoint does,
            and ``initialize_from_inputs`` for those that are ``waiting``.

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
        scales: Mapping[str, ScaleSetting] | None = None,
    ):
        linears: dict[str, LinearWeight] = {}
        self._number_formats: dict[str, NumberFormat] = {}
        self._settings: dict[str, ScaleSetting] = {}
        self.carried: dict[str, CarriedWeight] = {}
        """Weights whose scales are carried, by global name."""
        groups = (tp_group, expert_tp_group or tp_group)
        for chunk in chunks:
            of_chunk: dict[str, tuple[torch.nn.Module, LinearWeight]] = {}
            for module_name, module in named_modules_globally(chunk):
                if not isinstance(getattr(module, "weight", None), torch.nn.Parameter):
                    continue
                for name, weight in linear_weights(module_name, module).items():
                    number_format = FORMATS[formats.get(name, UNQUANTIZED.name)].weight
                    if number_format is not None:
                        check_columns(name, module.weight.shape[-1], number_format)
                        of_chunk[name] = module, weight
                        self._number_formats[name] = number_format
                        default = ScaleSetting(scale_rule if scale_rule in number_format.scale_rules else "max")
                        self._settings[name] = (scales or {}).get(name, default)
            ranks = tuple(0 if group is None else group.rank() for group in groups)
            self.carried |= attach_scales(chunk, of_chunk, self._number_formats, self._settings, ranks)
            linears |= {name: weight for name, (_, weight) in of_chunk.items()}
        self.formats = {name: number_format.name for name, number_format in self._number_formats.items()}
        """Names of the weights' number formats, by global Megatron weight name."""
        self.linears = {name: linears[name] for name in sorted(linears, key=is_expert)}
        """Where each weight is stored, by global Megatron name. Experts are last, so that each tensor-parallel group
        has a contiguous range."""
        self.weights = WeightViews(self.linears)
        """The weights [out, in] themselves, in the same order."""
        first_expert = sum(not is_expert(name) for name in self.weights)
        ranges = ((groups[0], slice(first_expert)), (groups[1], slice(first_expert, None)))
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

    def initialize_scales(self) -> None:
        """Compute the carried scales from the current weights. Collective over the tensor-parallel groups.

        Those of the rule ``local_hessian`` are left to ``initialize_from_inputs``.

        Raises:
            QADError: a weight contains NaN or Inf. The message names it.
        """
        self._initialize([name for name, weight in self.carried.items() if not weight.setting.needs_moments])

    @property
    def waiting(self) -> list[str]:
        """Names of the weights whose scales ``initialize_from_inputs`` must compute: no checkpoint had them."""
        return [name for name, weight in self.carried.items() if weight.waits_for_moments]

    def initialize_from_inputs(self, moments: InputMoments) -> None:
        """Compute the scales of ``waiting`` from the current weights and the second moments of their inputs.

        Collective over the tensor-parallel groups. Errors are those of ``initialize_scales``.
        """
        self._initialize(self.waiting, moments)

    def _initialize(self, names: Sequence[str], moments: InputMoments | None = None) -> None:
        amaxes = dict(zip(self.weights, self.amaxes(), strict=True)) if self.carried else {}
        for name in names:
            self.carried[name].initialize(amaxes[name], None if moments is None else moments.of(name))

    def mask_gradients_(self, optimizer) -> None:
        """Set the gradients of saturated elements of frozen weights to zero, before ``optimizer`` reads them."""
        mask_gradients_(self.carried.values(), optimizer)

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
        groups: dict[tuple[NumberFormat, str], list[str]] = {}
        for name, setting in self._settings.items():
            if setting.is_frozen:
                self.weights[name].data.copy_(self.carried[name].fake_quant(self.weights[name].data))
            else:
                groups.setdefault((self._number_formats[name], setting.rule), []).append(name)
        for (number_format, rule), names in sorted(groups.items(), key=lambda item: (item[0][0].name, item[0][1])):
            self._quantize_group(number_format, rule, names, amaxes)
        self._may_be_quantized = False
        self.num_quantizations += 1
        self.seconds += time.perf_counter() - start

    @torch.no_grad()
    def quantized_copies(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the name and a quantized copy, [out, in], of each weight without changing it.

        The first step is collective over the tensor-parallel groups."""
        amaxes = self.amaxes()
        for i, (name, weight) in enumerate(self.weights.items()):
            number_format, setting, copy = self._number_formats[name], self._settings[name], weight.detach().clone()
            if setting.is_frozen:
                yield name, self.carried[name].fake_quant(copy)
                continue
            scale = number_format.scales_from_amaxes(amaxes[i : i + 1], [name], setting.rule)
            number_format.fake_quant_list_([copy], scale, [name], setting.rule)
            yield name, copy

    def _quantize_group(
        self, number_format: NumberFormat, rule: str, names: list[str], amaxes: dict[str, torch.Tensor]
    ) -> None:
        """Quantize the weights of one format and rule with scales from their current amaxes."""
        if self._may_be_quantized:
            names = [name for name in names if not self._is_quantized(name, amaxes[name])]
        if not names:
            return
        stacked = torch.stack([amaxes[name] for name in names])
        scales = number_format.scales_from_amaxes(stacked, names, rule)
        number_format.fake_quant_list_([self.weights[name].data for name in names], scales, names, rule)
        for name in self.carried.keys() & names:
            self.carried[name].amax.copy_(amaxes[name])

    def _is_quantized(self, name: str, amax: torch.Tensor) -> bool:
        """Whether a weight that was loaded is quantized already: with the amax that it carries, if it does."""
        number_format, rule = self._number_formats[name], self._settings[name].rule
        if name in self.carried:
            known = self.carried[name].amax
            amax = torch.where(known.isnan(), amax, known)
        scale = number_format.scale_from_amax(amax, name=name, rule=rule)
        return number_format.is_representable(self.weights[name].data, scale, name=name)

    def amaxes(self) -> torch.Tensor:
        """Return the amax of each weight over its tensor-parallel shards, float32 [num_weights]."""
        amaxes = amax_list([weight.data for weight in self.weights.values()])
        for group, indices in self._sharded_ranges:
            # A max all-reduce ignores NaN on some backends. Replacing it with Inf makes it visible to all ranks.
            shared = torch.where(amaxes[indices].isnan(), torch.inf, amaxes[indices])
            torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MAX, group=group)
            amaxes[indices] = shared
        return amaxes
