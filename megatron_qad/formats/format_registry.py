"""Registry of the formats that a policy can assign to a linear or a KV cache.

A new format is a file of its own and one line here; see ``docs/howto/add_a_format.md``.
"""

from megatron_qad.formats.format import KVCacheFormat, LinearFormat
from megatron_qad.formats.fp8_format import FP8_CAST_KV_CACHE, FP8_KV_CACHE, FP8_W8A8
from megatron_qad.formats.int4_format import INT4_W4A16
from megatron_qad.formats.nvfp4_format import NVFP4_W4A4, NVFP4_W4A16

UNQUANTIZED = LinearFormat("bf16", "not quantized")

FORMATS: dict[str, LinearFormat] = {
    fmt.name: fmt
    for fmt in (
        UNQUANTIZED,
        NVFP4_W4A4,
        NVFP4_W4A16,
        FP8_W8A8,
        INT4_W4A16,
    )
}
"""Linear formats by their name in policies, in the order of tables and messages."""

KV_CACHE_FORMATS: dict[str, KVCacheFormat | None] = {
    UNQUANTIZED.name: None,
    FP8_KV_CACHE.name: FP8_KV_CACHE,
    FP8_CAST_KV_CACHE.name: FP8_CAST_KV_CACHE,
}
"""KV cache formats by their name in policies. None means that keys and values stay in the job's precision."""

DEFAULT_FORMAT = NVFP4_W4A4.name
"""Name of the format that is assumed for a linear if none is given."""


def exported_formats(layout: str | None = None) -> tuple[str, ...]:
    """Return the names of the formats that ``layout`` supports (None: that any packed layout does), and unquantized."""
    return tuple(
        name for name, fmt in FORMATS.items() if not fmt.quantizes or (layout in fmt.stored if layout else fmt.stored)
    )
