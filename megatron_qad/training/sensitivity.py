"""Sensitivity of layers to quantization: the KL to the unquantized model when a single unit is quantized.

A unit is a layer of the pattern (an attention, an MLP, ...) or the head. The model is built once, with any parallelism.
The reference is its own unquantized output on held-out microbatches. Weights are quantized in place and restored;
activations use the same quantizers as in training. ``propose`` then spends a byte budget where the KL falls most per
byte. It treats the KLs of units as additive, which is nearly true while they are small; ``Probe.kl`` can measure the
proposal itself.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from megatron.core import mpu
from tqdm import tqdm

from megatron_qad.engine.errors import QADError
from megatron_qad.formats.format_registry import DEFAULT_FORMAT
from megatron_qad.models.builder import build_chunks, freeze
from megatron_qad.models.weight_loading import load_weights
from megatron_qad.quantization.activations import ActivationQuantizers
from megatron_qad.quantization.format_table import ShapedLinear, format_rows
from megatron_qad.quantization.in_place_weights import InPlaceWeights
from megatron_qad.training.held_out import HeldOut
from megatron_qad.training.job import QADJob
from megatron_qad.training.models import model_config


@dataclass(frozen=True)
class Unit:
    """A layer, or a linear outside of the layers, whose linears are quantized together."""

    name: str
    """Shell pattern of the unit's Megatron modules, such as ``decoder.layers.3.*``."""
    kind: str
    layer: int | None
    linears: tuple[ShapedLinear, ...]

    def bytes_as(self, fmt: str) -> int:
        """Return the stored bytes of the unit's linears in a format, including scales."""
        return sum(row.bytes_after for row in format_rows(self.linears, {x.megatron: fmt for x in self.linears}))


@dataclass
class Sensitivities:
    """KL(unquantized || quantized) in nats per token, for each unit, each kind and the whole model in each format."""

    num_tokens: int
    """Number of counted tokens that each KL was measured on."""
    units: list[Unit]
    by_unit: dict[tuple[str, str], float] = field(default_factory=dict)
    """(name of the unit, format) -> KL with only this unit quantized."""
    by_kind: dict[tuple[str, str], float] = field(default_factory=dict)
    """(kind, format) -> KL with all units of this kind quantized."""
    everything: dict[str, float] = field(default_factory=dict)
    """Format -> KL with all units quantized."""


def group_into_units(linears: Iterable[ShapedLinear], formats: Mapping[str, str]) -> list[Unit]:
    """Group the linears that ``formats`` (by Megatron weight name) quantizes into units, in model order."""
    groups: dict[tuple[int | None, str], list[ShapedLinear]] = {}
    for linear in linears:
        if formats[linear.megatron] != "bf16":
            key = (linear.layer, "") if linear.layer is not None else (None, linear.megatron)
            groups.setdefault(key, []).append(linear)
    return [
        Unit(
            name=f"decoder.layers.{layer}.*" if layer is not None else name.removesuffix(".weight"),
            kind=group[0].kind,
            layer=layer,
            linears=tuple(group),
        )
        for (layer, name), group in groups.items()
    ]


class Probe:
    """Measures the KL of a quantized model to its own unquantized output on held-out microbatches.

    Args:
        job: a job whose ``--qad-teacher`` is the model and whose validation split is the data.
        quantizable: Megatron weight names of all linears that may be quantized. Their inputs are calibrated here.
        num_microbatches: microbatches per data-parallel rank; fewer if the validation set is smaller.

    Raises:
        QADError: the job calibrates with headroom, or its scale rule needs the inputs.
    """

    def __init__(self, job: QADJob, quantizable: Sequence[str], num_microbatches: int):
        self.job, args = job, job.args
        if job.config.options.qad_calibration_headroom is not None:
            raise QADError(
                "--qad-calibration-headroom: all formats are measured with one amax per input, and only NVFP4 has room "
                "for a larger one. Leave it out."
            )
        if job.config.default_scales.needs_moments:
            raise QADError(
                "--qad-weight-scale-rule local_hessian: its scales depend on inputs, which are not collected here. "
                "Choose mse_sweep, which searches the same scales."
            )
        chunks = build_chunks(model_config(job.config, args, job.config.student))
        load_weights(chunks, job.config.options.qad_teacher)
        self.tp_group = mpu.get_tensor_model_parallel_group()
        self.data_group = mpu.get_data_parallel_group(with_context_parallel=True)
        self.activations = ActivationQuantizers(
            chunks,
            dict.fromkeys(quantizable, DEFAULT_FORMAT),
            groups=(self.tp_group, self.data_group),
            percentile=job.config.options.qad_calibration_percentile,
        )
        self.chunks = [freeze(chunk) for chunk in chunks]
        self._held_out = HeldOut(job, num_microbatches)
        with self.activations.calibrating():  # quantizers only observe, so the reference pass is unquantized
            self._held_out.set_reference(self.chunks)

    def kl(self, formats: Mapping[str, str]) -> tuple[float, int]:
        """Return KL(unquantized || quantized) in nats per token with only these linears quantized, and the token count.

        Args:
            formats: format of each quantized linear, by Megatron weight name.

        Raises:
            QADError: no token of the microbatches counts in the loss.
        """
        self.activations.use(formats)
        weights = InPlaceWeights(
            self.chunks,
            dict(formats),
            self.tp_group,
            self.job.config.default_scales.rule,
            mpu.get_expert_tensor_parallel_group(),
        )
        saved = {name: weight.detach().clone() for name, weight in weights.weights.items()}
        weights.quantize_()
        result = self._held_out.kl(self.chunks)
        for name, weight in saved.items():
            weights.weights[name].data.copy_(weight)
        return result


def measure(probe: Probe, units: Sequence[Unit], formats: Sequence[str], *, show_progress: bool) -> Sensitivities:
    """Measure each unit, each kind and the whole model in each format, with one evaluation each."""
    kinds = list(dict.fromkeys(unit.kind for unit in units))
    groups = [("unit", unit.name, [unit]) for unit in units]
    groups += [("kind", kind, [unit for unit in units if unit.kind == kind]) for kind in kinds]
    groups.append(("everything", "", list(units)))
    measured = Sensitivities(0, list(units))
    bar = tqdm([(g, f) for g in groups for f in formats], desc="sensitivity", disable=None if show_progress else True)
    for (group_type, name, members), fmt in bar:
        kl, measured.num_tokens = probe.kl({x.megatron: fmt for unit in members for x in unit.linears})
        if group_type == "unit":
            measured.by_unit[name, fmt] = kl
        elif group_type == "kind":
            measured.by_kind[name, fmt] = kl
        else:
            measured.everything[fmt] = kl
    return measured


def propose(measured: Sensitivities, formats: Sequence[str], budget_bytes: int) -> dict[str, str]:
    """Propose a format for each unit within a byte budget.

    All units start in their smallest format; then the change with the largest decrease of KL per byte is made, again
    and again, until none fits.

        measured = measure(probe, units, ["nvfp4", "fp8"], show_progress=True)
        formats = propose(measured, ["nvfp4", "fp8"], budget_bytes=80_000_000)
        print(formats["decoder.layers.0.*"])  # nvfp4, fp8 or bf16

    Args:
        formats: formats that were measured; "bf16", with KL 0, is always a choice, too.
        budget_bytes: bytes that all units together may take.

    Returns:
        Format by name of the unit.

    Raises:
        QADError: the budget is too small for the smallest formats.
    """
    choices = [*formats, "bf16"]
    units = {unit.name: unit for unit in measured.units}
    sizes = {(name, fmt): unit.bytes_as(fmt) for name, unit in units.items() for fmt in choices}

    def kl(name: str, fmt: str) -> float:
        return 0.0 if fmt == "bf16" else measured.by_unit[name, fmt]

    chosen = {name: min(choices, key=lambda fmt: (sizes[name, fmt], kl(name, fmt))) for name in units}
    remaining = budget_bytes - sum(sizes[name, fmt] for name, fmt in chosen.items())
    if remaining < 0:
        raise QADError(
            f"a budget of {budget_bytes:,} bytes is below the {budget_bytes - remaining:,} bytes that all units take "
            f"in their smallest formats ({', '.join(sorted(set(chosen.values())))}). Choose a larger budget."
        )
    while True:
        steps = []
        for name, fmt in chosen.items():
            for other in choices:
                cost, gain = sizes[name, other] - sizes[name, fmt], kl(name, fmt) - kl(name, other)
                if 0 < cost <= remaining and gain > 0:
                    steps.append((gain / cost, name, other, cost))
        if not steps:
            return chosen
        _, name, other, cost = max(steps)
        chosen[name] = other
        remaining -= cost


def policy_document(units: Sequence[Unit], chosen: Mapping[str, str], linears: Iterable[ShapedLinear]) -> dict:
    """Return a policy (``quantization.policy``) that gives each unit its chosen format and all other linears BF16."""
    in_units = {linear.megatron for unit in units for linear in unit.linears}
    rules = []
    unquantized = [linear for linear in linears if linear.megatron not in in_units]
    if unquantized:
        rules += [{"name": x.megatron.removesuffix(".weight"), "format": "bf16"} for x in unquantized]
    for fmt in dict.fromkeys(chosen.values()):
        layers = [unit.layer for unit in units if unit.layer is not None and chosen[unit.name] == fmt]
        if layers:
            rules.append({"layer": layers, "format": fmt})
        rules += [{"name": u.name, "format": fmt} for u in units if u.layer is None and chosen[u.name] == fmt]
    # Rules of single linears come last, so that they override the rule of their layer.
    rules.sort(key=lambda rule: "name" in rule)
    return {"rules": rules}
