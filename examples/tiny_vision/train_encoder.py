"""Trains the vision encoder and the projector of the example, and writes the checkpoint, with a random language model.

The trainer never trains an encoder. Here transformers' ``RadioModel`` and a projector learn, with plain torch, to tell
what a picture shows: linear probes read each property from the mean of a picture's 16 features. The probes are then
dropped. The tensors are written under the names of the checkpoints on the Hub; loaded by ``VisionEncoder``, as training
jobs do, they must give the same features.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from pictures import COLORS, PLACES, SHAPES, Picture, random_picture
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.models.radio import RadioModel

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]
from random_hybrid import initial  # noqa: E402

from megatron_qad.models.families import family_of  # noqa: E402
from megatron_qad.models.families.radio_vision import ENCODER, PROJECTOR, VisionSettings  # noqa: E402
from megatron_qad.models.vision.encoder import VisionEncoder, join_patches, radio_config  # noqa: E402

BATCH, LEARNING_RATE = 32, 2e-3
PROPERTIES = {"shape": 6, "color": 6, "digit": 10, "shape_place": 4, "digit_place": 4}
ENOUGH = 0.9
"""Share of held-out pictures for which each probe must be right; a language model learns from the same features."""
FEATURE_RMS = 0.5
"""Size of the written features, and of the random embeddings, so that neither hides the other."""


class Encoder(nn.Module):
    """The encoder and the projector of a model, to be trained.

    Args:
        settings: sizes of the model.
    """

    def __init__(self, settings: VisionSettings):
        super().__init__()
        self.settings = settings
        # In training mode its position embeddings are cropped at random.
        self.radio = RadioModel(radio_config(settings)).eval()
        for name, parameter in self.radio.named_parameters():
            if "lambda" in name:  # C-RADIO has no layer scale
                parameter.data.fill_(1.0)
                parameter.requires_grad_(False)
        self.norm = nn.RMSNorm(settings.projector_inputs, eps=1e-5)
        self.inner = nn.Linear(settings.projector_inputs, settings.projector_width, bias=False)
        self.outer = nn.Linear(settings.projector_width, settings.hidden_size, bias=False)

    def forward(self, tiles: Tensor) -> Tensor:
        """Return the features [n, tokens_per_tile, hidden] of tiles, uint8 [n, 3, side, side]."""
        patches = self.radio(tiles.float() / 255).features
        return self.outer(self.inner(self.norm(join_patches(patches, self.settings.patches_per_side))).relu().square())

    def hub_tensors(self) -> dict[str, Tensor]:
        """Return the tensors by their names on the Hub."""
        state, tensors = self.radio.state_dict(), {}
        generator, model = f"{ENCODER}.model.patch_generator", f"{ENCODER}.model"
        tensors[f"{generator}.cls_token.token"] = state["embeddings.cls_register_token"]
        tensors[f"{generator}.pos_embed"] = state["embeddings.position_embedding"]
        tensors[f"{generator}.embedder.weight"] = state["embeddings.patch_projection.weight"]
        names = {"attn.proj": "attention.output.dense"} | {n: n for n in ("mlp.fc1", "mlp.fc2", "norm1", "norm2")}
        for i in range(self.settings.num_blocks):
            theirs, hub = f"encoder.layer.{i}", f"{model}.blocks.{i}"
            for kind in ("weight", "bias"):
                for name, own in names.items():
                    tensors[f"{hub}.{name}.{kind}"] = state[f"{theirs}.{own}.{kind}"]
                parts = [state[f"{theirs}.attention.attention.{n}.{kind}"] for n in ("query", "key", "value")]
                tensors[f"{hub}.attn.qkv.{kind}"] = torch.cat(parts)
        tensors |= {f"{PROJECTOR}.{i}.weight": m.weight for i, m in ((0, self.norm), (1, self.inner), (3, self.outer))}
        return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="directory with the config.json of make_inputs.py; gets the weights")
    parser.add_argument("--steps", type=int, default=600, help="training steps (default: 600)")
    parser.add_argument("--untrained", action="store_true", help="write the weights even if the probes are wrong")
    options = parser.parse_args()
    torch.manual_seed(0)
    config = json.loads((options.model / "config.json").read_text())
    encoder = Encoder(family_of(config).vision(config))
    probes = nn.ModuleDict({name: nn.Linear(encoder.settings.hidden_size, n) for name, n in PROPERTIES.items()})
    train(encoder, probes, options.steps)
    tiles, labels = batch(np.random.default_rng(10**6), 300)  # a seed that no training step has
    shares = {name: share for name, (_, share) in scores(encoder, probes, tiles, labels).items()}
    print("held-out pictures, share of right probes: " + ", ".join(f"{n} {s:.3f}" for n, s in shares.items()))
    if min(shares.values()) < ENOUGH and not options.untrained:
        sys.exit(f"error: a probe is right for less than {ENOUGH} of the pictures; raise --steps")
    with torch.no_grad():
        encoder.outer.weight *= FEATURE_RMS / encoder(tiles[:64]).square().mean().sqrt()
    tensors = encoder.hub_tensors()
    check(encoder, tensors, tiles[:64])
    write(options.model, config, tensors)


def batch(rng: np.random.Generator, size: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Return (tiles, uint8 [size, 3, side, side]; the number of each property's value, int64 [size])."""
    pictures = [random_picture(rng) for _ in range(size)]
    tiles = torch.from_numpy(np.stack([np.asarray(picture.draw()) for picture in pictures])).permute(0, 3, 1, 2)
    return tiles, {name: torch.tensor([_number(picture, name) for picture in pictures]) for name in PROPERTIES}


def _number(picture: Picture, name: str) -> int:
    value = getattr(picture, name)
    values = {"shape": SHAPES, "color": list(COLORS), "digit": range(10)}.get(name, PLACES)
    return values.index(value)


def scores(
    encoder: Encoder, probes: nn.ModuleDict, tiles: Tensor, labels: dict[str, Tensor]
) -> dict[str, tuple[Tensor, float]]:
    """Return (cross entropy, share of right answers) of each probe."""
    mean, results = encoder(tiles).mean(dim=1), {}
    for name, probe in probes.items():
        logits = probe(mean)
        right = (logits.argmax(-1) == labels[name]).float().mean().item()
        results[name] = (nn.functional.cross_entropy(logits, labels[name]), right)
    return results


def train(encoder: Encoder, probes: nn.ModuleDict, num_steps: int) -> None:
    """Train on pictures that are drawn for each step."""
    parameters = [p for module in (encoder, probes) for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, LEARNING_RATE, weight_decay=0.01)
    warmup, started = min(50, num_steps), time.time()
    for step in range(num_steps):
        rate = min(1, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / num_steps))
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * rate
        results = scores(encoder, probes, *batch(np.random.default_rng(step), BATCH))
        optimizer.zero_grad()
        sum(loss for loss, _ in results.values()).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 100 == 99 or step + 1 == num_steps:
            shares = ", ".join(f"{name} {share:.2f}" for name, (_, share) in results.items())
            print(f"step {step + 1}, {time.time() - started:.0f} s: {shares}", flush=True)


def check(encoder: Encoder, tensors: dict[str, Tensor], tiles: Tensor) -> None:
    """Check that the written names give the trained features in the encoder that training jobs use."""
    loaded = VisionEncoder(encoder.settings, tensors, torch.float32)
    with torch.no_grad():
        error = (loaded(tiles) - encoder(tiles).flatten(0, 1)).abs().max().item()
    print(f"largest difference between the trained features and those of VisionEncoder: {error:.1e}")
    if error > 1e-4:  # sums in another order; the features are about FEATURE_RMS
        sys.exit("error: the encoder, loaded under the names of the Hub, gives other features")


def write(directory: Path, config: dict, vision: dict[str, Tensor]) -> None:
    """Write the vision tensors and random weights of the language model."""
    tensors = {name: tensor.bfloat16() for name, tensor in vision.items()}
    for tensor_map in family_of(config).tensors(config):
        for name, shape in zip(tensor_map.hf, tensor_map.hf_shapes(), strict=True):
            value = initial(name, shape) * (FEATURE_RMS / 0.02 if tensor_map.kind == "embedding" else 1)
            tensors[name] = value.to(torch.float32 if tensor_map.is_float32 else torch.bfloat16)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()
