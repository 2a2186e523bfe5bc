"""Detects hardware and installed packages once, and gives a reason for each choice."""

import functools
import importlib.metadata
import importlib.util
import os
import sys
from dataclasses import dataclass

from megatron_qad.engine import megatron_warnings, processes

# torch and what imports it is imported by the functions: command lines answer --help and report mistakes without it.


@dataclass(frozen=True)
class Capabilities:
    """Choices that follow from the hardware and the installed packages."""

    device: str
    """Device type: "cuda" or "cpu"."""
    backend: str
    """Backend of collectives: "nccl" or "gloo"."""
    layer_spec: str
    """Layer implementation: "te" (Transformer Engine) or "local" (Megatron's torch layers)."""
    kernels: str
    """Kernel implementation: "triton" or "torch"."""
    mamba: str
    """Mamba implementation: "mamba_ssm" (with causal_conv1d) or "torch" (``ssd``)."""
    fuses_gradient_accumulation: bool
    """Whether the weight-gradient GEMM can add to ``main_grad``. Needs apex's extension, which NVIDIA's containers have
    but PyPI does not."""
    reasons: tuple[str, ...]
    """One phrase for each choice, for the log."""

    def report(self) -> str:
        """Return the lines for the log."""
        return "\n".join(f"megatron_qad: {reason}" for reason in self.reasons)


@functools.cache
def capabilities() -> Capabilities:
    """Detect the hardware and packages. Must first be called before the CPU backend is installed (``init_runtime``)."""
    import torch

    from megatron_qad.engine.cpu.speedups import bf16_matmul_fallback

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
        is_emulated = bf16_matmul_fallback.is_needed()
        why = "float32 kernels: oneDNN has none for this CPU" if is_emulated else "oneDNN: this CPU supports it"
        reasons.append(f"BF16 products by {why}")
    has_mamba = all(importlib.util.find_spec(package) for package in ("mamba_ssm", "causal_conv1d"))
    mamba = "mamba_ssm" if gpu and has_mamba else "torch"
    why = "its packages are installed" if has_mamba else "mamba_ssm and causal_conv1d are not both installed"
    reasons.append(f"mamba {mamba}: " + ("its kernels need a GPU" if has_mamba and not gpu else why))
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
    """Install the CPU backend if there is no GPU, and restrict unpickling. Call this before importing ``megatron``.

    Also hides some warnings of Megatron (``megatron_warnings``). Later calls change nothing.

    Args:
        for_compute: whether the process will train or evaluate. On a machine without a GPU, Transformer Engine is then
            hidden: Megatron uses its kernels wherever it can import it, and they refuse CPU tensors.

    Example::

        from megatron_qad.engine import init_runtime
        machine = init_runtime(for_compute=True)
        print(machine.device, machine.backend)  # "cuda nccl", or "cpu gloo" without a GPU
    """
    processes.end_with_launcher()
    from megatron_qad.engine import adamw
    from megatron_qad.engine.cpu import device, mamba_packages
    from megatron_qad.engine.cpu.speedups import bf16_matmul_fallback
    from megatron_qad.engine.run_directory import restricted_unpickling

    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # orders Megatron's overlapped collectives and GEMMs
    restricted_unpickling.restrict_unpickling()
    megatron_warnings.hide()
    machine = capabilities()
    if machine.device == "cpu":
        device.install()
        megatron_warnings.hide(on_cpu=True)
        bf16_matmul_fallback.install()
        if for_compute:
            sys.modules["transformer_engine"] = None  # importing it now fails as if it were not installed
    if machine.mamba == "torch":
        mamba_packages.install()
    if not importlib.util.find_spec("transformer_engine"):
        adamw.install()
    return machine


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"
