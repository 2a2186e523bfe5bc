"""Registers the torch operations of ``ssd`` under the names of the packages that Megatron's Mamba mixer imports.

When the mixer is imported, it imports ``mamba_ssm`` and ``causal_conv1d``, derives a class from their contents, and
replaces missing packages by mocks. So working modules must be registered before. Installed packages are used if a GPU
can run their kernels.
"""

import importlib.machinery
import sys
import types

import torch

from megatron_qad.engine.cpu import ssd


def causal_conv1d_fn(x, weight, bias=None, seq_idx=None, activation=None, **unsupported):
    """Replaces ``causal_conv1d.causal_conv1d_fn``. x: [b, d, l]; weight: [d, width]; activation: None or "silu"."""
    if any(value is not None and value is not False for value in unsupported.values()):
        raise NotImplementedError(f"causal_conv1d_fn without its kernels does not support {', '.join(unsupported)}.")
    wide_bias = None if bias is None else ssd.wide(bias)
    out = ssd.causal_conv1d(ssd.wide(x).transpose(1, 2), ssd.wide(weight), wide_bias, seq_idx)
    out = torch.nn.functional.silu(out) if activation in ("silu", "swish") else out
    return out.transpose(1, 2).to(x.dtype)


def causal_conv1d_varlen_states(x, cu_seqlens, state_len):
    raise NotImplementedError("inference with packed requests needs the package causal_conv1d. Install it.")


# Package -> (version whose features are implemented, module -> its contents).
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
    """Register the replacements as modules of this process. Idempotent."""
    for package, (version, modules) in _PACKAGES.items():
        _get_module(package).__version__ = version
        for path, contents in modules.items():
            parts = [part for part in path.split(".") if part]
            for depth in range(len(parts) + 1):
                module = _get_module(".".join([package, *parts[:depth]]))
            vars(module).update(contents)


def _get_module(name: str) -> types.ModuleType:
    module = sys.modules.get(name)
    if module is None:
        module = types.ModuleType(name, "Torch operations of megatron_qad that replace this package.")
        # importlib.util.find_spec, which checks for the package, returns this.
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        module.__path__ = []
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    return module
