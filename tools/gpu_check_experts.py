"""GPU check of the experts: grouped GEMMs against the loop over experts, values, gradients and speed."""

import statistics
from collections.abc import Iterator

from gpu_rows import Machine, Row, as_fast, ms, pair, verdict


def experts(machine: Machine) -> Iterator[Row]:
    """Compare a pass of all experts of a layer of Nemotron 3 Nano, in BF16, with the loop over slices."""
    import torch
    from bench_experts import GROUPED, LOOPED, SEPARATE, expert_passes, loads, measure

    torch.set_default_device(machine.device)
    experts, tokens, hidden, ffn = (8, 64, 64, 32) if machine.is_tiny else (128, 8192 * 6, 2688, 1856)
    size = f"{experts} experts, {tokens} tokens, {hidden}x{ffn}, bf16"
    for name, load in loads(experts, tokens).items():
        passes = expert_passes(load, hidden, ffn, torch.bfloat16)
        actual, expected = passes[GROUPED](), passes[LOOPED]()
        errors = [((a - b).float().norm() / b.float().norm()).item() for a, b in zip(actual, expected, strict=True)]
        empty = [i for i, count in enumerate(load) if count == 0]
        unwritten = sum(int((grad[empty] != 0).sum()) for grad in actual[2:])  # also NaN
        del actual, expected
        # The same float32 sums in another order, rounded to bfloat16 (2^-9 on average less than half an ulp, 2^-8), in
        # two products in sequence.
        is_within = max(errors) <= 2**-7 and unwritten == 0
        what = f"experts, {name}: errors of output and gradients against the loop, nonzeros of empty experts"
        yield Row(what, size, f"{pair(errors)}, {unwritten}", goal="at most 7.8e-03, 0", verdict=verdict(is_within))
        seconds = {n: statistics.median(s) for n, s in measure(passes, 3 if machine.is_tiny else 9).items()}
        for peer in (LOOPED, SEPARATE):
            cells = ms(seconds[GROUPED]), ms(seconds[peer]), as_fast(seconds[peer], seconds[GROUPED])
            reached = machine.judge(seconds[GROUPED] <= seconds[peer])
            yield Row(f"experts, {name}, forward and backward; {peer}", size, *cells, "not slower", reached)
