"""Compare the rules for NVFP4 block scales: squared error and time on weights of a model and on random tensors.

    python tools/bench_scale_rules.py [--hf-model DIR] [--layers 6]

Prints a Markdown table. The error of a rule is the sum of squared errors, divided by that of ``max``; for random
tensors it is the mean of this ratio over seeds, with its standard error. Weights are bfloat16, each with its own
global scale, except that q, k, v and gate, up share one. Times are for choosing the block scales and fake-quantizing,
in one thread: medians, per million weights. ``examples/smollm2_135m/extract.py`` writes a model.
"""

import argparse
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from safetensors import safe_open

from megatron_qad.formats.block_scales import SCALE_RULES
from megatron_qad.formats.common import tensor_amax
from megatron_qad.formats.nvfp4_format import NVFP4

RULES = [rule for rule in SCALE_RULES if rule != "local_hessian"]  # it needs the inputs of the layer
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf-model", type=Path, help="Hugging Face directory in BF16; default: random tensors only")
    parser.add_argument("--layers", type=int, default=6, help="number of layers to read, spread over the model")
    parser.add_argument("--size", type=int, default=512, help="rows and columns of random tensors")
    parser.add_argument("--seeds", type=int, default=16, help="number of random tensors of each kind")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls per rule")
    options = parser.parse_args()
    torch.set_num_threads(1)
    kinds = dict(model_weights(options.hf_model, options.layers)) if options.hf_model else {}
    for seed in range(options.seeds):
        for kind, weight in random_tensors(options.size, seed):
            kinds.setdefault(kind, []).append([[weight]])
    print("| weights | " + " | ".join(f"`{rule}`" for rule in RULES) + " |")
    print("|---|" + "---:|" * len(RULES))
    for kind, cases in kinds.items():
        ratios: dict[str, list[float]] = {rule: [] for rule in RULES}
        for groups in cases:
            errors = {rule: sum(squared_error(group, rule) for group in groups) for rule in RULES}
            for rule in RULES:
                ratios[rule].append(errors[rule] / errors["max"])
        print(f"| {kind} | " + " | ".join(cell(ratios[rule]) for rule in RULES) + " |", flush=True)
    times = milliseconds(dict(random_tensors(1024, seed=0))["normal"], options.repeats)
    print("| ms per million weights | " + " | ".join(f"{times[rule]:.1f}" for rule in RULES) + " |")
    frozen = {
        rule: frozen_scales(dict(random_tensors(1024, seed=0))["normal"], rule, options.repeats) for rule in RULES
    }
    for i, title in enumerate(("frozen: ms per million weights", "beyond 6 times the scale", "saturated, masked")):
        cells = (f"{frozen[rule][i]:.1f}" if i == 0 else f"{frozen[rule][i]:.2%}" for rule in RULES)
        print(f"| {title} | {' | '.join(cells)} |")


def cell(ratios: list[float]) -> str:
    error = statistics.stdev(ratios) / len(ratios) ** 0.5 if len(ratios) > 1 else 0.0
    return f"{statistics.mean(ratios):.4f}" + (f" ±{error:.4f}" if error else "")


def random_tensors(size: int, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, bfloat16 weight [size, size]) for each kind of random tensor."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(size, size, generator=generator) * 0.02
    yield "normal", normal.bfloat16()
    yield "uniform", (torch.rand(size, size, generator=generator) - 0.5).bfloat16()
    for degrees in (2, 3, 5):
        chi2 = torch.randn(degrees, size, size, generator=generator).square().sum(0)
        yield f"Student t, {degrees} degrees of freedom", (normal / (chi2 / degrees).sqrt()).bfloat16()
    for sigma in (2, 4):
        rows = torch.exp(sigma * torch.randn(size, 1, generator=generator))
        yield f"normal, rows of log-normal size (sigma {sigma})", (normal * rows).bfloat16()


def model_weights(directory: Path, num_layers: int) -> Iterator[tuple[str, list[list[list[torch.Tensor]]]]]:
    """Yield (kind of linear, weights): one case per kind, a list of groups of weights that share a scale."""
    names = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            names |= {name: path for name in file.keys() if ".layers." in name and name.endswith("_proj.weight")}
    layers = sorted({int(name.split(".layers.")[1].split(".")[0]) for name in names})
    chosen = {layers[i * (len(layers) - 1) // max(1, num_layers - 1)] for i in range(num_layers)}
    kinds: dict[str, dict[int, list[torch.Tensor]]] = {}
    for name, path in names.items():
        layer, projection = int(name.split(".layers.")[1].split(".")[0]), name.split(".")[-2]
        if layer in chosen:
            kind = next((", ".join(fused) for fused in FUSED if projection in fused), projection)
            with safe_open(path, "pt") as file:
                kinds.setdefault(kind, {}).setdefault(layer, []).append(file.get_tensor(name).bfloat16())
    for kind, groups in sorted(kinds.items()):
        yield f"{directory.name}, {kind}", [list(groups.values())]
    yield f"{directory.name}, all", [[group for groups in kinds.values() for group in groups.values()]]


def squared_error(group: list[torch.Tensor], rule: str) -> float:
    """Return the sum of squared quantization errors of weights that share a scale."""
    amax = torch.stack([tensor_amax(weight) for weight in group]).amax()
    scale = NVFP4.scale_from_amax(amax, rule=rule)
    return sum(
        float((NVFP4.rounded(weight, scale, name="weight", rule=rule).double() - weight.double()).square().sum())
        for weight in group
    )


def milliseconds(weight: torch.Tensor, repeats: int) -> dict[str, float]:
    """Return the median time of each rule in ms per million weights. The rules take turns in each repeat."""
    times: dict[str, list[float]] = {rule: [] for rule in RULES}
    scales = {rule: NVFP4.scale_from_amax(tensor_amax(weight), rule=rule) for rule in RULES}
    for _ in range(repeats):
        for rule in RULES:
            copy = weight.clone()
            start = time.perf_counter()
            NVFP4.fake_quant_list_([copy], scales[rule].reshape(1), ["weight"], rule)
            times[rule].append((time.perf_counter() - start) * 1e3 / (weight.numel() / 1e6))
    return {rule: statistics.median(values) for rule, values in times.items()}


def frozen_scales(weight: torch.Tensor, rule: str, repeats: int) -> tuple[float, float, float]:
    """Return the time of quantizing with given scales, in ms per million weights, and two shares of the weights: those
    beyond 6 times their scale, and those beyond the limit of their block, whose gradient training masks."""
    scale = NVFP4.scale_from_amax(tensor_amax(weight), rule=rule)
    block_scales = NVFP4.block_scales(weight, scale, rule=rule)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        NVFP4.fake_quant_fixed(weight, scale, block_scales)
        times.append((time.perf_counter() - start) * 1e3 / (weight.numel() / 1e6))
    magnitudes = weight.float().abs().view(-1, NVFP4.block_size)
    shares = [
        float((magnitudes > limits.reshape(-1, 1)).float().mean())
        for limits in (6 * scale * block_scales.float(), NVFP4.saturation_limits(scale, block_scales))
    ]
    return statistics.median(times), *shares


if __name__ == "__main__":
    main()
