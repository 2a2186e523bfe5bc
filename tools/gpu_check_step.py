"""GPU check of a training step. It uses the functions of tools/bench_colocation.py."""

import re
import statistics
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gpu_rows import Machine, Row, as_fast, mebibytes, verdict


def training_step(machine: Machine) -> Iterator[Row]:
    """Compare a job's train_step on one rank with modelopt's distillation, and its memory with --qad-dry-run."""
    import bench_colocation

    shape = {"hidden": 2048, "head_dim": 128, "layers": 4, "vocab": 32768, "seq_length": 8192, "steps": 8}
    if machine.is_tiny:
        shape = {"hidden": 64, "head_dim": 16, "layers": 2, "vocab": 256, "seq_length": 64, "steps": 3}
    options = Namespace(microbatches=4, recompute=False, **shape)
    tokens = f"{options.microbatches}x{options.seq_length} tokens"
    size = f"{options.layers} blocks, H {options.hidden}, V {options.vocab}, {tokens}"
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        flags = bench_colocation.prepare_inputs(directory, options)
        flags += ["--num-workers", "0"] if machine.is_tiny else []  # starting workers takes longer than the steps
        with ThreadPoolExecutor(2 if machine.is_tiny else 1) as pool:  # in parallel if no time is judged
            jobs = [
                pool.submit(bench_colocation.run, "one rank", side, flags, directory) for side in bench_colocation.SIDES
            ]
            ours, peer = ([job.result()] for job in jobs)
    (time, memory), (peer_time, peer_memory) = map(bench_colocation.medians, (ours, peer))
    cells = f"{time:.3f} s", f"{peer_time:.3f} s", as_fast(peer_time, time)
    yield Row("training step; modelopt's", size, *cells, "1.2 times as fast", machine.judge(peer_time / time >= 1.2))
    cells = mebibytes(memory), mebibytes(peer_memory), f"{memory / peer_memory:.2f} of it"
    what, reached = (
        "training step, peak memory above the bare student; modelopt's",
        machine.judge(memory < peer_memory),
    )
    yield Row(what, size, *cells, "less than modelopt's", reached)
    rank, peer_rank = ours[0][0], peer[0][0]
    predicted = bytes_of_plan(rank["plan"])
    # Memory before the first step is the student on a GPU, but mostly libraries on a CPU.
    peak = memory + (rank["before"] if machine.device == "cuda" else predicted["student weights"])
    known = predicted["sum without activations"]
    cells = mebibytes(peak), mebibytes(known), f"{peak / known:.2f} of it"
    yield Row("training step, peak memory; the sum of --qad-dry-run, without activations", size, *cells)
    saved = predicted["activations kept for backward"] + predicted["student logits, one microbatch"]
    ratio = rank["saved"] / saved
    cells = mebibytes(rank["saved"]), mebibytes(saved), f"{ratio:.3f} of it"
    what = "training step, bytes kept for backward; --qad-dry-run's activations and logits"
    yield Row(what, size, *cells, "within 10 %", machine.judge(abs(ratio - 1) <= 0.1))
    losses = [statistics.mean(side["losses"]) for side in (rank, peer_rank)]
    # Models, data and formats are the same. Sums in another order change some input codes, and each loss by one or two
    # bfloat16 ulps; after updates a little more (docs/benchmarks/2026-11-26-h100-training-step.md: 0.02 %, once).
    is_near = abs(losses[0] / losses[1] - 1) <= 2e-2
    cells = f"{losses[0]:.4f}", f"{losses[1]:.4f}", f"{losses[0] / losses[1]:.4f} of it"
    yield Row("training step, mean loss; modelopt's", size, *cells, "within 2 %", verdict(is_near))


def bytes_of_plan(lines: list[str]) -> dict[str, int]:
    """Return the bytes by name, parsed from the table that --qad-dry-run prints."""
    matches = filter(None, (re.fullmatch(r"  (\S.*?) +([\d,]+)", line) for line in lines))
    return {match[1]: int(match[2].replace(",", "")) for match in matches}
