"""Quantize a transformers model for training: replace the linears that the policy quantizes, freeze their scales."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from megatron_qad.engine.errors import QADError
from megatron_qad.formats.format import check_columns
from megatron_qad.formats.format_registry import FORMATS, UNQUANTIZED
from megatron_qad.hf_training.linear_group import LinearGroup
from megatron_qad.hf_training.quantized_linear import QuantizedLinear
from megatron_qad.models.families import family_of, llama, qwen2, qwen3
from megatron_qad.models.families.base import Family, ParamMapping
from megatron_qad.quantization.policy import Policy, load, resolve, resolve_scales
from megatron_qad.quantization.scale_settings import NEW_JOBS, ScaleSetting

FAMILIES = (llama.FAMILY, qwen2.FAMILY, qwen3.FAMILY)
"""Families whose linears are ``torch.nn.Linear`` in transformers, one for each part of a Megatron linear."""
_ATTRIBUTE = "qad_quantization"


@dataclass(frozen=True)
class ModelQuantization:
    """How a model is quantized."""

    policy: Policy
    formats: dict[str, str]
    """Format of every linear, by Megatron weight name."""
    scales: dict[str, ScaleSetting]
    """How the scales of each weight with block scales are obtained, by Megatron weight name."""
    default_scales: ScaleSetting
    groups: tuple[LinearGroup, ...]
    """The quantized linears."""
    source: Path | None
    """Directory of the Hugging Face model that was loaded. None: the model was built from a config."""

    @property
    def is_calibrated(self) -> bool:
        """Whether the amax of every input is known."""
        return all(group.is_calibrated for group in self.groups)


def quantize_model(
    model: PreTrainedModel, policy: Policy | str = "nvfp4-all-linear", *, scales: ScaleSetting | str = NEW_JOBS
) -> PreTrainedModel:
    """Quantize the linears of a model in place, for training with ``QADTrainer`` or a loop of one's own.

    Each quantized ``torch.nn.Linear`` becomes a ``QuantizedLinear`` with the same parameters: float32 masters, next to
    which a quantized copy is kept. Frozen scales are chosen now, for the current weights. Inputs need a calibration
    before the first forward pass (``QADTrainer.calibrate``). A head that is tied to the embedding stays unquantized.

    Args:
        model: a Llama, Qwen2 or Qwen3 with a language modeling head, in float32.
        policy: a ``Policy``, or the name or path of one.
        scales: how block scales are obtained where the policy does not say it, as "mse:frozen"
            (``--qad-weight-scale-rule``).

    Returns:
        ``model`` itself.

    Raises:
        QADError: another family; weights in another dtype; tensors that the family does not have, such as adapters;
            errors of the policy; a quantized KV cache or the scale rule local_hessian, which only Megatron's jobs have.

    Example::

        model = AutoModelForCausalLM.from_pretrained("my_model", dtype=torch.float32)
        student = quantize_model(model, Policy.load("nvfp4-all-linear", ["head=nvfp4"]))
    """
    if hasattr(model, _ATTRIBUTE):
        raise QADError("quantize_model: the model is quantized already. Load the model again.")
    policy = load(policy) if isinstance(policy, str) else policy
    default = ScaleSetting.parse(scales, "scales") if isinstance(scales, str) else scales
    config = _config(model)
    family = _family(config)
    linears = family.linears(config)
    _check_tensors(model, family.tensors(config))
    if policy.kv_cache != UNQUANTIZED.name:
        raise QADError(
            f"policy {policy.name}: kv_cache is {policy.kv_cache}, which QADTrainer does not quantize. Use kv_cache "
            "bf16, or train with megatron-qad train."
        )
    kinds = family.layer_kinds(config)
    formats = resolve(policy, linears, kinds)
    settings = resolve_scales(policy, linears, kinds, default=default)
    _check_settings(policy, settings)
    groups = tuple(
        _replace(model, linear, formats[linear.megatron], settings)
        for linear in linears
        if FORMATS[formats[linear.megatron]].quantizes
    )
    quantization = ModelQuantization(policy, formats, settings, default, groups, _source(model))
    object.__setattr__(model, _ATTRIBUTE, quantization)  # not a submodule
    return model


def quantization_of(model: torch.nn.Module) -> ModelQuantization:
    """Return how ``quantize_model`` has quantized a model. Raises QADError if it has not."""
    if (quantization := getattr(model, _ATTRIBUTE, None)) is None:
        raise QADError(
            "the model is not quantized. Call megatron_qad.api.quantize_model(model, policy) first; 'bf16' is the "
            "policy without quantization."
        )
    return quantization


def _config(model: PreTrainedModel) -> dict:
    """Return the content of the model's config.json."""
    config = json.loads(model.config.to_json_string(use_diff=False))
    return config | {"architectures": [type(model).__name__]}


def _family(config: dict) -> Family:
    family = family_of(config)
    if family not in FAMILIES:
        raise QADError(
            f"{family.architecture}: QADTrainer trains {', '.join(f.architecture for f in FAMILIES)}. Train this model "
            "with megatron-qad train, which has its experts, Mamba layers and variable blocks."
        )
    return family


def _check_tensors(model: PreTrainedModel, maps: list[ParamMapping]) -> None:
    """Check that the model has exactly the parameters that an export writes, in float32."""
    expected = {name: shape for m in maps for name, shape in zip(m.hf, m.hf_shapes(), strict=True)}
    found = dict(model.named_parameters())  # a tied head is not among them
    if unexpected := sorted(found.keys() - expected.keys()):
        raise QADError(
            f"{unexpected[0]}: is not a parameter of {type(model).__name__} ({len(unexpected)} such parameters), so an "
            "export would lose it. Merge adapters into the weights first."
        )
    if missing := sorted(expected.keys() - found.keys()):
        raise QADError(f"{missing[0]}: the model has no such parameter ({len(missing)} missing). Load it again.")
    for name, parameter in found.items():
        if tuple(parameter.shape) != expected[name]:
            shape = list(parameter.shape)
            raise QADError(f"{name}: has shape {shape}, but the model's config implies {list(expected[name])}.")
        if parameter.dtype != torch.float32:
            raise QADError(
                f"{name}: is {str(parameter.dtype).removeprefix('torch.')}, expected float32: the parameters are the "
                "masters of the optimizer. Load the student with dtype=torch.float32, and train with "
                "TrainingArguments(bf16=True) to compute in BF16."
            )


def _check_settings(policy: Policy, settings: dict[str, ScaleSetting]) -> None:
    for name, setting in settings.items():
        if setting.needs_moments:
            raise QADError(
                f"policy {policy.name}: {name} has the scale rule {setting.rule}, whose moments of inputs QADTrainer "
                "does not collect. Choose mse or mse_sweep, or train with megatron-qad train."
            )


def _replace(model: PreTrainedModel, linear: ParamMapping, fmt: str, settings: dict[str, ScaleSetting]) -> LinearGroup:
    """Replace the linears that one Megatron linear consists of."""
    group = LinearGroup(linear.megatron, FORMATS[fmt], settings.get(linear.megatron, ScaleSetting()))
    for name in linear.hf:
        path = name.removesuffix(".weight")
        original = model.get_submodule(path)
        if type(original) is not torch.nn.Linear:
            raise QADError(f"{path}: is a {type(original).__name__}, expected torch.nn.Linear. Load the model again.")
        check_columns(path, original.in_features, FORMATS[fmt])
        parent, _, child = path.rpartition(".")
        model.get_submodule(parent).register_module(child, QuantizedLinear(original, group))
    group.freeze_scales()
    return group


def _source(model: PreTrainedModel) -> Path | None:
    """Return the directory from which a model was loaded: as given, or in the cache of Hugging Face's hub."""
    from transformers.utils import cached_file

    name = model.config._name_or_path
    if not name:
        return None
    config: Path | None = Path(name) / "config.json"
    if config is not None and not config.is_file():
        found = cached_file(name, "config.json", local_files_only=True, _raise_exceptions_for_missing_entries=False)
        config = None if found is None else Path(found)
    return None if config is None else config.parent
