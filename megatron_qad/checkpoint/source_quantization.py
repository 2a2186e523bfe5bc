"""Recognizes quantized source models, and dequantizes FP8 weights with ``weight_scale_inv``.

That convention is DeepSeek-V3's, Qwen3-FP8's and transformers' ``FineGrainedFP8Config``: a weight is float8_e4m3fn
[N, K], ``weight_scale_inv`` is [ceil(N / n), ceil(K / k)] for blocks of ``weight_block_size`` [n, k], or one value for
the whole weight, and the weight is the product of the two. Every other quantized model is refused by name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_qad.engine.errors import QADError
from megatron_qad.engine.text_files import read_json

SCALE = "_scale_inv"
"""What an FP8 weight's scale is called, after the weight's own name."""
_CONFIG_KEYS = ("quantization_config", "compression_config")
_CONFIG_FILES = {"hf_quant_config.json": "quantization", "quantize_config.json": None, "quant_config.json": None}
"""Files besides config.json that declare a quantization, and the key under which they do so."""
_INNER_CONFIGS = ("text_config", "llm_config")
_DTYPES = ("F8_", "F6_", "F4")
"""Beginnings of the dtypes, as safetensors calls them, in which only quantized models store weights."""
_ENDINGS = {
    "weight_scale_2": "modelopt NVFP4",
    "weight_global_scale": "compressed-tensors NVFP4",
    "weight_packed": "compressed-tensors",
    "weight_zero_point": "compressed-tensors",
    "weight_shape": "compressed-tensors",
    "qweight": "GPTQ or AWQ",
    "qzeros": "GPTQ or AWQ",
    "g_idx": "GPTQ",
    "absmax": "bitsandbytes",
    "quant_map": "bitsandbytes",
    "quant_state.bitsandbytes__nf4": "bitsandbytes",
    "quant_state.bitsandbytes__fp4": "bitsandbytes",
    "SCB": "bitsandbytes",
    "_proj_blocks": "MXFP4",
    "_proj_scales": "MXFP4",
    "weight_scale": "FP8 or INT8",
    "input_scale": "FP8 or NVFP4",
    "k_scale": "an FP8 KV cache",
    "v_scale": "an FP8 KV cache",
}
"""Endings of the names of tensors that only quantized models have."""
_UNUSED = "activation_scale"
"""Ending of the input scales next to FP8 weights, which the weights do not depend on."""
_TILE_ROWS = 128
"""Rows of a weight that are dequantized at a time, to need little memory."""
_SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)


@dataclass(frozen=True)
class FP8Source:
    """The FP8 weights of a model whose other weights are not quantized."""

    block_size: tuple[int, int] | None
    """Rows and columns of a block. None: one scale for each weight."""
    weights: frozenset[str]
    """Names of the FP8 weights."""
    scales: frozenset[str]
    """Names of the scales of weights and inputs, which are not tensors of the model."""

    def dequantize(self, weight: torch.Tensor, scale: torch.Tensor, name: str) -> torch.Tensor:
        """Return weight times scale in bfloat16 [N, K]: multiplied in float32, then rounded once.

        Args:
            weight: float8_e4m3fn [N, K].
            scale: one value, or one for each block: [ceil(N / rows), ceil(K / columns)].

        Raises:
            QADError: other shapes or dtypes.
        """
        if weight.dim() != 2 or weight.dtype != torch.float8_e4m3fn or scale.dtype not in _SCALE_DTYPES:
            raise QADError(
                f"{name}: is {_describe(weight)} with a {name}{SCALE} of {_describe(scale)}. Expected float8_e4m3fn "
                "with two dimensions and a float32 or bfloat16 scale. Give the BF16 model."
            )
        result, scale = torch.empty_like(weight, dtype=torch.bfloat16), scale.float()
        if scale.numel() == 1 and (self.block_size is None or scale.dim() < 2):
            for out, part in zip(result.split(_TILE_ROWS), weight.split(_TILE_ROWS), strict=True):
                out.copy_(part.float() * scale.reshape(()))
            return result
        if self.block_size is None:
            raise QADError(
                f"{name}{SCALE}: has shape {list(scale.shape)}, but config.json has no "
                "quantization_config.weight_block_size. Restore config.json, or give the BF16 model."
            )
        expected = tuple(-(-size // block) for size, block in zip(weight.shape, self.block_size, strict=True))
        if tuple(scale.shape) != expected:
            raise QADError(
                f"{name}{SCALE}: has shape {list(scale.shape)}, expected {list(expected)} for a weight of "
                f"{list(weight.shape)} in blocks of {self.block_size[0]}x{self.block_size[1]}. Download it again."
            )
        rows, columns = self.block_size
        scale = scale.repeat_interleave(columns, 1).narrow(1, 0, weight.shape[1])
        for out, part, row_scale in zip(result.split(rows), weight.split(rows), scale, strict=True):
            out.copy_(part.float() * row_scale)
        return result


def find_quantization(directory: Path, config: dict, dtypes: Mapping[str, str]) -> FP8Source | None:
    """Return the FP8 weights of a model, or None if it is not quantized.

    Args:
        dtypes: tensor name -> dtype as safetensors calls it.

    Raises:
        QADError: the model is quantized in another way, or its config says so.
    """
    key, declared = _declared(directory, config)
    scales = {name for name in dtypes if name.endswith(SCALE)}
    unused = {name for name in dtypes if name.endswith(_UNUSED)} if scales else set()
    fp8_weights = {name.removesuffix(SCALE) for name in scales}
    others = _other_quantized({name: dtypes[name] for name in set(dtypes) - scales - unused - fp8_weights})
    if not scales and not others:
        if declared is None:
            return None
        raise QADError(
            f"{directory}: {key} declares quantized weights ({_method(declared)}), but the tensors are not quantized. "
            f"Remove {key} if these are the weights of the BF16 model."
        )
    if others or (declared or {}).get("quant_method") not in (None, "fp8"):
        name, method = next(iter((others or {min(fp8_weights): "FP8"}).items()))
        dtype = str(dtypes.get(name))
        without = f", without {name}{SCALE}" if scales and name in others and dtype.startswith(_DTYPES) else ""
        raise QADError(
            f"{directory}: is quantized ({_method(declared) if declared else method}), for example {name} "
            f"({dtype}{without}). Give the BF16 model that it was made from."
        )
    for name in sorted(fp8_weights):
        if dtypes.get(name) != "F8_E4M3":
            raise QADError(
                f"{directory}: {name} is {dtypes.get(name, 'missing')}, but has a scale, {name}{SCALE}. Expected an "
                "F8_E4M3 weight. Download the model again."
            )
    block_size = _block_size(directory, (declared or {}).get("weight_block_size"))
    return FP8Source(block_size, frozenset(fp8_weights), frozenset(scales | unused))


def without_quantization(config: dict) -> dict:
    """Return a config.json without its declarations of quantized weights."""
    plain = {key: value for key, value in config.items() if key not in _CONFIG_KEYS}
    for key in _INNER_CONFIGS:
        if isinstance(plain.get(key), dict):
            plain[key] = without_quantization(plain[key])
    return plain


def _declared(directory: Path, config: dict) -> tuple[str, dict | None]:
    """Return (what declares the quantization, the declaration), or a declaration of None."""
    inner = [(f"{name}.", config[name]) for name in _INNER_CONFIGS if isinstance(config.get(name), dict)]
    for prefix, part in (("", config), *inner):
        for key in _CONFIG_KEYS:
            if isinstance(part.get(key), dict) and part[key]:
                return f"{prefix}{key} of config.json", part[key]
    for name, key in _CONFIG_FILES.items():
        if (directory / name).is_file():
            content = read_json(directory / name)
            content = content if key is None else content.get(key)
            algorithms = ("quant_algo", "kv_cache_quant_algo")
            if isinstance(content, dict) and (key is None or any(content.get(a) for a in algorithms)):
                return name, content
    return "", None


def _other_quantized(dtypes: Mapping[str, str]) -> dict[str, str]:
    """Return {name: method} with one tensor that only a quantized model has, the most specific; or an empty dict."""
    names = sorted(dtypes)
    for ending, method in _ENDINGS.items():
        if name := next((name for name in names if name.endswith(ending)), None):
            return {name: method}
    return next(({name: dtypes[name]} for name in names if dtypes[name].startswith(_DTYPES)), {})


def _method(declared: dict) -> str:
    """Return the method of a declaration with its details, such as "fp8, blocks of 128x128"."""
    bits = declared.get("bits", declared.get("w_bit"))
    group = declared.get("group_size", declared.get("q_group_size"))
    block = declared.get("weight_block_size")
    is_4bit, is_8bit = declared.get("load_in_4bit"), declared.get("load_in_8bit")
    details = (
        declared.get("quant_method", "modelopt" if "quant_algo" in declared else None),
        declared.get("quant_algo"),
        declared.get("format"),
        f"{bits} bits" if bits else "4 bits" if is_4bit else "8 bits" if is_8bit else None,
        f"groups of {group}" if group else None,
        f"blocks of {'x'.join(map(str, block))}" if isinstance(block, list) else None,
        f"KV cache {declared['kv_cache_quant_algo']}" if declared.get("kv_cache_quant_algo") else None,
    )
    return ", ".join(str(detail) for detail in details if detail) or "unknown method"


def _block_size(directory: Path, value: object) -> tuple[int, int] | None:
    if value is None:
        return None
    if isinstance(value, list) and len(value) == 2 and all(type(size) is int and size > 0 for size in value):
        return value[0], value[1]
    raise QADError(
        f"{directory / 'config.json'}: quantization_config.weight_block_size is {value!r}, expected two positive "
        "integers such as [128, 128]. Download it again."
    )


def _describe(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
