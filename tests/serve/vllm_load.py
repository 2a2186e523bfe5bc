"""Loads exports with vLLM's own loader, without a forward pass, and writes what its layers hold. Serving environment.

    python vllm_load.py REQUESTS.json

REQUESTS.json is a list of {"model": DIR, "output": FILE.pt}. The output is a dictionary of all parameters by vLLM's
name, after loading and before they are rearranged for a kernel. A model that fails gets OUTPUT.error instead.

A layer chooses its kernel when it is built, and no kernel for experts or for weight-only NVFP4 runs on a CPU. Only
these choices are replaced (``KERNEL_CHOICES``), and one check of the platform for experts without a gate. Kernels are
called in a forward pass and when weights are rearranged for them, neither of which happens here. The names, shapes,
mapping and copying of weights are vLLM's.
"""

import gc
import importlib
import json
import os
import sys
import traceback
from pathlib import Path

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}

import torch
from vllm.config import set_current_vllm_config
from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.kernels.linear import EmulationNvFp4LinearKernel, NvFp4LinearLayerConfig
from vllm.model_executor.layers.fused_moe import config as fused_moe_config
from vllm.model_executor.layers.fused_moe.oracle.nvfp4 import NvFp4MoeBackend
from vllm.model_executor.model_loader import get_model_loader
from vllm.platforms import current_platform
from vllm.utils.torch_utils import set_default_torch_dtype

_QUANTIZATION = "vllm.model_executor.layers.quantization"
_COMPRESSED = f"{_QUANTIZATION}.compressed_tensors"
KERNEL_CHOICES = {
    "select_nvfp4_moe_backend": lambda *_, **__: (NvFp4MoeBackend.MARLIN, None),
    "init_nvfp4_linear_kernel": lambda *_, **__: EmulationNvFp4LinearKernel(NvFp4LinearLayerConfig()),
}
"""Functions of vLLM that choose a kernel for the machine."""
_MODULES = (
    f"{_QUANTIZATION}.modelopt",
    f"{_COMPRESSED}.compressed_tensors_moe.compressed_tensors_moe_w4a4_nvfp4",
    f"{_COMPRESSED}.schemes.compressed_tensors_w4a4_nvfp4",
)


class _PlatformOfExperts(type(current_platform)):
    """The CPU, for ``FusedMoEConfig``, which refuses experts without a gate where no kernel computes them."""

    def is_cuda_alike(self) -> bool:
        return True


def main(requests: list[dict]) -> None:
    fused_moe_config.current_platform = _PlatformOfExperts()
    for module in map(importlib.import_module, _MODULES):
        for name in KERNEL_CHOICES.keys() & vars(module).keys():
            setattr(module, name, KERNEL_CHOICES[name])
    for request in requests:
        try:
            torch.save(loaded(request["model"]), request["output"])
        except Exception as error:  # vLLM raises many types; the test shows the message
            traceback.print_exc()
            Path(request["output"] + ".error").write_text(f"{type(error).__name__}: {error}")
        gc.collect()


def loaded(directory: str) -> dict[str, torch.Tensor]:
    has_code = "auto_map" in json.loads((Path(directory) / "config.json").read_text())
    arguments = EngineArgs(
        directory,
        dtype="bfloat16",
        max_model_len=128,
        enforce_eager=True,
        skip_tokenizer_init=not has_code,  # vision-language models read their special tokens
        load_format="auto",
        trust_remote_code=has_code,
    )
    config = arguments.create_engine_config()
    with set_current_vllm_config(config):
        if not torch.distributed.is_initialized():
            init_distributed_environment(1, 0, f"file://{directory}.rendezvous", 0, "gloo")
            ensure_model_parallel_initialized(1, 1)
        loader, model_config = get_model_loader(config.load_config), config.model_config
        with set_default_torch_dtype(model_config.dtype), torch.device("cpu"):
            model = loader.create_model(vllm_config=config, model_config=model_config)
        names = model.load_weights(loader.get_all_weights(model_config, model))
    tensors = dict(model.named_parameters())
    missing = sorted(set(tensors) - set(names or tensors))
    if missing:
        print(f"{directory}: not loaded: {missing[:8]} ({len(missing)} in all)")
    return {name: tensor.detach().clone() for name, tensor in tensors.items()} | {"not loaded": missing}


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
