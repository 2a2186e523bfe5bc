"""Reads the weights and scales of an exported Hugging Face directory, decoded, by Megatron's names.

Weights are decoded with the arithmetic of ``formats`` and never quantized again, because quantizing NVFP4 twice can
change a weight whose block scales are subnormal. Scales of inputs, keys and values are returned as they are stored.

The layout compressed-tensors stores reciprocals of NVFP4 scales, and 1 / (1 / s) can differ from s by an ulp. Of the
scales that have the stored reciprocal, the one that comes from a bfloat16 amax is taken: that of a BF16 job.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_qad.checkpoint import source_names
from megatron_qad.checkpoint.hf_directory import Shards, read_shards
from megatron_qad.checkpoint.hf_reader import HFReader
from megatron_qad.checkpoint.layouts import PACKED_LAYOUTS, PackedLayout
from megatron_qad.checkpoint.source_quantization import without_quantization
from megatron_qad.checkpoint.validate import validate_nvfp4
from megatron_qad.engine.errors import QADError
from megatron_qad.engine.plural import count
from megatron_qad.engine.text_files import read_json
from megatron_qad.formats.common import neighbours
from megatron_qad.formats.format_registry import FORMATS, KV_CACHE_FORMATS, UNQUANTIZED
from megatron_qad.models.families import family_of
from megatron_qad.models.families.base import ParamMapping
from megatron_qad.quantization.names import of_all_experts

_QKV = "self_attention.linear_qkv.weight"


def exported_config(directory: str | Path) -> dict:
    """Return the model's config.json in an exported directory, without its quantization."""
    return without_quantization(read_json(Path(directory) / "config.json"))


@dataclass(frozen=True)
class ExportedModel:
    """An exported directory: packed in one of the layouts, or with plain weights.

    Example::

        model = ExportedModel.open("exports/qad-nvfp4")
        weight = model.read("decoder.layers.0.self_attention.linear_qkv.weight", torch.bfloat16)
    """

    directory: Path
    config: dict
    """config.json without its quantization."""
    layout: PackedLayout | None = None
    """None: the weights are not packed."""
    quantized: Mapping[str, str] = field(default_factory=dict)
    """Format of each packed linear, by Hugging Face module."""
    kv_cache: str = UNQUANTIZED.name
    _opened: dict[Path, object] = field(default_factory=dict)
    _latest: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def open(cls, directory: str | Path) -> "ExportedModel":
        """Validate an exported directory. Reads all of its values.

        Raises:
            QADError: the directory is not valid; the message has the first issue.
        """
        directory = Path(directory)
        if not read_json(directory / "config.json").get("quantization_config"):
            return cls(directory, exported_config(directory))
        result = validate_nvfp4(directory)
        if result.issues:
            raise QADError(
                f"{directory}: {count(len(result.issues), 'issue')}, the first: {result.issues[0]}. List all of them: "
                f"megatron-qad validate {directory}"
            )
        config, layout = exported_config(directory), PACKED_LAYOUTS[result.layout]
        return cls(directory, config, layout, result.quantized, result.kv_cache)

    @property
    def formats(self) -> dict[str, str]:
        """Format of every linear, by Megatron weight name."""
        linears = family_of(self.config).linears(self.config)
        return {m.megatron: self._format_of(m.hf[0]) for m in linears}

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """Return the tensor that a torch_dist checkpoint stores under ``name``, without vocabulary padding.

        Args:
            dtype: dtype to which packed weights are decoded. Others are returned in their stored dtype.
        """
        tensor_map, rows = self._parts[name]
        if tensor_map.megatron not in self._latest:  # a weight that is stored in parts is decoded once
            self._latest.clear()
            parts = [self._decoded(part, dtype) for part in tensor_map.hf]
            self._latest[tensor_map.megatron] = tensor_map.to_megatron(parts)
        return self._latest[tensor_map.megatron][rows]

    def input_scales(self) -> dict[str, Tensor]:
        """Return the scale of every quantized input, key and value, float32 [], by the quantizer's name
        (``ActivationQuantizers.quantizers``). Linears and experts that share an input get the largest scale."""
        scales: dict[str, Tensor] = {}
        for name, scale in self._each_scale():
            scales[name] = torch.maximum(scales[name], scale) if name in scales else scale
        return scales

    def _each_scale(self) -> Iterator[tuple[str, Tensor]]:
        if self.layout is None:
            return
        for m in family_of(self.config).tensors(self.config):
            for module in (name.removesuffix(".weight") for name in m.hf):
                number = FORMATS[self._format_of(f"{module}.weight")].input
                if m.is_linear and number is not None:
                    scale = self._scale(module, "input_scale", [number.input_scale_from_amax])
                    yield of_all_experts(m.megatron).removesuffix(".weight"), scale
            if (kv_format := KV_CACHE_FORMATS[self.kv_cache]) is not None and m.megatron.endswith(_QKV):
                _, k_proj, v_proj = (name.removesuffix(".weight") for name in m.hf)
                names = kv_format.scale_names(self.layout.name, k_proj, v_proj)
                for kind, name in zip("kv", names, strict=True):
                    attention = m.megatron_module.rsplit(".", 1)[0]
                    yield f"{attention}.core_attention.{kind}_bmm_quantizer", self._stored(name).float().reshape(())

    @cached_property
    def _parts(self) -> dict[str, tuple[ParamMapping, slice]]:
        """The weight, and its rows, that a checkpoint stores under each name."""
        parts = {}
        for m in family_of(self.config).tensors(self.config):
            start = 0
            for ending, rows in m.checkpoint_splits.items():
                parts[m.megatron + ending] = m, slice(start, start + rows)
                start += rows
        return parts

    def _format_of(self, name: str) -> str:
        return self.quantized.get(name.removesuffix(".weight"), UNQUANTIZED.name)

    def _decoded(self, name: str, dtype: torch.dtype) -> Tensor:
        fmt = self._format_of(name)
        number, module = FORMATS[fmt].weight, name.removesuffix(".weight")
        if number is None:
            return self._stored(name)
        roles = self.layout.parts(fmt)
        scale = torch.ones(())
        if "weight_scale" in roles:
            rules = [partial(number.scale_from_amax, rule=rule) for rule in number.scale_rules]
            scale = self._scale(module, "weight_scale", rules)
        codes = {role: part for role, (part, _) in roles.items() if role not in ("weight_scale", "input_scale")}
        return number.dequantize({r: self._stored(f"{module}.{part}") for r, part in codes.items()}, scale, dtype)

    def _scale(self, module: str, role: str, rules: list[Callable[[Tensor], Tensor]]) -> Tensor:
        """Return a scale, float32 []. ``rules`` compute the scales that it may be from amaxes."""
        stored = self.layout.stored(self.quantized[module])
        value = self._stored(f"{module}.{stored.parts[role][0]}").float().reshape(())
        return scale_of_reciprocal(value, rules) if stored.is_reciprocal else value

    def _stored(self, name: str) -> Tensor:
        if self.layout is None:
            return self._plain.read(name)
        file = self._shards.tensors[name].file if name in self._shards.tensors else None
        if file is None:
            raise QADError(f"{self.directory}: no tensor {name!r}. Export it again.")
        try:
            if file not in self._opened:
                self._opened[file] = safe_open(file, framework="pt")
            return self._opened[file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise QADError(f"{file}: cannot read {name}: {error}. Export it again.") from error

    @cached_property
    def _plain(self) -> HFReader:
        reader = HFReader(self.directory)
        source_names.resolve(reader, family_of(self.config).tensors(self.config))
        return reader

    @cached_property
    def _shards(self) -> Shards:
        return read_shards(self.directory, lambda name, text: None)  # its issues were reported


def scale_of_reciprocal(reciprocal: Tensor, rules: list[Callable[[Tensor], Tensor]]) -> Tensor:
    """Return a scale whose float32 reciprocal is ``reciprocal`` []: one that a rule computes from a bfloat16 amax, or
    else ``1 / reciprocal``.

    Example:
        >>> scale_of_reciprocal(torch.tensor(2.0), [lambda amax: amax / 6])
        tensor(0.5000)
    """
    nearest = 1.0 / reciprocal
    for scale in neighbours(nearest):
        if torch.equal(1.0 / scale, reciprocal):
            for rule in rules:
                amax = (scale / rule(torch.ones(()))).bfloat16().float()
                if torch.equal(rule(amax), scale):
                    return scale
    return nearest
