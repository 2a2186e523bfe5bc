"""List every tensor that an export under a policy would write, from the model's config.json alone.

Names, dtypes and shapes come from the exporter's own name maps, formats and layouts.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_qad.checkpoint.hf_directory import ITEM_BYTES
from megatron_qad.checkpoint.hf_reader import declared_dtype
from megatron_qad.checkpoint.layouts import PACKED_LAYOUTS, PackedLayout, check_format
from megatron_qad.formats.format import KVCacheFormat
from megatron_qad.formats.format_registry import FORMATS, KV_CACHE_FORMATS, UNQUANTIZED
from megatron_qad.models.families import family_of
from megatron_qad.models.families.base import ParamMapping
from megatron_qad.report.policy_report import PolicyReport

_DTYPES = {"torch.bfloat16": "BF16", "torch.float16": "F16", "torch.float32": "F32"}


@dataclass(frozen=True)
class ExportedTensor:
    """One entry of a safetensors file."""

    name: str
    dtype: str
    """dtype name of safetensors, such as "U8"."""
    shape: tuple[int, ...]
    num_bytes: int


def exported_tensors(report: PolicyReport, layout: str) -> list[ExportedTensor]:
    """Return the tensors of an export, in its order.

    Args:
        layout: "modelopt" or "compressed-tensors".

    Raises:
        QADError: the policy has a format that the layout does not support.
    """
    config, packed = report.hf_config, PACKED_LAYOUTS[layout]
    kv_format = KV_CACHE_FORMATS[report.policy.kv_cache]
    formats = {f"{row.module}.weight": row.format for row in report.rows if not row.is_tied}
    for fmt in sorted(set(formats.values())):
        check_format(fmt, layout, f"policy {report.policy.name}")
    plain = _DTYPES.get(str(declared_dtype(config)), "BF16")
    exported = []
    for tensor in family_of(config).all_tensors(config):
        fmt = formats.get(tensor.megatron, UNQUANTIZED.name)
        for name, shape in zip(tensor.hf, tensor.hf_shapes(), strict=True):
            if FORMATS[fmt].quantizes:
                exported += _quantized_tensors(name.removesuffix(".weight"), shape, fmt, packed)
            else:
                exported.append(_tensor(name, "F32" if tensor.is_float32 else plain, shape))
        if kv_format is not None and tensor.megatron.endswith("self_attention.linear_qkv.weight"):
            exported += _kv_scale_tensors(tensor, packed, kv_format)
    return exported


def _quantized_tensors(module: str, shape: tuple[int, ...], fmt: str, layout: PackedLayout) -> Iterator[ExportedTensor]:
    for part, (dtype, stored_shape) in layout.expected(fmt, *shape).items():
        yield _tensor(f"{module}.{part}", dtype, stored_shape)


def _kv_scale_tensors(tensor: ParamMapping, layout: PackedLayout, kv_format: KVCacheFormat) -> Iterator[ExportedTensor]:
    _, k_proj, v_proj = (name.removesuffix(".weight") for name in tensor.hf)
    for name in kv_format.scale_names(layout.name, k_proj, v_proj):
        yield _tensor(name, "F32", layout.scalar_shape)


def _tensor(name: str, dtype: str, shape: tuple[int, ...]) -> ExportedTensor:
    return ExportedTensor(name, dtype, tuple(shape), ITEM_BYTES[dtype] * math.prod(shape))


def render_inventory(tensors: Sequence[ExportedTensor]) -> Iterator[str]:
    """Yield one line per tensor, then the totals by dtype."""
    width = max(len(tensor.name) for tensor in tensors)
    for tensor in tensors:
        shape = " x ".join(map(str, tensor.shape)) or "scalar"
        yield f"{tensor.name:<{width}}  {tensor.dtype:<7}  {shape:<16}  {tensor.num_bytes:>15,}"
    yield ""
    counts, sizes = Counter(tensor.dtype for tensor in tensors), Counter()
    for tensor in tensors:
        sizes[tensor.dtype] += tensor.num_bytes
    for dtype in counts:
        yield f"{counts[dtype]:>8,} tensors  {dtype:<7}  {sizes[dtype]:>18,} bytes"
    yield f"{len(tensors):>8,} tensors  {'total':<7}  {sum(sizes.values()):>18,} bytes"
