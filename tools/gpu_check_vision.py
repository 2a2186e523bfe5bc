"""Checks the vision encoder of Nemotron Nano 12B V2 VL on a GPU: its error in BF16 and its time per tile."""

from collections.abc import Iterator

from gpu_rows import Machine, Row, ms, verdict

CONFIG = {
    "architectures": ["NemotronH_Nano_VL_V2"],
    "vit_hidden_size": 1280,
    "projector_hidden_size": 20480,
    "vision_config": {"args": {"model": "vit_huge_patch16_224"}},
    "llm_config": {"hidden_size": 5120},
}
TINY = CONFIG | {
    "vit_hidden_size": 64,
    "projector_hidden_size": 128,
    "force_image_size": 64,
    "vision_config": {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "max_resolution": 128,
    },
    "llm_config": {"hidden_size": 64},
}


def vision_encoder(machine: Machine) -> Iterator[Row]:
    """Measure the BF16 encoder's error against float32, and its time per tile."""
    import torch
    from gpu_timing import median_seconds

    from megatron_qad.models.families.nemotron_vl import vision
    from megatron_qad.models.families.radio_vision import passthrough_tensors
    from megatron_qad.models.vision.encoder import VisionEncoder

    settings, num_tiles = vision(TINY if machine.is_tiny else CONFIG), 2 if machine.is_tiny else 16
    torch.manual_seed(0)
    with torch.device(machine.device):
        tensors = {
            t.megatron: torch.ones(t.shape) if ".norm" in t.megatron else torch.randn(t.shape) * t.shape[-1] ** -0.5
            for t in passthrough_tensors(settings)
        }
        side = settings.tile_size
        tiles = torch.randint(0, 256, (num_tiles, 3, side, side), dtype=torch.uint8)
    numel = sum(tensor.numel() for tensor in tensors.values())
    size = f"{num_tiles} tiles of {side} px, {numel / 1e6:,.1f} M weights, bf16"
    exact = VisionEncoder(settings, tensors, torch.float32).to(machine.device)(tiles[:1])
    encoder = VisionEncoder(settings, tensors, torch.bfloat16).to(machine.device)
    del tensors
    error = ((encoder(tiles[:1]).float() - exact).norm() / exact.norm()).item()
    # Each block adds rounding errors of 2^-9 to the residual, and the projector's square doubles the relative error.
    yield Row(
        "vision encoder: error against float32", size, f"{error:.1e}", goal="0.05", verdict=verdict(error <= 0.05)
    )
    seconds = median_seconds(lambda: encoder(tiles), 3) / num_tiles
    products = settings.num_blocks * (4 * settings.width**2 + 2 * settings.width * settings.ffn)
    flops = 2 * products * (side // settings.patch_size) ** 2  # without attention's scores and the projector
    yield Row("vision encoder: a tile", size, ms(seconds), peer="-", ratio=f"{flops / seconds / 1e12:.1f} TFLOP/s")
