"""Compare the MLPs of all experts as grouped GEMMs, as a loop over slices of the same weights, and as separate weights.

    python tools/bench_experts.py [--experts 128] [--tokens 1024] [--hidden 256] [--ffn 128] [--dtype float32]

Prints a Markdown table of a forward and a backward pass of two projections with a squared ReLU between them, for
balanced and skewed loads. Repeats are interleaved: times are medians, ratios are medians of the ratios within each
repeat. Without a GPU, one thread. The separate weights are how experts were stored before they were grouped.
"""

import argparse
import os
import statistics
from collections.abc import Callable, Sequence

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from gpu_timing import call_seconds

from megatron_qad.engine.cpu.speedups import bf16_matmul_fallback
from megatron_qad.models.grouped_product import grouped_product, looped_product

GROUPED, LOOPED, SEPARATE = "grouped", "loop over slices", "separate weights"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=128, help="number of experts on this rank")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of all experts together")
    parser.add_argument("--hidden", type=int, default=256, help="hidden size")
    parser.add_argument("--ffn", type=int, default=128, help="inner size of an expert")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=7, help="timed passes per row, after one untimed pass")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not torch.cuda.is_available():
        bf16_matmul_fallback.install()
    torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{options.experts} experts, {options.tokens} tokens, {options.hidden} x {options.ffn}, {options.dtype}\n")
    print("| load | experts | forward and backward | grouped is |\n|---|---|---|---|")
    for load in ("balanced", "skewed"):
        passes = expert_passes(
            loads(options.experts, options.tokens)[load], options.hidden, options.ffn, getattr(torch, options.dtype)
        )
        seconds = measure(passes, options.repeats)
        for name, times in seconds.items():
            ratio = statistics.median(t / ours for t, ours in zip(times, seconds[GROUPED], strict=True))
            compared = "-" if name == GROUPED else f"{ratio:.2f} times as fast"
            print(f"| {load} | {name} | {statistics.median(times) * 1e3:.3f} ms | {compared} |")


def loads(experts: int, tokens: int) -> dict[str, list[int]]:
    """Return the tokens of each expert by name of the load. "skewed": expert i has a share of about 1 / (i + 1), and
    every fourth expert has no tokens."""
    shares = torch.tensor([0.0 if i % 4 == 3 else 1 / (i + 1) for i in range(experts)], device="cpu")
    skewed = (shares / shares.sum() * tokens).long()
    skewed[0] += tokens - skewed.sum()
    balanced = [tokens // experts + (i < tokens % experts) for i in range(experts)]
    return {"balanced": balanced, "skewed": skewed.tolist()}


def expert_passes(
    load: Sequence[int], hidden: int, ffn: int, dtype: torch.dtype, seed: int = 0
) -> dict[str, Callable[[], list[torch.Tensor]]]:
    """Return functions by name that run the MLPs of all experts, on torch's default device.

    Each returns the output [tokens, hidden] and the gradients of the input [tokens, hidden] and of both weights,
    [experts, ffn, hidden] and [experts, hidden, ffn], for the same operands.
    """
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)

    def normal(*shape: int, std: float = 1.0) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32).mul_(std).to(dtype)

    x, output_grad = normal(sum(load), hidden), normal(sum(load), hidden)
    up, down = normal(len(load), ffn, hidden, std=hidden**-0.5), normal(len(load), hidden, ffn, std=ffn**-0.5)

    def with_product(product) -> list[torch.Tensor]:
        inputs = [tensor.detach().requires_grad_() for tensor in (x, up, down)]
        output = product(product(inputs[0], inputs[1], load).relu().square(), inputs[2], load)
        return [output.detach(), *torch.autograd.grad(output, inputs, output_grad)]

    separate_weights = [[w.detach().clone() for w in weight] for weight in (up, down)]

    def separate() -> list[torch.Tensor]:
        weights = [[w.requires_grad_() for w in weight] for weight in separate_weights]
        source, rows = x.detach().requires_grad_(), []
        for tokens, up_weight, down_weight in zip(source.split(list(load)), *weights, strict=True):
            inner = torch.nn.functional.linear(tokens, up_weight).relu().square()
            rows.append(torch.nn.functional.linear(inner, down_weight))
        output = torch.cat(rows)
        source_grad, *grads = torch.autograd.grad(output, [source, *weights[0], *weights[1]], output_grad)
        return [output.detach(), source_grad, grads[: len(load)], grads[len(load) :]]

    return {
        GROUPED: lambda: with_product(grouped_product),
        LOOPED: lambda: with_product(looped_product),
        SEPARATE: separate,
    }


def measure(passes: dict[str, Callable], repeats: int) -> dict[str, list[float]]:
    """Return the seconds of each repeat by name; the passes alternate."""
    for run in passes.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(repeats):
        for name, run in passes.items():
            seconds[name].append(call_seconds(run)[0])
    return seconds


if __name__ == "__main__":
    main()
