"""Changes to a good export that servers do not notice, or notice late: weights, scales, configurations, tokenizers."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from megatron_qad.checkpoint.layouts import PACKED_LAYOUTS
from megatron_qad.formats import nvfp4

LAYERS = "model.layers.0", "model.layers.1"
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Mutation:
    """A change to an export of the models in ``models``."""

    name: str
    change: Callable[["Export"], None]
    seen_by: str = "against"
    """What finds it without the sums of files: "against" (--against), "calibration" (calibration.json), or "sums", if
    only the sums find it."""
    models: tuple[str, ...] = ("llama", "qwen3_moe")


class Export:
    """A copy of a good export, to be changed."""

    def __init__(self, directory: Path, layout: str, original: Path):
        self.directory, self.original = directory, original
        self._layout = PACKED_LAYOUTS[layout]

    def tensors(self, change: Callable[[Tensors], None]) -> None:
        """Change the tensors."""
        file = self.directory / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})

    def json(self, name: str, change: Callable[[dict], object]) -> None:
        """Change a JSON file."""
        content = json.loads((self.directory / name).read_text())
        change(content)
        (self.directory / name).write_text(json.dumps(content, indent=2))

    def part(self, module: str, role: str) -> str:
        """Return the name of a stored part of a linear in NVFP4."""
        return f"{module}.{self._layout.parts('nvfp4')[role][0]}"

    def parts(self, module: str) -> list[str]:
        """Return the names of all parts."""
        return [self.part(module, role) for role in self._layout.parts("nvfp4")]

    def scale(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the global scale that a stored scalar means, or the scalar that a scale is stored as."""
        return 1 / tensor if self._layout.stored("nvfp4").is_reciprocal else tensor


def _on_tensors(change: Callable[[Export, Tensors], None]) -> Callable[[Export], None]:
    return lambda export: export.tensors(lambda tensors: change(export, tensors))


def swap(first: str, second: str, *roles: str) -> Callable[[Export], None]:
    """Swap two linears, or the parts of them with these roles."""

    def change(export: Export, tensors: Tensors) -> None:
        names = [[export.part(m, role) for role in roles] if roles else export.parts(m) for m in (first, second)]
        for one, other in zip(*names, strict=True):
            tensors[one], tensors[other] = tensors[other], tensors[one]

    return _on_tensors(change)


def swap_layers(export: Export, tensors: Tensors) -> None:
    first = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{LAYERS[0]}.")}
    for name, tensor in first.items():
        other = name.replace(LAYERS[0], LAYERS[1])
        tensors[name], tensors[other] = tensors[other], tensor


def replace(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Export], None]:
    """Replace an unquantized tensor."""
    return _on_tensors(lambda export, tensors: tensors.update({name: value(tensors[name])}))


def part(modules: str | tuple[str, ...], role: str, value: Callable[[torch.Tensor], torch.Tensor]):
    """Replace a part of some linears; scalars are given and returned as scales, also if their reciprocal is stored."""

    def change(export: Export, tensors: Tensors) -> None:
        for module in (modules,) if isinstance(modules, str) else modules:
            name = export.part(module, role)
            tensor = tensors[name]
            is_scalar = role in ("weight_scale", "input_scale")
            tensors[name] = export.scale(value(export.scale(tensor))) if is_scalar else value(tensor)

    return _on_tensors(change)


def _as_bytes(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Apply a change to the bytes of float8 numbers."""
    return lambda tensor: change(tensor.view(torch.uint8)).view(tensor.dtype)


def requantize(module: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Export], None]:
    """Replace a weight by another value in the same global scale."""

    def change(export: Export, tensors: Tensors) -> None:
        names = [export.part(module, role) for role in ("weight", "block_scale")]
        scale = export.scale(tensors[export.part(module, "weight_scale")].reshape(()))
        weight = value(nvfp4.dequantize(*(tensors[name] for name in names), scale)).contiguous()
        tensors |= dict(zip(names, nvfp4.quantize(weight, scale), strict=True))

    return _on_tensors(change)


def swizzled(scales: torch.Tensor) -> torch.Tensor:
    """Return block scales in the order of tensor cores, whose tiles have 128 rows; here as many as there are."""
    rows, columns = scales.shape
    tiles = scales.reshape(4, rows // 4, columns // 4, 4)
    return tiles.permute(2, 1, 0, 3).reshape(rows, columns)


def flip_bit(tensor: torch.Tensor, bit: int) -> torch.Tensor:
    changed = tensor.contiguous().view(torch.uint8).flatten().clone()
    changed[len(changed) // 2] ^= 1 << bit
    return changed.view(tensor.dtype).view(tensor.shape)


def config(**entries) -> Callable[[Export], None]:
    return lambda export: export.json("config.json", lambda content: content.update(entries))


def without(*keys: str, file: str = "config.json") -> Callable[[Export], None]:
    return lambda export: export.json(file, lambda content: [content.pop(key, None) for key in keys])


def tokenizer(change: Callable[[dict], object]) -> Callable[[Export], None]:
    return lambda export: export.json("tokenizer.json", change)


def _swap_ids(content: dict) -> None:
    vocabulary = content["model"]["vocab"]
    vocabulary["w7"], vocabulary["w8"] = vocabulary["w8"], vocabulary["w7"]


def remove(*names: str) -> Callable[[Export], None]:
    def change(export: Export) -> None:
        for name in names:
            (export.directory / name).unlink()

    return change


def empty(name: str) -> Callable[[Export], None]:
    return lambda export: (export.directory / name).write_text("")


def _new_template(export: Export) -> None:
    (export.directory / "chat_template.jinja").write_text("{{ messages }}")


ATTENTION, MLP = f"{LAYERS[0]}.self_attn", f"{LAYERS[0]}.mlp"
Q, K, V, O = (f"{ATTENTION}.{x}_proj" for x in "qkvo")  # noqa: E741 (the projection's name)
GATE, UP, DOWN = (f"{MLP}.{x}_proj" for x in ("gate", "up", "down"))
OTHER_DOWN, OTHER_O = DOWN.replace("layers.0", "layers.1"), O.replace("layers.0", "layers.1")
NORM = f"{LAYERS[0]}.input_layernorm.weight"
OTHER_NORM = f"{LAYERS[0]}.post_attention_layernorm.weight"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
EXPERTS = tuple(f"{MLP}.experts.{i}" for i in range(2))
_DENSE, _MOE = ("llama",), ("qwen3_moe",)


def _swap_tensors(first: str, second: str) -> Callable[[Export], None]:
    return _on_tensors(lambda export, t: t.update({first: t[second].clone(), second: t[first].clone()}))


MUTATIONS = [
    # Weights in the wrong place or order.
    Mutation("layers swapped", _on_tensors(swap_layers)),
    Mutation("o_proj of two layers swapped", swap(O, OTHER_O)),
    Mutation("gate and up swapped", swap(GATE, UP), models=_DENSE),
    Mutation("k and v swapped", swap(K, V)),
    Mutation("experts swapped", swap(f"{EXPERTS[0]}.down_proj", f"{EXPERTS[1]}.down_proj"), models=_MOE),
    Mutation("gate and up of an expert swapped", swap(f"{EXPERTS[0]}.gate_proj", f"{EXPERTS[0]}.up_proj"), models=_MOE),
    Mutation("square o_proj transposed", requantize(O, lambda w: w.T)),
    Mutation(
        "rows of q in another rotary order",
        requantize(Q, lambda w: w.view(4, 2, -1, w.shape[1]).transpose(1, 2).reshape(w.shape)),
    ),
    Mutation("two rows of o_proj swapped", requantize(O, lambda w: w[[1, 0, *range(2, len(w))]])),
    Mutation("a row of o_proj zero", requantize(O, lambda w: torch.cat([torch.zeros_like(w[:1]), w[1:]]))),
    Mutation("nibbles swapped", part(O, "weight", lambda w: (w << 4) | (w >> 4))),
    Mutation("signs of o_proj flipped", part(O, "weight", lambda w: w ^ 0x88)),
    Mutation("weight all zero", part(O, "weight", torch.zeros_like)),
    Mutation("experts rotated in the router", replace(f"{MLP}.gate.weight", lambda w: w.roll(1, 0)), models=_MOE),
    Mutation("norm all zero", replace(NORM, torch.zeros_like)),
    Mutation("norm all one", replace(NORM, torch.ones_like)),
    Mutation("norm minus one", replace(NORM, lambda w: w - 1)),
    Mutation("norms swapped", _swap_tensors(NORM, OTHER_NORM)),
    Mutation("embedding shifted by a row", replace(EMBEDDING, lambda w: w.roll(1, 0))),
    Mutation("embedding all zero", replace(EMBEDDING, torch.zeros_like)),
    Mutation("head is the embedding", _on_tensors(lambda e, t: t.update({HEAD: t[EMBEDDING].clone()}))),
    # Scales of weights.
    Mutation("block scales all one", part(O, "block_scale", torch.ones_like)),
    Mutation("block scales doubled", part(O, "block_scale", lambda s: (s.float() * 2).clamp(max=448).to(s.dtype))),
    Mutation("block scales of another layer", swap(DOWN, OTHER_DOWN, "block_scale"), models=_DENSE),
    Mutation("block scales of gate and up swapped", swap(GATE, UP, "block_scale"), models=_DENSE),
    Mutation(
        "block scales of two experts swapped",
        swap(f"{EXPERTS[0]}.down_proj", f"{EXPERTS[1]}.down_proj", "block_scale"),
        models=_MOE,
    ),
    Mutation("block scales swizzled", part(O, "block_scale", _as_bytes(swizzled))),
    Mutation("block scales reversed in each row", part(O, "block_scale", _as_bytes(lambda s: s.flip(1)))),
    Mutation("global scale reciprocal", part(O, "weight_scale", lambda s: 1 / s)),
    Mutation("global scale of qkv doubled", part((Q, K, V), "weight_scale", lambda s: s * 2)),
    Mutation("global scale of o_proj doubled", part(O, "weight_scale", lambda s: s * 2)),
    Mutation("global scale of o_proj 1.75 times (6/4 of another rule)", part(O, "weight_scale", lambda s: s * 1.75)),
    Mutation("global scale of o_proj 1.2 times", part(O, "weight_scale", lambda s: s * 1.2)),
    Mutation("all scales of another layer", swap(O, OTHER_O, "block_scale", "weight_scale")),
    # Scales of inputs and of the KV cache.
    Mutation("input scale times 448", part(O, "input_scale", lambda s: s * 448), "calibration"),
    Mutation("input scale reciprocal", part(O, "input_scale", lambda s: 1 / s), "calibration"),
    Mutation("input scale halved on qkv", part((Q, K, V), "input_scale", lambda s: s / 2), "calibration"),
    Mutation(
        "input scale without its factor 1 + 2^-13", part(O, "input_scale", lambda s: s / (1 + 2**-13)), "calibration"
    ),
    Mutation("input scale of another layer", swap(O, OTHER_O, "input_scale"), "calibration"),
    Mutation("key and value scales swapped", lambda e: e.tensors(_swap_kv_scales), "calibration", _DENSE),
    # Single bits.
    Mutation("one bit of a code", part(O, "weight", lambda w: flip_bit(w, 1)), "sums"),
    Mutation("one bit of a block scale", part(O, "block_scale", lambda s: flip_bit(s, 0)), "sums"),
    Mutation("one bit of an embedding", replace(EMBEDDING, lambda w: flip_bit(w, 3)), "sums"),
    # Configuration.
    Mutation("head counts changed at equal shapes", config(num_attention_heads=8, num_key_value_heads=4, head_dim=8)),
    Mutation("rope parameters gone", without("rope_theta", "rope_parameters")),
    Mutation("rope_theta", config(rope_theta=500000.0)),
    Mutation("rope scaling added", config(rope_scaling={"rope_type": "linear", "factor": 2.0})),
    Mutation("rms_norm_eps", config(rms_norm_eps=1e-3)),
    Mutation("experts per token", config(num_experts_per_tok=1), models=_MOE),
    Mutation("norm_topk_prob", config(norm_topk_prob=False), models=_MOE),
    Mutation("activation function", config(hidden_act="gelu")),
    Mutation("sliding window added", config(sliding_window=16, use_sliding_window=True)),
    Mutation("max_position_embeddings", config(max_position_embeddings=32)),
    Mutation("head tied", config(tie_word_embeddings=True)),
    Mutation("a layer fewer", config(num_hidden_layers=1)),
    Mutation("architecture of another family", config(architectures=["MistralForCausalLM"])),
    Mutation("dtype", config(dtype="float16", torch_dtype="float16")),
    Mutation("eos token of the config", config(eos_token_id=3)),
    Mutation(
        "eos token of the generation config",
        lambda e: e.json("generation_config.json", lambda c: c.update(eos_token_id=3)),
    ),
    Mutation("generation config missing", remove("generation_config.json")),
    Mutation("quantization config gone", without("quantization_config")),
    # Tokenizer.
    Mutation("tokenizer missing", remove("tokenizer.json", "tokenizer_config.json")),
    Mutation("tokenizer empty", empty("tokenizer.json")),
    Mutation("two ids of the tokenizer swapped", tokenizer(_swap_ids)),
    Mutation("tokenizer larger than the vocabulary", tokenizer(lambda c: c["model"]["vocab"].update({"new": 500}))),
    Mutation(
        "tokenizer splits text in another way",
        tokenizer(lambda c: c.update(normalizer={"type": "Prepend", "prepend": "_"})),
    ),
    Mutation(
        "eos token of the tokenizer", lambda e: e.json("tokenizer_config.json", lambda c: c.update(eos_token="w9"))
    ),
    Mutation("chat template", _new_template, "sums"),
]


def _swap_kv_scales(tensors: Tensors) -> None:
    k, v = (next(n for n in sorted(tensors) if n.endswith(f"{x}_scale") and n.startswith(ATTENTION)) for x in "kv")
    tensors[k], tensors[v] = tensors[v], tensors[k]
