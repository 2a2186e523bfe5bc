"""Compares the vision encoder with a plain ViT, and tests the resizing of position embeddings."""

import math

import pytest
import torch
from tiny_configs import TINY_OF_FAMILY
from torch.nn import functional

from megatron_qad.engine.errors import QADError
from megatron_qad.models.families import family_of
from megatron_qad.models.vision.encoder import VisionEncoder, join_patches
from megatron_qad.models.vision.radio_weights import resize_positions

TINY = {"force_image_size": 32, "patch_size": 4}
RADIO = {"num_hidden_layers": 2, "intermediate_size": 48, "max_resolution": 64, "num_attention_heads": 4}
RADIO |= {"patch_size": 4, "num_cls_tokens": 3}
CONFIGS = {
    name: TINY_OF_FAMILY[name] | TINY | {"vision_config": RADIO} for name in ("nemotron_vl", "llama_nemotron_vl")
}


def model_of(name: str):
    """Return the vision settings of a config, and random tensors by their Hub names."""
    config, generator = CONFIGS[name], torch.Generator().manual_seed(1)
    family = family_of(config)
    tensors = {
        t.megatron: torch.randn(t.shape, generator=generator) / math.sqrt(t.shape[-1])
        for t in family.passthrough_tensors(config)
    }
    return family.vision(config), tensors


def plain_features(settings, tensors, tiles: torch.Tensor) -> torch.Tensor:
    """Compute the features of tiles in float64, from tensors by their Hub names."""
    w = {name.removeprefix("vision_model.radio_model.model."): t.double() for name, t in tensors.items()}
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (settings.mean, settings.std))
    patches = functional.unfold((tiles.double() / 255 - mean) / std, settings.patch_size, stride=settings.patch_size)
    side = settings.tile_size // settings.patch_size
    x = patches.transpose(1, 2) @ w["patch_generator.embedder.weight"].t()
    x = x + resize_positions(w["patch_generator.pos_embed"], side, align_corners=False)
    x = torch.cat([w["patch_generator.cls_token.token"].expand(len(tiles), -1, -1), x], dim=1)

    def norm(name, x):
        return functional.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    def linear(name, x):
        return x @ w[f"{name}.weight"].t() + w[f"{name}.bias"]

    for block in range(settings.num_blocks):
        name = f"blocks.{block}"
        qkv = linear(f"{name}.attn.qkv", norm(f"{name}.norm1", x))
        q, k, v = qkv.unflatten(-1, (3, settings.num_heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
        x = x + linear(f"{name}.attn.proj", (weights @ v).transpose(1, 2).flatten(2))
        hidden = linear(f"{name}.mlp.fc1", norm(f"{name}.norm2", x))
        x = x + linear(f"{name}.mlp.fc2", hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2)
    x = x[:, settings.num_prefix_tokens :].unflatten(1, (side, side))
    features = []
    for row in range(0, side, 2):
        for column in range(0, side, 2):
            features.append(torch.cat([x[:, row + i, column + j] for i in (0, 1) for j in (0, 1)], dim=-1))
    x = torch.stack(features, dim=1)
    if settings.projector == "squared_relu":
        x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w["mlp1.0.weight"]
        x = (x @ w["mlp1.1.weight"].t()).relu().square() @ w["mlp1.3.weight"].t()
    else:
        x = functional.layer_norm(x, x.shape[-1:], w["mlp1.0.weight"], w["mlp1.0.bias"], 1e-5)
        hidden = linear("mlp1.1", x)
        x = linear("mlp1.3", hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2)
    return x.flatten(0, 1)


@pytest.mark.parametrize("name", CONFIGS)
def test_features_are_those_of_a_plain_vit(name):
    settings, tensors = model_of(name)
    encoder = VisionEncoder(settings, tensors, torch.float32).train()
    tiles = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features = encoder(tiles)
    assert settings.tokens_per_tile == 16 and features.shape == (3 * 16, settings.hidden_size)
    expected = plain_features(settings, tensors, tiles)
    # Float32 in two blocks; the values are about 1.
    torch.testing.assert_close(features.double(), expected, rtol=1e-4, atol=1e-5)
    assert not features.requires_grad and not any(module.training for module in encoder.modules())
    one_by_one = torch.cat([encoder(tile[None]) for tile in tiles])
    torch.testing.assert_close(one_by_one, features, rtol=1e-4, atol=1e-5)


def test_encoder_in_bfloat16():
    settings, tensors = model_of("nemotron_vl")
    encoder = VisionEncoder(settings, {name: t.bfloat16() for name, t in tensors.items()}, torch.bfloat16)
    tiles = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    features = encoder(tiles)
    assert features.dtype == torch.bfloat16
    error = (features.double() - plain_features(settings, tensors, tiles)).norm() / features.double().norm()
    assert error < 0.05  # rounding to 8 bits in every operation of two blocks, squared by the projector


def test_joined_patches_follow_each_other_row_by_row():
    grid = torch.arange(16).reshape(1, 16, 1)
    assert join_patches(grid, 2)[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


def test_resized_positions():
    table = torch.arange(16, dtype=torch.float32).reshape(1, 16, 1)  # 4 x 4
    assert torch.equal(resize_positions(table, 4, False), table)
    # Without aligned corners cell i of 2 is at (i + 1/2) * 2 - 1/2 of the 4 cells; with them at i * 3.
    assert resize_positions(table, 2, False).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert resize_positions(table, 2, True).flatten().tolist() == [0, 3, 12, 15]


def test_damaged_weights_are_errors():
    settings, tensors = model_of("nemotron_vl")
    name = "vision_model.radio_model.model.blocks.1.norm2.bias"
    with pytest.raises(QADError, match=f"{name}: is missing from the model's vision tensors"):
        VisionEncoder(settings, {key: t for key, t in tensors.items() if key != name}, torch.float32)
    with pytest.raises(QADError, match=r"mlp1.1.weight: has shape \[5, 5\], but the config implies \[64, 128\]"):
        VisionEncoder(settings, tensors | {"mlp1.1.weight": torch.zeros(5, 5)}, torch.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ps_version": "v1"}, "ps_version is 'v1'. Only 'v2' is supported"),
        ({"norm_mean": [1, 2]}, r"norm_mean is \[1, 2\], expected a list of three numbers"),
        ({"vit_hidden_size": "32"}, "vit_hidden_size"),
        ({"vision_config": {"args": {"model": "vit_giant"}}}, "model is 'vit_giant', expected one of vit_small"),
        ({"vision_config": {"args": {"model": "vit_base_patch16_224"}}}, "vit_hidden_size is 32, but vit_base_patch16"),
    ],
)
def test_unsupported_configs_are_errors(change, message):
    config = CONFIGS["nemotron_vl"] | change
    with pytest.raises(QADError, match=message):
        family_of(config).megatron_args(config)


@pytest.mark.parametrize(("teachers", "expected"), [(2, 10), (10, 20)])
def test_sizes_of_a_named_encoder(teachers, expected, assert_same_tensors):
    """The sizes are those that vLLM reads from vision_config.args; registers fill the class tokens up to a multiple."""
    args = {"model": "vit_small_patch16_224", "register_multiple": 10, "cpe_max_size": 256}
    args |= {"teachers": [{"name": f"teacher{i}"} for i in range(teachers)], "cls_token_per_teacher": True}
    config = TINY_OF_FAMILY["nemotron_vl"] | {"vit_hidden_size": 384, "vision_config": {"args": args}}
    settings = family_of(config).vision(config)
    assert (settings.num_blocks, settings.num_heads, settings.ffn, settings.table_side) == (12, 6, 1536, 16)
    assert settings.num_prefix_tokens == expected
    assert_same_tensors(config)
