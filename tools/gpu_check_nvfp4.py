"""GPU check of the NVFP4 kernels: bitwise results and speed."""

from collections.abc import Iterator

from gpu_rows import NEEDS_GPU, Machine, Row, as_fast, ms, one_line, verdict


def nvfp4(machine: Machine) -> Iterator[Row]:
    """Check the bits and the speed of the NVFP4 kernels."""
    yield from nvfp4_bits(machine)
    yield from nvfp4_speed(machine)


def nvfp4_bits(machine: Machine) -> Iterator[Row]:
    """Compare the kernels with the PyTorch reference on the CPU, at values that are hard to round."""
    import torch
    from bench_nvfp4 import GPU_SIZES
    from nvfp4_values import differing_values, hard_values

    from megatron_qad.formats import nvfp4, nvfp4_multi_tensor
    from megatron_qad.formats.block_scales import KERNEL_RULES

    def differing(x, rule="max"):
        scale = nvfp4.global_scale_from_amax(nvfp4.tensor_amax(x), rule=rule)
        ours = nvfp4.fake_quant(x.to(machine.device), scale.to(machine.device), rule=rule)
        return differing_values(ours, nvfp4.fake_quant(x, scale, rule=rule))

    def row(what, size, num_differing, total):
        cell = f"{num_differing} of {total:,}"
        return Row(what, size, cell, goal="0", verdict=verdict(num_differing == 0))

    what = "NVFP4 kernel, values whose bits differ from PyTorch's"
    if machine.device == "cpu":
        yield Row(what, "-", NEEDS_GPU)
    else:
        num_differing = total = 0
        rows, dim = (16, 64) if machine.is_tiny else (512, 1024)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for rule in KERNEL_RULES:
                for exponent in (-110, -40, -8, 0):  # block scales that underflow, subnormal, normal
                    x = hard_values(rows, dim, dtype, seed=total, exponent=exponent)
                    num_differing, total = num_differing + differing(x, rule), total + x.numel()
        yield row(what, f"{rows}x{dim}, 3 types, {len(KERNEL_RULES)} rules, 4 magnitudes", num_differing, total)
        for size in (64,) if machine.is_tiny else GPU_SIZES:
            num_differing = differing(hard_values(size, size, torch.bfloat16, seed=size))
            yield row(what, f"{size}x{size}, bf16", num_differing, size**2)
    # On a CPU the list call is an in-place loop; it is compared with quantizing and dequantizing.
    count, size = (8, 32) if machine.is_tiny else (256, 1024)
    experts = [hard_values(size, size, torch.bfloat16, seed) for seed in range(count)]
    listed = [x.to(machine.device, copy=True) for x in experts]
    names = [f"expert {i}" for i in range(count)]
    scales = nvfp4_multi_tensor.global_scales_from_amaxes(nvfp4_multi_tensor.amax_list(listed), names)
    nvfp4_multi_tensor.fake_quant_list_(listed, scales, names)
    num_differing = 0
    for ours, x in zip(listed, experts, strict=True):
        scale = nvfp4.global_scale_from_amax(nvfp4.tensor_amax(x))
        num_differing += differing_values(ours, nvfp4.dequantize(*nvfp4.quantize(x, scale), scale, x.dtype))
    yield row("NVFP4 list, values whose bits differ", f"{count} of {size}x{size}, bf16", num_differing, count * size**2)


def nvfp4_speed(machine: Machine) -> Iterator[Row]:
    """Compare in-place BF16 fake quantization with a given amax with a copy and with modelopt's kernel."""
    import bench_nvfp4
    import torch
    from gpu_timing import median_seconds

    repeats = 3 if machine.is_tiny else 28
    what = "NVFP4 in place, share of a copy's rate; modelopt's kernel"

    def row(size, ours, copy, make_peer, goal="80 %, and faster than modelopt's"):
        peer, ratio, reached = f"not measured: {NEEDS_GPU}", "-", "-"
        if machine.device == "cuda":
            try:
                peer_seconds = median_seconds(make_peer(), repeats)
            except Exception as error:  # of the peer; ours is measured
                peer = f"not measured: {one_line(error)}"
            else:
                peer, ratio = f"{copy / peer_seconds:.0%}, {ms(peer_seconds)}", as_fast(peer_seconds, ours)
                if goal != "-":
                    reached = machine.judge(copy / ours >= 0.8 and ours < peer_seconds)
        return Row(what, size, f"{copy / ours:.0%}, {ms(ours)}", peer, ratio, goal, reached)

    for size in (64,) if machine.is_tiny else bench_nvfp4.GPU_SIZES:
        x = bench_nvfp4.made(size, torch.bfloat16).to(machine.device)
        calls = bench_nvfp4.in_place_call(x), bench_nvfp4.copy_call(x)
        ours, copy = (median_seconds(call, repeats) for call in calls)
        yield row(f"{size}x{size}", ours, copy, lambda x=x: bench_nvfp4.modelopt_call(x))
    count, size = (8, 32) if machine.is_tiny else (256, 1024)
    experts = [bench_nvfp4.made(size, torch.bfloat16).to(machine.device) for _ in range(count)]
    calls = bench_nvfp4.list_calls(experts)[0], bench_nvfp4.copy_call(torch.stack(experts))
    ours, copy = (median_seconds(call, repeats) for call in calls)

    def modelopt_loop():  # modelopt has no list call; its launches may take the host longer than the GPU
        calls = [bench_nvfp4.modelopt_call(x) for x in experts]
        return lambda: [call() for call in calls]

    yield row(f"list of {count}, {size}x{size}; {count} launches", ours, copy, modelopt_loop, goal="-")
