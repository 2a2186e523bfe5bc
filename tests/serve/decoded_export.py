"""Decodes an export to float32 and writes it as an unquantized model."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from megatron_qad.checkpoint.layouts import PACKED_LAYOUTS
from megatron_qad.checkpoint.transformers_support import WEIGHTS_KEY
from megatron_qad.checkpoint.validate import validate_nvfp4
from megatron_qad.formats.format_registry import FORMATS


def decoded(export: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of an export by Hugging Face name, packed weights decoded to float32, without scales."""
    result = validate_nvfp4(export)
    assert not result.issues, result.issues[:3]
    layout, tensors = PACKED_LAYOUTS[result.layout], load_file(export / "model.safetensors")
    plain = {name: t for name, t in tensors.items() if not name.endswith((".k_scale", ".v_scale"))}
    for module, fmt in result.quantized.items():
        stored = layout.stored(fmt)
        codes = {role: plain.pop(f"{module}.{part}") for role, (part, _) in stored.parts.items()}
        scale = codes.get("weight_scale", torch.ones(())).reshape(())
        scale = 1 / scale if stored.is_reciprocal else scale
        plain[f"{module}.weight"] = FORMATS[fmt].weight.dequantize(codes, scale, torch.float32)
    return plain


def shapes_of_plain_linears(export: Path) -> set[tuple[int, ...]]:
    """Return the shapes of linears' weights that are not NVFP4, with or without quantized inputs."""
    nvfp4 = {name for name, fmt in validate_nvfp4(export).quantized.items() if fmt.startswith("nvfp4")}
    names = {name.removesuffix(".weight"): tensor for name, tensor in decoded(export).items() if tensor.dim() == 2}
    return {tuple(names[name].shape) for name in names.keys() - nvfp4 if not name.endswith("embed_tokens")}


def write_decoded(export: Path, directory: Path) -> Path:
    """Write the decoded export as a model for transformers."""
    directory.mkdir()
    config = json.loads((export / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in ("quantization_config", WEIGHTS_KEY)}
    (directory / "config.json").write_text(json.dumps(config))
    save_file(decoded(export), directory / "model.safetensors", metadata={"format": "pt"})
    return directory
