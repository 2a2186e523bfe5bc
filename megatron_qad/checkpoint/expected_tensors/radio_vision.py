"""Expected tensors of the vision side of Nemotron VL models: a C-RADIO encoder and a projector."""

from typing import Any

from megatron_qad.checkpoint.expected_tensors.model_inventory import Inventory, is_set, positive_integer
from megatron_qad.engine import config_values as values
from megatron_qad.engine.errors import QADError

_BLOCKS_AND_FFN = {
    "vit_small_patch16_224": (12, 1536),
    "vit_base_patch16_224": (12, 3072),
    "vit_large_patch16_224": (24, 4096),
}
"""Name of a ViT in timm -> its blocks and the inner width of its MLPs. Others are a ViT-H."""


def _prefix_tokens(args: dict[str, Any]) -> int:
    """Return the number of class tokens and registers: one class per teacher, filled up to the next multiple."""
    multiple = args.get("register_multiple")
    if not isinstance(multiple, int) or multiple < 1:
        return 10
    teachers = args.get("teachers") if isinstance(args.get("teachers"), list) else []
    names = {str(teacher.get("name")) for teacher in teachers if isinstance(teacher, dict)} or {""}
    return (len(names) if is_set(args, "cls_token_per_teacher", True) else 1) // multiple * multiple + multiple


def language_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return the config of the language model inside the config of a vision-language model."""
    inner = config.get("llm_config") or config.get("text_config")
    if not isinstance(inner, dict):
        raise QADError(f"config.json: llm_config is {inner!r:.100}, expected the language model's config.")
    return inner


def add_vision(model: Inventory, config: dict[str, Any], *, projector_bias: bool) -> None:
    """Add the vision tensors of ``config`` to the inventory of the language model. They may have any dtype.

    Args:
        projector_bias: norm and linears of the projector have biases.
    """
    model.required = ("vision_model.", "mlp1.")
    model.passthrough_prefixes += model.required
    vision = config.get("vision_config")
    if not isinstance(vision, dict):
        raise QADError(f"config.json: vision_config is {vision!r:.100}, expected the encoder's config.")
    args = vision.get("args") if isinstance(vision.get("args"), dict) else {}
    blocks, ffn = _BLOCKS_AND_FFN.get(args.get("model"), (32, 5120))
    width, ffn = positive_integer(config, "vit_hidden_size"), positive_integer(vision, "intermediate_size", ffn)
    patch = positive_integer(config, "patch_size", positive_integer(vision, "patch_size", 16))
    side = positive_integer(args, "cpe_max_size", positive_integer(vision, "max_resolution", 2048)) // patch
    positions, prefix = side**2, positive_integer(vision, "num_cls_tokens", _prefix_tokens(args))
    root, carried = "vision_model.radio_model.model", model.carried
    carried[f"{root}.patch_generator.cls_token.token"] = (prefix, width)
    carried[f"{root}.patch_generator.pos_embed"] = (1, positions, width)
    carried[f"{root}.patch_generator.embedder.weight"] = (width, 3 * patch * patch)
    for block in range(values.integer(vision, "num_hidden_layers", blocks, maximum=values.MAX_LAYERS)):
        name = f"{root}.blocks.{block}"
        attention = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
        for part, shape in {**attention, "mlp.fc1": (ffn, width), "mlp.fc2": (width, ffn)}.items():
            carried[f"{name}.{part}.weight"], carried[f"{name}.{part}.bias"] = shape, shape[:1]
        for norm in ("norm1", "norm2"):
            carried[f"{name}.{norm}.weight"] = carried[f"{name}.{norm}.bias"] = (width,)
    ratio = values.number(config, "downsample_ratio", 0.5, above=0.01, maximum=1)
    inputs, middle = width * round(1 / ratio) ** 2, positive_integer(config, "projector_hidden_size")
    shapes = {
        "mlp1.0": (inputs,),
        "mlp1.1": (middle, inputs),
        "mlp1.3": (positive_integer(language_config(config), "hidden_size"), middle),
    }
    for name, shape in shapes.items():
        carried[f"{name}.weight"] = shape
        if projector_bias:
            carried[f"{name}.bias"] = shape[:1]
