"""torch_dist -> Hugging Face, in BF16 or NVFP4: one layer at a time, with no model and no GPU.

The checkpoint says what it is: ``hf/config.json`` the architecture and ``qad.json`` the format of every linear. A
weight that the job saved on the NVFP4 grid packs to exactly itself; one saved between an optimizer step and its
quantization is rounded here, by the same arithmetic and with the same global scale, to what the next forward pass would
have used.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from megatron_qad.checkpoint import provenance
from megatron_qad.checkpoint.hf_reader import PASSTHROUGH_FILE, declared_dtype
from megatron_qad.checkpoint.hf_writer import DEFAULT_SHARD_BYTES, Written, new_directory, write_hf_checkpoint
from megatron_qad.checkpoint.layouts import HFTensor, LayoutName, kv_scales
from megatron_qad.checkpoint.torch_dist import TorchDistReader
from megatron_qad.engine.errors import QADError
from megatron_qad.engine.run_directory import manifest
from megatron_qad.engine.run_directory.iterations import iteration_to_read
from megatron_qad.engine.run_directory.run_files import JOB_FILE
from megatron_qad.formats.format import KVCacheFormat
from megatron_qad.formats.format_registry import FORMATS, KV_CACHE_FORMATS, UNQUANTIZED, exported_formats
from megatron_qad.models.checkpoint_config import read_config, read_job
from megatron_qad.models.families import family_of
from megatron_qad.models.families.base import ParamMapping


def export_hf(
    checkpoint: str | Path,
    output: str | Path,
    layout: LayoutName,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    iteration: int | str | None = None,
) -> Written:
    """Write an iteration of ``checkpoint`` as the Hugging Face directory ``output``.

    Args:
        checkpoint: a directory that a QAD job saved or, for layout "bf16", one that ``import_hf`` wrote.
        layout: "bf16", "modelopt" or "compressed-tensors". In "bf16" quantized weights are written as the values on
            their grid that the packed layouts decode to.
        iteration: a number, "best" (by validation KL) or None for the newest.

    Tensors that are not packed are written in the dtype that ``config.json`` declares, which is what servers expect; a
    job that trained in float32 is rounded here. A packed layout of a config that declares none gets bfloat16.

    Raises:
        QADError: a damaged checkpoint, missing tensors or amaxes (named), no ``qad.json``, or what the writer refuses.
    """
    checkpoint, output = Path(checkpoint), new_directory(output)  # refused before gigabytes are checked and read
    config = read_config(checkpoint)
    manifest.verify_directory(checkpoint / "hf", "config.json")
    family = family_of(config)
    directory, job = _iteration_and_job(checkpoint, layout, iteration)
    formats = job.get("formats", {})
    kv_cache = job.get("kv_cache", UNQUANTIZED.name) if layout != "bf16" else UNQUANTIZED.name
    if layout != "bf16":
        _refuse_formats_without_layout(checkpoint, set(formats.values()), layout)
    config = {key: value for key, value in config.items() if key != "quantization_config"}
    if layout != "bf16" and declared_dtype(config) is None:
        config["torch_dtype"] = "bfloat16"  # the key that old and new readers know
    passthrough = read_passthrough(checkpoint / "hf")
    if family.passthrough_tensors(config) and not passthrough:
        raise QADError(
            f"{checkpoint}: no hf/{PASSTHROUGH_FILE}, which the import writes for all tensors outside the language "
            "model. Copy it from the imported checkpoint."
        )
    reader, scale_rule = TorchDistReader(checkpoint, iteration), job.get("scale_rule", "max")
    amaxes = reader.read_amaxes() if layout != "bf16" else {}
    export = Export(reader, layout, formats, kv_cache, scale_rule, declared_dtype(config), amaxes)
    return write_hf_checkpoint(
        chain(export.items(family.tensors(config)), (HFTensor(name, tensor) for name, tensor in passthrough.items())),
        output,
        config=config,
        layout=layout,
        linear_modules=[*family.linear_modules(config), *_linears_among(passthrough)],
        source=checkpoint / "hf",
        max_shard_bytes=max_shard_bytes,
        kv_cache=kv_cache,
        record=provenance.iteration_provenance(directory, layout, job),
    )


def _refuse_formats_without_layout(checkpoint: Path, formats: set[str], layout: LayoutName) -> None:
    held = exported_formats(layout)
    for fmt in sorted(formats - set(held)):
        which = f"layout {layout!r} does not hold" if FORMATS[fmt].stored else "no layout holds"
        raise QADError(
            f"{checkpoint}: its policy gives linears the format {fmt}, which {which}; exported are "
            f"{', '.join(held)}. With layout 'bf16' its weights can be written unpacked"
        )


def export_provenance(checkpoint: str | Path, layout: LayoutName, iteration: int | str | None = None) -> dict:
    """The record that ``export_hf`` with the same arguments would write (``provenance``); reads no weights."""
    directory, job = _iteration_and_job(Path(checkpoint), layout, iteration)
    return provenance.iteration_provenance(directory, layout, job)


def _iteration_and_job(checkpoint: Path, layout: LayoutName, iteration: int | str | None) -> tuple[Path, dict]:
    """Layout bf16 also takes what import_hf wrote, which has no formats."""
    if layout != "bf16" and read_job(checkpoint) is None:
        raise QADError(f"{checkpoint}: no {JOB_FILE}; only what pretrain_qad.py saved can be exported as NVFP4")
    directory = iteration_to_read(checkpoint, iteration)
    return directory, read_job(checkpoint, directory) or {}


def read_passthrough(assets: Path) -> dict[str, torch.Tensor]:
    """Tensors that the import carried along, by Hugging Face name."""
    file = assets / PASSTHROUGH_FILE
    try:
        return load_file(file) if file.is_file() else {}
    except SafetensorError as error:
        raise QADError(
            f"{file}: not a whole safetensors file ({error}); copy it from the imported checkpoint"
        ) from error


def _linears_among(passthrough: dict[str, torch.Tensor]) -> list[str]:
    """Modules that a server may take for linears, which a packed checkpoint must then exclude: matrices, but no router
    or embedding."""
    names = [name for name, tensor in passthrough.items() if name.endswith(".weight") and tensor.dim() == 2]
    return [name.removesuffix(".weight") for name in names if ".gate." not in name and "embed" not in name]


@dataclass(frozen=True)
class Export:
    """One checkpoint on its way to Hugging Face names."""

    reader: TorchDistReader
    layout: LayoutName
    formats: dict[str, str]
    kv_cache: str
    scale_rule: str
    dtype: torch.dtype | None
    """Of what is not packed; None: as stored."""
    amaxes: dict[str, torch.Tensor]
    """Of inputs, keys and values, by the names of their quantizers' buffers."""

    def items(self, maps: list[ParamMapping]) -> Iterator[HFTensor]:
        """Every tensor, a layer at a time, in the order of ``maps``; KV cache scales after the projections' weights."""
        kv_format = KV_CACHE_FORMATS[self.kv_cache]
        for tensor_map, tensor in self.reader.layers(maps):
            fmt = self.formats.get(tensor_map.megatron, UNQUANTIZED.name)
            if self.layout == "bf16" or not FORMATS[fmt].quantizes:
                if (number_format := FORMATS[fmt].weight_in_place) is not None:
                    name = tensor_map.megatron
                    tensor = number_format.as_exported(tensor, name=name, rule=self.scale_rule)
                for name, part in zip(tensor_map.hf, tensor_map.to_hf(tensor), strict=True):
                    dtype = part.dtype if tensor_map.is_float32 else self.dtype or part.dtype
                    yield HFTensor(name, part.to(dtype).contiguous())
            else:
                yield from self._quantized(tensor_map, tensor, fmt)
            if kv_format is not None and tensor_map.megatron.endswith("self_attention.linear_qkv.weight"):
                yield from self._kv_scales(tensor_map, kv_format)

    def _quantized(self, tensor_map: ParamMapping, tensor: torch.Tensor, fmt: str) -> Iterator[HFTensor]:
        """One Megatron weight is what a server fuses (q, k, v; gate, up): its parts share their scales."""
        name = tensor_map.megatron
        linear_format, input_scale = FORMATS[fmt], None
        if linear_format.input is not None:
            amax = self._amax(f"{tensor_map.megatron_module}.input_quantizer._amax")
            input_scale = linear_format.input.scale_from_amax(amax, name=name)
        parts = [part.contiguous() for part in tensor_map.to_hf(tensor)]
        scale, codes = linear_format.weight.pack(parts, name=name)
        for i, (hf_name, part) in enumerate(zip(tensor_map.hf, parts, strict=True)):
            yield HFTensor(
                name=hf_name,
                tensor=part,
                module=hf_name.removesuffix(".weight"),
                fmt=fmt,
                weight_scale=scale,
                input_scale=input_scale,
                is_fake_quantized=codes is not None,
                scale_rule=self.scale_rule,
                codes=None if codes is None else codes[i],
            )

    def _kv_scales(self, tensor_map: ParamMapping, kv_format: KVCacheFormat) -> Iterator[HFTensor]:
        attention = tensor_map.megatron_module.rsplit(".", 1)[0]
        amaxes = [self._amax(f"{attention}.core_attention.{x}_bmm_quantizer._amax") for x in "kv"]
        _, k_proj, v_proj = (name.removesuffix(".weight") for name in tensor_map.hf)
        yield from kv_scales(k_proj, v_proj, *amaxes, self.layout, kv_format)

    def _amax(self, name: str) -> torch.Tensor:
        if name not in self.amaxes:
            raise QADError(f"{self.reader.directory}: no {name}; the job saved this checkpoint before it calibrated")
        return self.amaxes[name]
