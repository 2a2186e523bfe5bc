"""Compare the speed and memory of NVFP4 and FP8 with modelopt and compressed-tensors. ``make bench`` runs it.

Prints Markdown tables. CPU tables use one thread and interleaved repeats: times are medians, and ratios are medians of
the ratios within each repeat. Extra memory is the growth of the peak resident set of a forked child during the call
(Linux's VmHWM, reset through clear_refs). It includes the tensor that a peer returns; ours works in place. With a GPU,
GPU tables follow.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from gpu_timing import median_seconds

from megatron_qad.formats import fp8, nvfp4, nvfp4_multi_tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
GPU_SIZES = (4096, 8192, 12288)
OURS = "ours: fake_quant_ given amax"
MODELOPT = "modelopt: NVFP4QTensor quantize + dequantize"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096, help="rows and columns of the tensor in the CPU tables")
    parser.add_argument("--repeats", type=int, default=7, help="timed calls per row, after one untimed call")
    parser.add_argument("--only-gpu", action="store_true", help="skip the CPU tables")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.only_gpu:
        return print_gpu_tables(options.repeats)
    small = calls(made(64, torch.float32))
    for call in small.values():
        call()  # libraries load on their first call
    # Memory comes first: later this process holds freed memory, which a child would reuse without growing.
    extra = {dtype: {name: extra_bytes(name, dtype, options.size) for name in small} for dtype in DTYPES}
    for dtype in DTYPES:
        print_cpu_table(dtype, options.size, options.repeats, extra[dtype])
    if torch.cuda.is_available():
        print_gpu_tables(options.repeats)
    else:
        print("GPU: not measured (PyTorch found no GPU).")


def calls(x: torch.Tensor) -> dict:
    """Return the calls to time, by name. In-place calls overwrite a copy of ``x``, which does not affect their time."""
    from compressed_tensors.quantization.lifecycle.forward import dequantize as ct_dequantize
    from compressed_tensors.quantization.lifecycle.forward import quantize as ct_quantize
    from compressed_tensors.quantization.quant_scheme import NVFP4
    from compressed_tensors.quantization.utils.helpers import calculate_qparams, generate_gparam
    from modelopt.torch.quantization.qtensor import FP8QTensor, NVFP4QTensor

    scale = nvfp4.global_scale_from_amax(nvfp4.tensor_amax(x))
    scale_4o6 = nvfp4.global_scale_from_amax(nvfp4.tensor_amax(x), rule="four_over_six")
    fp8_scale = fp8.scale_from_amax(nvfp4.tensor_amax(x))
    work, source = x.clone(), x.clone()
    peer_global_scale = generate_gparam(x.float().min(), x.float().max())

    def modelopt():
        quantized, block_scale, _ = NVFP4QTensor.quantize(source, 16, weights_scaling_factor_2=scale)
        return quantized.dequantize(scale=block_scale, double_scale=scale, block_sizes={-1: 16})

    def modelopt_fp8():
        quantized, _ = FP8QTensor.quantize(source, fp8_scale)
        return quantized.dequantize(scale=fp8_scale)

    def compressed_tensors():
        wide, args = source.float(), NVFP4["weights"]
        blocks = wide.view(len(wide), -1, 16)
        block_scale, zero = calculate_qparams(blocks.amin(-1), blocks.amax(-1), args, peer_global_scale)
        block_scale = block_scale.float()
        codes = ct_quantize(wide, block_scale, zero.float(), args, global_scale=peer_global_scale)
        return ct_dequantize(codes, block_scale, args=args, global_scale=peer_global_scale, dtype=source.dtype)

    def restored(call):
        """Restore the values before each call: these rules take longer for unquantized blocks."""
        return lambda: call(work.copy_(source))

    return {
        OURS: lambda: nvfp4.fake_quant_(work, scale),
        "ours: amax": lambda: nvfp4.tensor_amax(source),
        "ours: quantize + dequantize": lambda: nvfp4.dequantize(*nvfp4.quantize(source, scale), scale, source.dtype),
        MODELOPT: modelopt,
        "compressed-tensors: quantize + dequantize": compressed_tensors,
        "ours: fake_quant_, rule four_over_six": restored(
            lambda w: nvfp4.fake_quant_(w, scale_4o6, rule="four_over_six")
        ),
        "ours: fake_quant_, rule mse": restored(lambda w: nvfp4.fake_quant_(w, scale, rule="mse")),
        "ours: FP8 fake_quant_": lambda: fp8.fake_quant_(work, fp8_scale),
        "modelopt: FP8QTensor quantize + dequantize": modelopt_fp8,
    }


def made(size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(size, size, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(dtype)


def print_cpu_table(dtype: str, size: int, repeats: int, extra: dict[str, str]) -> None:
    timed = calls(made(size, DTYPES[dtype]))
    seconds = {name: [] for name in timed}
    for repeat in range(repeats + 1):
        for name, call in timed.items():
            start = time.perf_counter()
            call()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(times) for name, times in seconds.items()}

    def ratio(times: list[float]) -> float:
        """Return the median ratio within a repeat, because other load on the machine lasts longer than a repeat."""
        return statistics.median(time / ours for time, ours in zip(times, seconds[OURS], strict=True))

    print(f"{dtype}, {size}x{size}, one CPU thread, median of {repeats}:\n")
    print("| | ms | fastest to slowest | times ours | extra bytes per element |\n|---|---|---|---|---|")
    for name, times in seconds.items():
        print(
            f"| {name} | {median[name] * 1e3:.0f} | {min(times) * 1e3:.0f} to {max(times) * 1e3:.0f} "
            f"| {ratio(times):.1f} | {extra[name]} |"
        )
    print(f"\nmodelopt's round trip takes {ratio(seconds[MODELOPT]):.1f} times as long as ours.\n", flush=True)


def extra_bytes(name: str, dtype: str, size: int) -> str:
    """Return the peak bytes per element that one call adds, measured in a child process."""
    reader, writer = os.pipe()
    if child := os.fork():
        os.close(writer)
        os.waitpid(child, 0)
        with os.fdopen(reader) as answer:
            return answer.read() or "not measured"
    try:
        call = calls(made(size, DTYPES[dtype]))[name]
        before = resident("VmRSS")
        with open("/proc/self/clear_refs", "w") as clear:
            clear.write("5")  # resets the peak
        result = call()
        os.write(writer, f"{(resident('VmHWM') - before) / size**2:.2f}".encode())
        del result
    finally:
        os._exit(0)


def resident(field: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


def print_gpu_tables(repeats: int) -> None:
    print(f"{torch.cuda.get_device_name()}, bfloat16, in place given amax, median of {4 * repeats}:\n")
    print("| | copy GB/s | ours GB/s | of copy | modelopt dynamic / ours |\n|---|---|---|---|---|")
    for size in GPU_SIZES:
        x = made(size, torch.bfloat16).cuda()
        num_bytes = 2 * x.numel() * x.element_size()
        copy, ours = (median_seconds(call, 4 * repeats) for call in (copy_call(x), in_place_call(x)))
        peer = median_seconds(modelopt_call(x), 4 * repeats)
        rates = f"{num_bytes / copy / 1e9:.0f} | {num_bytes / ours / 1e9:.0f} | {copy / ours:.0%}"
        print(f"| {size}x{size} | {rates} | {peer / ours:.2f} |")
    experts = [made(1024, torch.bfloat16).cuda() for _ in range(256)]
    one_call, loop = (median_seconds(call, 4 * repeats) for call in list_calls(experts))
    print(f"\n256 experts of 1024x1024: one launch {one_call * 1e3:.2f} ms, a loop {loop * 1e3:.2f} ms.")


def copy_call(x: torch.Tensor) -> Callable:
    """Return a copy that reads and writes as many bytes as in-place fake quantization."""
    other = torch.empty_like(x)
    return lambda: other.copy_(x)


def in_place_call(x: torch.Tensor) -> Callable:
    """Return our in-place fake quantization with a given amax."""
    scale = nvfp4.global_scale_from_amax(nvfp4.tensor_amax(x))
    return lambda: nvfp4.fake_quant_(x, scale, check=False)


def modelopt_call(x: torch.Tensor) -> Callable:
    """Return modelopt's training kernel for weights and inputs with a given amax. Needs a GPU."""
    from modelopt.torch.quantization.tensor_quant import dynamic_block_quant

    amax = nvfp4.tensor_amax(x)
    return lambda: dynamic_block_quant(x, 16, amax, None, (2, 1), (4, 3))


def list_calls(tensors: list[torch.Tensor]) -> tuple[Callable, Callable]:
    """Return in-place fake quantization of all tensors with given amaxes: as one list call, and as a loop."""
    names = [f"expert {i}" for i in range(len(tensors))]
    scales = nvfp4_multi_tensor.global_scales_from_amaxes(nvfp4_multi_tensor.amax_list(tensors), names)
    return (
        lambda: nvfp4_multi_tensor.fake_quant_list_(tensors, scales, names, check=False),
        lambda: [nvfp4.fake_quant_(x, scale, check=False) for x, scale in zip(tensors, scales, strict=True)],
    )


if __name__ == "__main__":
    main()
