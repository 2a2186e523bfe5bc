"""Warnings about combinations in a policy that are valid, but that cost accuracy in published measurements."""

from collections.abc import Mapping, Sequence

from megatron_qad.quantization.rules import Linear, module_name
from megatron_qad.quantization.scale_settings import ScaleSetting

_FOUR_OVER_SIX = ("four_over_six", "four_over_six_448")


def policy_warnings(linears: Sequence[Linear], scales: Mapping[str, ScaleSetting]) -> list[str]:
    """Return the warnings about a resolved policy, each a sentence without a period.

    Args:
        linears: all linears of the model.
        scales: from ``policy.resolve_scales``; it has the linears whose weights have block scales.
    """
    mamba = [
        linear
        for linear in linears
        if linear.kind == "mamba" and linear.megatron in scales and scales[linear.megatron].rule in _FOUR_OVER_SIX
    ]
    if not mamba:
        return []
    return [
        f"{module_name(mamba[0])}{f' and {len(mamba) - 1} more' if len(mamba) > 1 else ''}: Mamba weights with the "
        f"scale rule {scales[mamba[0].megatron].rule}. NVIDIA measured a median recovery of 84.7% with it and 98.3% "
        "with max for Nemotron 3 Ultra with experts and Mamba in NVFP4. Choose another rule for Mamba, or fp8, as "
        "NVIDIA's releases have"
    ]
