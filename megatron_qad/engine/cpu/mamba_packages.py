"""Puts the torch operations of ``ssd`` under the names of the packages that Megatron's Mamba mixer imports.

The mixer takes ``mamba_ssm`` and ``causal_conv1d`` when it is itself imported, derives a class from what it finds, and
puts a mock in the place of what it does not find. So something that works must stand there before. Installed packages
win where a GPU can run their kernels.
"""

import importlib.machinery
import sys
import types

import torch

from megatron_qad.engine.cpu import ssd


def causal_conv1d_fn(x, weight, bias=None, seq_idx=None, activation=None, **unsupported):
    """``causal_conv1d``'s function. x: [b, d, l]; weight: [d, width]; activation: None or "silu"."""
    if any(value is not None and value is not False for value in unsupported.values()):
        raise NotImplementedError(f"causal_conv1d_fn without its kernels has no {', '.join(unsupported)}")
    wide_bias = None if bias is None else ssd.wide(bias)
    out = ssd.causal_conv1d(ssd.wide(x).transpose(1, 2), ssd.wide(weight), wide_bias, seq_idx)
    out = torch.nn.functional.silu(out) if activation in ("silu", "swish") else out
    return out.transpose(1, 2).to(x.dtype)


def causal_conv1d_varlen_states(x, cu_seqlens, state_len):
    raise NotImplementedError("inference with packed requests needs the package causal_conv1d")


# Package -> (the version whose features these have, module -> what it holds).
_PACKAGES = {
    "mamba_ssm": (
        "2.2.2",
        {
            "ops.triton.layernorm_gated": {"RMSNorm": ssd.GatedRMSNorm},
            "ops.triton.ssd_combined": {
                "mamba_chunk_scan_combined": ssd.chunk_scan_combined,
                "mamba_split_conv1d_scan_combined": ssd.split_conv1d_scan_combined,
            },
        },
    ),
    "causal_conv1d": (
        "1.4.0",
        {
            "": {"causal_conv1d_fn": causal_conv1d_fn},
            "causal_conv1d_varlen": {"causal_conv1d_varlen_states": causal_conv1d_varlen_states},
        },
    ),
}


def install() -> None:
    """Register the stand-ins as modules of this process. Idempotent."""
    for package, (version, modules) in _PACKAGES.items():
        _module(package).__version__ = version
        for path, contents in modules.items():
            parts = [part for part in path.split(".") if part]
            for depth in range(len(parts) + 1):
                module = _module(".".join([package, *parts[:depth]]))
            vars(module).update(contents)


def _module(name: str) -> types.ModuleType:
    module = sys.modules.get(name)
    if module is None:
        module = types.ModuleType(name, "Torch operations of megatron_qad in this package's place.")
        # Whoever asks whether the package is there, asks for this.
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        module.__path__ = []
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    return module
