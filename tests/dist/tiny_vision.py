"""Tiny vision-language models of both families, with the names of the Hub, and what transformers computes."""

import json
from pathlib import Path

import numpy as np
import tiny_hybrids
import tiny_job
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from megatron_qad.models.families import family_of

IMAGE_TOKEN, START, END = 110, 111, 112
"""Ids of ``<image>``, ``<img>`` and ``</img>`` among the 120 of the models."""
TILE = 16
"""Side of a tile in pixels: 4 x 4 patches, 4 features."""
_VISION = {
    "force_image_size": TILE,
    "patch_size": 4,
    "vit_hidden_size": 32,
    "projector_hidden_size": 48,
    "img_context_token_id": IMAGE_TOKEN,
    "max_dynamic_patch": 4,
    "torch_dtype": "float32",
    "vision_config": {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "patch_size": 4,
        "max_resolution": 32,
        "num_cls_tokens": 3,
    },
}
_LLAMA = tiny_job.LLAMA | {"max_position_embeddings": 512, "torch_dtype": "float32"}
CONFIGS = {
    "nemotron": _VISION
    | {"architectures": ["NemotronH_Nano_VL_V2"], "model_type": "NemotronH_Nano_VL_V2"}
    | {"llm_config": tiny_hybrids.NEMOTRON_H | {"hybrid_override_pattern": "M-M*-M-*", "num_hidden_layers": 8}},
    "llama": _VISION
    | {"architectures": ["Llama_Nemotron_Nano_VL"], "model_type": "Llama_Nemotron_Nano_VL", "llm_config": _LLAMA},
}


def language_model(directory: Path, output: Path) -> torch.nn.Module:
    """Return transformers' language model of a checkpoint, written to ``output`` without its vision tensors."""
    output.mkdir()
    config = json.loads((directory / "config.json").read_text())["llm_config"]
    (output / "config.json").write_text(json.dumps(config))
    prefix, tensors = "language_model.", load_file(directory / "model.safetensors")
    text = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    save_file(text, output / "model.safetensors", metadata={"format": "pt"})
    return tiny_hybrids.by_transformers(output)


def reference_logits(directory: Path, output: Path, tokens: torch.Tensor, tiles: torch.Tensor) -> torch.Tensor:
    """Return the logits [b, s, V] of rows whose placeholders stand for the features of ``tiles``, in order.

    The encoder is a ``RadioModel`` whose weights transformers loads and renames itself.
    """
    from transformers.models.radio import RadioConfig, RadioModel

    config = json.loads((directory / "config.json").read_text())
    settings, tensors = family_of(config).vision(config), load_file(directory / "model.safetensors")
    radio = RadioConfig(
        hidden_size=settings.width,
        num_hidden_layers=settings.num_blocks,
        num_attention_heads=settings.num_heads,
        mlp_ratio=settings.ffn / settings.width,
        patch_size=settings.patch_size,
        max_img_size=settings.table_side * settings.patch_size,
        num_cls_tokens=settings.num_prefix_tokens,
        num_registers=0,
        summary_idxs=[0],
    )
    source = output.with_name(f"{output.name}_radio")
    source.mkdir()
    radio.save_pretrained(source)
    conditioner = {"norm_mean": settings.mean, "norm_std": settings.std}
    weights = {name.removeprefix("vision_model."): t for name, t in tensors.items() if name.startswith("vision_model.")}
    weights |= {f"radio_model.input_conditioner.{n}": torch.tensor(v).view(3, 1, 1) for n, v in conditioner.items()}
    weights["radio_model.summary_idxs"] = torch.tensor([0])
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    encoder, model = RadioModel.from_pretrained(source).eval(), language_model(directory, output)
    with torch.no_grad():
        patches = encoder(tiles.float() / 255).features
        side = settings.tile_size // settings.patch_size
        grid = patches.view(len(tiles), side // 2, 2, side // 2, 2, settings.width)
        x = torch.einsum("nrickw->nrcikw", grid).reshape(-1, settings.projector_inputs)
        w = {name: t for name, t in tensors.items() if name.startswith("mlp1.")}
        if settings.projector == "squared_relu":
            x = torch.nn.functional.rms_norm(x, x.shape[-1:], w["mlp1.0.weight"], 1e-5)
            features = (x @ w["mlp1.1.weight"].t()).relu().square() @ w["mlp1.3.weight"].t()
        else:
            x = torch.nn.functional.layer_norm(x, x.shape[-1:], w["mlp1.0.weight"], w["mlp1.0.bias"])
            x = torch.nn.functional.gelu(x @ w["mlp1.1.weight"].t() + w["mlp1.1.bias"])
            features = x @ w["mlp1.3.weight"].t() + w["mlp1.3.bias"]
        embeddings = model.get_input_embeddings()(tokens)
        embeddings[tokens == IMAGE_TOKEN] = features
        return model(inputs_embeds=embeddings, use_cache=False).logits


_WORDS = 110
_SPECIAL = ("<image>", "<img>", "</img>", "<|user|>", "<|assistant|>", "</s>")
_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_tokenizer(directory: Path) -> Path:
    """Write a tokenizer whose words are ``w0`` to ``w109``, followed by the special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(_WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens(list(_SPECIAL))
    fast = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="w0")
    fast.chat_template = _TEMPLATE
    fast.save_pretrained(directory)
    return directory


def write_chats(directory: Path, *, num_chats: int, seed: int = 0) -> Path:
    """Write pictures of noise and chats.jsonl with one or two of them, or none, in each chat of up to 31 tokens."""
    rng = np.random.default_rng(seed)
    (directory / "pictures").mkdir(parents=True)

    def words(count: int) -> str:
        return " ".join(f"w{i}" for i in rng.integers(1, _WORDS, count))

    lines = []
    for i in range(num_chats):
        content: list[dict] = [{"type": "text", "text": words(int(rng.integers(2, 5)))}]
        for k, size in enumerate(((16, 16), (32, 16), (16, 20))[: i % 3]):
            picture = Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
            picture.save(directory / "pictures" / f"{i}_{k}.png")
            content.insert(int(rng.integers(0, 2)), {"type": "image", "path": f"pictures/{i}_{k}.png"})
        answer = {"role": "assistant", "content": words(int(rng.integers(2, 5)))}
        lines.append(json.dumps({"messages": [{"role": "user", "content": content}, answer]}))
    (directory / "chats.jsonl").write_text("\n".join(lines))
    return directory / "chats.jsonl"


def write_data(prefix: Path, model: str, *, num_chats: int = 40) -> Path:
    """Prepare chats with pictures for a model of ``CONFIGS``, as megatron-qad prepare does."""
    from megatron_qad.config.vision import image_settings
    from megatron_qad.data.prepare import prepare_data
    from megatron_qad.data.prepare_options import PrepareOptions
    from megatron_qad.data.tokenizer import load_tokenizer

    tokenizer = write_tokenizer(prefix.with_name(f"{prefix.name}_tokenizer"))
    chats = write_chats(prefix.with_name(f"{prefix.name}_chats"), num_chats=num_chats)
    images = image_settings(CONFIGS[model], load_tokenizer(str(tokenizer)).vocab.get)
    prepare_data(PrepareOptions([str(chats)], str(tokenizer), str(prefix), images=images, max_bad_fraction=0))
    return prefix
