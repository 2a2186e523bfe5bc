"""The formats that a policy can give a linear or a KV cache. A new format is a file of its own and a line here.

``docs/howto/add_a_format.md`` has the steps.
"""

from megatron_qad.formats.format import KVCacheFormat, LinearFormat
from megatron_qad.formats.fp8_format import FP8_KV_CACHE, FP8_W8A8
from megatron_qad.formats.int4_format import INT4_W4A16
from megatron_qad.formats.nvfp4_format import NVFP4_W4A4, NVFP4_W4A16

UNQUANTIZED = LinearFormat("bf16", "not quantized")

FORMATS: dict[str, LinearFormat] = {
    line.name: line
    for line in (
        UNQUANTIZED,
        NVFP4_W4A4,
        NVFP4_W4A16,
        FP8_W8A8,
        INT4_W4A16,
    )
}
"""By the name that policies use, in the order of tables and messages."""

KV_CACHE_FORMATS: dict[str, KVCacheFormat | None] = {
    UNQUANTIZED.name: None,
    FP8_KV_CACHE.name: FP8_KV_CACHE,
}
"""By the name that policies use. None: keys and values stay in the job's precision."""

DEFAULT_FORMAT = NVFP4_W4A4.name
"""What a linear is taken for where nothing else says its format."""


def exported_formats(layout: str | None = None) -> tuple[str, ...]:
    """Names of the formats that a packed layout holds, the unquantized one included. None: that any layout holds."""
    return tuple(
        name for name, fmt in FORMATS.items() if not fmt.quantizes or (layout in fmt.stored if layout else fmt.stored)
    )
