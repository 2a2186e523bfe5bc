"""The check of a training step, by the functions of tools/bench_colocation.py."""

import re
import statistics
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gpu_rows import Machine, Row, as_fast, mebibytes, verdict


def training_step(machine: Machine) -> Iterator[Row]:
    """Megatron's train_step of a whole job on one rank beside modelopt's distillation; and its memory beside what
    --qad-dry-run says."""
    import bench_colocation

    shape = {"hidden": 2048, "head_dim": 128, "layers": 4, "vocab": 32768, "seq_length": 8192, "steps": 8}
    if machine.is_tiny:
        shape = {"hidden": 64, "head_dim": 16, "layers": 2, "vocab": 256, "seq_length": 64, "steps": 3}
    own = Namespace(microbatches=4, recompute=False, **shape)
    size = f"{own.layers} blocks, H {own.hidden}, V {own.vocab}, {own.microbatches}x{own.seq_length} tokens"
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        flags = bench_colocation.prepare_inputs(directory, own)
        flags += ["--num-workers", "0"] if machine.is_tiny else []  # starting them takes longer than the steps
        with ThreadPoolExecutor(2 if machine.is_tiny else 1) as pool:  # at once where no time is judged
            jobs = [
                pool.submit(bench_colocation.run, "one rank", side, flags, directory) for side in bench_colocation.SIDES
            ]
            ours, theirs = ([job.result()] for job in jobs)
    (time, memory), (their_time, their_memory) = map(bench_colocation.medians, (ours, theirs))
    cells = f"{time:.3f} s", f"{their_time:.3f} s", as_fast(their_time, time)
    yield Row("training step; modelopt's", size, *cells, "1.2 times as fast", machine.judge(their_time / time >= 1.2))
    cells = mebibytes(memory), mebibytes(their_memory), f"{memory / their_memory:.2f} of it"
    what, reached = (
        "training step, peak memory above the bare student; modelopt's",
        machine.judge(memory < their_memory),
    )
    yield Row(what, size, *cells, "less than modelopt's", reached)
    rank, their_rank = ours[0][0], theirs[0][0]
    predicted = bytes_of_plan(rank["plan"])
    # What a process holds before is libraries on a CPU, but the student on a GPU.
    peak = memory + (rank["before"] if machine.device == "cuda" else predicted["student weights"])
    cells = mebibytes(peak), mebibytes(predicted["sum"]), f"{peak / predicted['sum']:.2f} of it"
    yield Row("training step, peak memory; the sum of --qad-dry-run, without activations", size, *cells)
    losses = [statistics.mean(side["losses"]) for side in (rank, their_rank)]
    # The same models, data and formats. Sums in another order turn some codes of inputs, a bfloat16 unit or two of each
    # loss, and after updates a little more (docs/benchmarks/2026-11-26-h100-training-step.md: 0.02 %, once).
    is_near = abs(losses[0] / losses[1] - 1) <= 2e-2
    cells = f"{losses[0]:.4f}", f"{losses[1]:.4f}", f"{losses[0] / losses[1]:.4f} of it"
    yield Row("training step, mean loss; modelopt's", size, *cells, "within 2 %", verdict(is_near))


def bytes_of_plan(lines: list[str]) -> dict[str, int]:
    """Bytes by name, parsed from the table that --qad-dry-run prints."""
    matches = filter(None, (re.fullmatch(r"  (\S.*?) +([\d,]+)", line) for line in lines))
    return {match[1]: int(match[2].replace(",", "")) for match in matches}
