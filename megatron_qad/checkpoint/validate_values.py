"""Check the values of an exported checkpoint: scales are positive and finite, and no tensor has NaN or Inf.

Per-tensor scales must be equal within the linears that servers fuse, and the largest block scale must fit them. Names,
dtypes and shapes are checked by ``validate``.
"""

from collections import defaultdict
from collections.abc import Mapping

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_qad.checkpoint.expected_tensors import Inventory
from megatron_qad.checkpoint.hf_directory import AddIssue, Shards
from megatron_qad.checkpoint.layouts import PackedLayout
from megatron_qad.formats.common import E4M3_MAX
from megatron_qad.formats.format_registry import KV_CACHE_FORMATS
from megatron_qad.formats.input_scales import round_up_to_bf16

_PACKED = ("U8", "I32")
"""dtypes of packed codes, as safetensors calls them."""
_INT4_ZEROS = -0x77777778  # eight codes of 8, which is zero in INT4
_MIN_LARGEST = E4M3_MAX / 64
"""The largest block scale of a tensor is 448, or 256 with four_over_six; with FP8 weights the largest code is 448.
Rules that clip may choose less for a block whose inputs are almost zero, which the factor allows."""


def check_values(
    layout: PackedLayout,
    model: Inventory,
    shards: Shards,
    quantized: Mapping[str, str],
    kv_cache: str,
    issue: AddIssue,
) -> tuple[dict[str, Tensor], list[str]]:
    """Check the values of all tensors in the readable shards.

    Args:
        quantized: format of each quantized linear.
        kv_cache: one of ``KV_CACHE_FORMATS``, inferred from the stored scales.
        issue: called for every issue.

    Returns:
        The per-tensor scales by name, and the names of weights that are all zeros.
    """
    names_by_file = defaultdict(list)
    for name, stored in shards.tensors.items():
        if stored.file in shards.readable:
            names_by_file[stored.file].append(name)
    scalars: dict[str, Tensor] = {}
    per_tensor, block_scales, shapes = set(), set(), {}
    for module, fmt in quantized.items():
        parts = {role: f"{module}.{part}" for role, (part, _) in layout.parts(fmt).items()}
        per_tensor |= {name for role, name in parts.items() if role in ("weight_scale", "input_scale")}
        block_scales |= {name for role, name in parts.items() if role == "block_scale"}
        shapes |= {name: model.linears[module] for role, name in parts.items() if role == "shape"}
    of_kv_cache = set()
    if (kv_format := KV_CACHE_FORMATS[kv_cache]) is not None:
        of_kv_cache = {name for pair in model.attentions for name in kv_format.scale_names(layout.name, *pair)}
        per_tensor |= of_kv_cache
    weights = {f"{module}.{layout.parts(fmt)['weight'][0]}" for module, fmt in quantized.items()}
    weights |= {f"{module}.weight" for module in model.linears} | {n for n in model.tensors if n.endswith(".weight")}
    zeros, largest, tied = [], {}, {}
    for path, names in names_by_file.items():
        try:
            opened = safe_open(path, framework="pt")
        except SafetensorError as error:
            issue(path.name, f"cannot be read by the safetensors library: {error}")
            continue
        with opened as file:
            for name in names:
                if shards.tensors[name].dtype in _PACKED and name not in block_scales and name not in shapes:
                    if name in weights and _is_zero_on_disk(file, name):
                        zeros.append(name)
                    continue  # all codes are valid
                tensor = file.get_tensor(name)
                if name in weights and _is_zero(tensor):
                    zeros.append(name)
                if tensor.dtype == torch.float8_e4m3fn:
                    largest[name] = _largest_e4m3(tensor)
                if name in per_tensor:
                    scalars[name] = tensor
                    _check_scalar(name, tensor, issue)
                    if name in of_kv_cache:
                        _check_kv_scale(name, tensor, issue)
                elif name in block_scales:
                    _check_block_scale(name, tensor, issue)
                elif name in shapes:
                    if (shape := tuple(tensor.flatten().tolist())) != tuple(shapes[name]):
                        issue(name, f"is {list(shape)}, expected {list(shapes[name])}, the shape of the weight")
                elif tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
                    issue(name, f"has {int((~torch.isfinite(tensor.float())).sum())} NaN or Inf values")
                if model.tied_head and name in (model.embedding, f"{model.head}.weight"):
                    tied[name] = tensor
    if len(tied) == 2 and not torch.equal(*tied.values()):
        issue(f"{model.head}.weight", f"differs from {model.embedding}, but config.json ties them")
    _check_fused(layout, model, scalars, quantized, issue)
    _check_largest(layout, model, largest, quantized, zeros, issue)
    return scalars, zeros


def _is_zero_on_disk(file: safe_open, name: str) -> bool:
    """``_is_zero``, which reads all of the codes only if the first row is zero."""
    part = file.get_slice(name)
    return len(part.get_shape()) == 2 and _is_zero(part[:1]) and _is_zero(file.get_tensor(name))


def _is_zero(tensor: Tensor) -> bool:
    """Whether a weight, or the packed codes of one, has only zeros."""
    if tensor.dtype == torch.uint8:
        return not bool((tensor & 0x77).any())  # without the signs of two E2M1 codes
    if tensor.dtype == torch.int32:
        return bool((tensor == _INT4_ZEROS).all())
    if tensor.dtype == torch.float8_e4m3fn:
        return not bool((tensor.view(torch.uint8) & 0x7F).any())
    return not bool(tensor.any())


def _largest_e4m3(tensor: Tensor) -> float:
    """Return the largest magnitude of float8_e4m3fn numbers; their bits are ordered like magnitudes."""
    magnitudes = tensor.view(torch.uint8) & 0x7F
    return magnitudes.max().view(torch.float8_e4m3fn).float().item() if tensor.numel() else 0.0


def _check_largest(
    layout: PackedLayout,
    model: Inventory,
    largest: dict[str, float],
    quantized: Mapping[str, str],
    zeros: list[str],
    issue: AddIssue,
) -> None:
    """Report linears whose block scales, or FP8 codes, do not use the range for which the global scale is chosen."""
    in_groups = {module for group in model.fused for module in group}
    for group in [*model.fused, *((module,) for module in quantized if module not in in_groups)]:
        names = []
        for module in group:
            parts = layout.parts(quantized[module]) if module in quantized else {}
            if parts and f"{module}.{parts['weight'][0]}" not in zeros:
                names.append(f"{module}.{parts.get('block_scale', parts['weight'])[0]}")
        values = {name: largest[name] for name in names if name in largest}
        if values and not max(values.values()) >= _MIN_LARGEST:
            name = max(values, key=lambda name: values[name])
            expected = f"{E4M3_MAX:g}, for which the global scale is chosen"
            issue(name, f"has values up to {values[name]:g}, expected a largest value near {expected}")


def _check_scalar(name: str, tensor: Tensor, issue: AddIssue) -> None:
    if tensor.numel() != 1 or not tensor.is_floating_point():
        return  # shape and dtype are already reported
    value = tensor.float().item()
    if not 0 < value < float("inf"):
        issue(name, f"is {value}, expected a finite number > 0")
    elif not 0 < 1.0 / torch.tensor(value) < float("inf"):
        issue(name, f"is {value}, whose reciprocal is not finite in float32")


def _check_kv_scale(name: str, tensor: Tensor, issue: AddIssue) -> None:
    if tensor.dtype != torch.float32 or tensor.numel() != 1 or not 0 < tensor.item() < float("inf"):
        return  # already reported
    if (rounded := round_up_to_bf16(tensor).item()) != tensor.item():
        issue(
            name,
            f"is {tensor.item()!r}, expected a bfloat16 number such as {rounded!r}: vLLM rounds KV cache scales to the "
            "model's dtype. Exports of this version have such scales",
        )


def _check_block_scale(name: str, tensor: Tensor, issue: AddIssue) -> None:
    if tensor.dtype == torch.bfloat16:
        if count := int((~torch.isfinite(tensor) | (tensor <= 0)).sum()):
            issue(name, f"holds {count} group scales that are not finite numbers > 0")
        return
    if tensor.element_size() != 1:
        return  # the dtype is already reported
    codes = tensor.view(torch.uint8)
    magnitude = codes & 0x7F
    if count := int((magnitude == 0x7F).sum()):
        issue(name, f"has {count} NaN block scales (E4M3 0x7F or 0xFF)")
    if count := int((magnitude == 0).sum()):
        issue(name, f"has {count} block scales that are zero; expected > 0, also for blocks of zeros")
    if count := int(((codes > 0x80) & (codes != 0xFF)).sum()):
        issue(name, f"has {count} negative block scales")


def _check_fused(
    layout: PackedLayout, model: Inventory, scalars: dict[str, Tensor], quantized: Mapping[str, str], issue: AddIssue
) -> None:
    for group in model.fused:
        formats = {quantized[module] for module in group if module in quantized}
        if len(formats) != 1:
            continue  # nothing is quantized, or it is already reported
        roles = layout.parts(formats.pop())
        for part in (roles[role][0] for role in ("weight_scale", "input_scale") if role in roles):
            present = [name for module in group if (name := f"{module}.{part}") in scalars]
            for name in present[1:]:
                first, other = scalars[present[0]], scalars[name]
                if (
                    first.dtype != torch.float32
                    or other.dtype != torch.float32
                    or (first.numel(), other.numel()) != (1, 1)
                ):
                    continue  # already reported
                if first.view(torch.int32).item() != other.view(torch.int32).item():  # compare bits, because NaN != NaN
                    issue(
                        name,
                        f"is {other.item()!r}, but {present[0]} is {first.item()!r}; must be equal, servers fuse them",
                    )
