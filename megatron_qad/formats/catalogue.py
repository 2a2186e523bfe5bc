"""The formats that a policy can give a linear: what its weight and its input are stored and multiplied as.

Data only; the arithmetic is in ``nvfp4`` and ``fp8``. The names are what policies, ``qad.json`` and tables use.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class LinearFormat:
    """One line of the catalogue. None: left in the job's precision."""

    name: str
    weight: str | None
    """"nvfp4", "fp8" (E4M3, one scale a tensor) or "int4" (one scale per 128 columns)."""
    input: str | None
    """"nvfp4" or "fp8"."""
    weight_bits: float
    """Storage of an element with its share of the scales."""
    description: str

    @property
    def quantizes(self) -> bool:
        return self.weight is not None or self.input is not None


LINEAR_FORMATS = {
    line.name: line
    for line in (
        LinearFormat("bf16", None, None, 16, "not quantized"),
        LinearFormat("nvfp4", "nvfp4", "nvfp4", 4.5, "weights and inputs in NVFP4 (W4A4)"),
        LinearFormat("nvfp4-w4a16", "nvfp4", None, 4.5, "weights in NVFP4, inputs unquantized (W4A16)"),
        LinearFormat("fp8", "fp8", "fp8", 8, "weights and inputs in FP8 E4M3, one scale a tensor (W8A8)"),
        LinearFormat(
            "int4-w4a16", "int4", None, 4.125, "weights in INT4, groups of 128; for training and evaluation only"
        ),
    )
}
KV_CACHE_FORMATS = ("bf16", "fp8")
