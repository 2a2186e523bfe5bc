"""What this machine can do, asked once, with the reason for each choice."""

import functools
import importlib.metadata
import importlib.util
import os
import sys
from dataclasses import dataclass

import torch

from megatron_qad.engine import adamw, processes
from megatron_qad.engine.cpu import device, mamba_packages
from megatron_qad.engine.cpu.speedups import bf16_matmul_fallback
from megatron_qad.engine.run_directory import restricted_unpickling


@dataclass(frozen=True)
class Capabilities:
    """The choices that follow from the hardware and from what is installed."""

    device: str
    """"cuda" or "cpu"."""
    backend: str
    """Collectives: "nccl" or "gloo"."""
    layer_spec: str
    """"te" (Transformer Engine's layers) or "local" (Megatron's torch layers)."""
    kernels: str
    """"triton" or "torch"."""
    mamba: str
    """"mamba_ssm" (its kernels, and causal_conv1d's) or "torch" (``ssd``)."""
    fuses_gradient_accumulation: bool
    """Whether weight gradients can be added to ``main_grad`` by their GEMM: apex's extension, which NVIDIA's containers
    have and PyPI has not."""
    reasons: tuple[str, ...]
    """One sentence a choice, for the log."""

    def report(self) -> str:
        return "\n".join(f"megatron_qad: {reason}" for reason in self.reasons)


@functools.cache
def capabilities() -> Capabilities:
    """Ask the machine. The first call must come before the CPU backend is installed; ``init_runtime`` sees to that."""
    gpu = torch.cuda.is_available()
    reasons = [
        f"device {'cuda' if gpu else 'cpu'}: torch {torch.__version__} "
        + (f"found {torch.cuda.get_device_name(0)}" if gpu else "found no GPU; Megatron runs on the CPU backend")
    ]
    reasons.append("collectives nccl" if gpu else "collectives gloo: nccl needs a GPU")
    te = _version("transformer_engine") if importlib.util.find_spec("transformer_engine") else None
    if te and gpu:
        layer_spec, why = "te", f"Transformer Engine {te} is installed"
    elif te:
        layer_spec, why = "local", f"Transformer Engine {te} is installed, but its forward pass refuses CPU tensors"
    else:
        layer_spec, why = "local", "Transformer Engine is not installed"
    reasons.append(f"layer spec {layer_spec}: {why}")
    triton = gpu and importlib.util.find_spec("triton") is not None
    reasons.append("kernels triton" if triton else "kernels torch: " + ("no triton" if gpu else "triton needs a GPU"))
    if not gpu:
        emulated = bf16_matmul_fallback.is_needed()
        why = "float32 kernels: oneDNN has none for this CPU" if emulated else "oneDNN: this CPU has what it needs"
        reasons.append(f"BF16 products by {why}")
    packages = all(importlib.util.find_spec(package) for package in ("mamba_ssm", "causal_conv1d"))
    mamba = "mamba_ssm" if gpu and packages else "torch"
    why = "its packages are installed" if packages else "mamba_ssm and causal_conv1d are not both installed"
    reasons.append(f"mamba {mamba}: " + ("its kernels need a GPU" if packages and not gpu else why))
    fuses = gpu and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None
    return Capabilities(
        device="cuda" if gpu else "cpu",
        backend="nccl" if gpu else "gloo",
        layer_spec=layer_spec,
        kernels="triton" if triton else "torch",
        mamba=mamba,
        fuses_gradient_accumulation=fuses,
        reasons=tuple(reasons),
    )


def init_runtime(*, for_compute: bool = False) -> Capabilities:
    """Install the CPU backend if there is no GPU; read checkpoints as data. Call before importing ``megatron``; later
    calls are free.

    Args:
        for_compute: the process will train or evaluate. Where Transformer Engine is installed and no GPU is there, it
        is
            then hidden: Megatron takes its kernels wherever it can import it, and they refuse CPU tensors.
    """
    processes.end_with_launcher()
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # orders Megatron's overlapped collectives and GEMMs
    restricted_unpickling.restrict_unpickling()
    found = capabilities()
    if found.device == "cpu":
        device.install()
        bf16_matmul_fallback.install()
        if for_compute:
            sys.modules["transformer_engine"] = None  # an import of it now fails as if it were not installed
    if found.mamba == "torch":
        mamba_packages.install()
    if not importlib.util.find_spec("transformer_engine"):
        adamw.install()
    return found


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"
