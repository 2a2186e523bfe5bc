"""Measure memory and time of PTQ jobs on synthetic Llama models: trained at learning rate 0, whole, layer by layer.

    python tools/bench_ptq.py --output DIR [--size small large] [--samples 8] [--seq-length 128]

Every job is a process of its own. The table shows the peak of its anonymous memory (RssAnon, every 20 ms) and its wall
time with imports. The model "large" is calibrated layer by layer only. DIR needs 30 GB for it, and keeps the models.
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
MODELS = {
    "small": _LLAMA | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 20}
    | {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 64},
    "large": _LLAMA | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 30}
    | {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128},
}  # fmt: skip
UNTRAINED = ("--train-iters", "1", "--lr", "0", "--min-lr", "0", "--no-save-optim")
JOBS = {
    "small": {
        "imports only (--qad-dry-run)": ("--qad-ptq", "--qad-dry-run"),
        "one training iteration at learning rate 0": (*UNTRAINED, "--eval-iters", "1"),
        "--qad-ptq": ("--qad-ptq", "--eval-iters", "1"),
        "--qad-ptq, no validation": ("--qad-ptq", "--eval-iters", "0"),
        "--qad-ptq-sequential": ("--qad-ptq", "--qad-ptq-sequential", "--eval-iters", "1"),
        "--qad-ptq-sequential, no validation": ("--qad-ptq", "--qad-ptq-sequential", "--eval-iters", "0"),
    },
    "large": {
        "--qad-ptq-sequential": ("--qad-ptq", "--qad-ptq-sequential", "--eval-iters", "1"),
        "--qad-ptq-sequential, no validation": ("--qad-ptq", "--qad-ptq-sequential", "--eval-iters", "0"),
    },
}


@dataclass(frozen=True)
class Measured:
    """Peak of a process's anonymous memory and its wall time."""

    bytes: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.bytes / 1e9:.2f} GB | {self.seconds:.0f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="directory for models and runs")
    parser.add_argument("--size", nargs="+", choices=MODELS, default=["small"], help="models to measure")
    parser.add_argument("--samples", type=int, default=8, help="number of calibration sequences (default: 8)")
    parser.add_argument("--seq-length", type=int, default=128, help="tokens per sequence (default: 128)")
    parser.add_argument("--make", choices=MODELS, help=argparse.SUPPRESS)  # makes this process write that model
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    if options.make:
        return make_model(MODELS[options.make], options.output / options.make, options.output / "data")
    for size in options.size:
        for row in rows(size, options):
            print(row, flush=True)


def rows(size: str, options: argparse.Namespace) -> Iterator[str]:
    """Yield the rows of one model's table. Creates the model if it does not exist."""
    model, sums = options.output / size, {}
    if not (model / "latest_checkpointed_iteration.txt").is_file():
        measure([__file__, "--output", str(options.output), "--make", size])
    weights = sum(file.stat().st_size for file in (model / "release").glob("*.distcp"))
    yield f"{size}: {weights / 1e9:.2f} GB of BF16 weights; {options.samples} sequences of {options.seq_length} tokens"
    yield "| job | peak memory | time | export equal | export: peak memory | time |\n|---|---|---|---|---|---|"
    for name, flags in JOBS[size].items():
        run, exported = options.output / "run", options.output / "exported"
        for directory in (run, exported):
            shutil.rmtree(directory, ignore_errors=True)
        argv = [
            *("--qad-teacher", str(model), "--data-path", str(options.output / "data"), "--split", "80,20,0", "--bf16"),
            *("--data-cache-path", str(options.output / "cache"), "--seq-length", str(options.seq_length)),
            *("--micro-batch-size", "1", "--global-batch-size", "2", "--num-workers", "0", "--save", str(run)),
            *("--qad-calibration-samples", str(options.samples), *flags),
        ]
        row = f"| {name} | {measure(['pretrain_qad.py', *argv])} |"
        if "--qad-dry-run" in flags:
            yield row + " | | |"
            continue
        export = measure(["tools/export_hf.py", "--checkpoint", str(run), "--output", str(exported)])
        sums[name] = sha256_of_weights(exported)
        yield f"{row} {'yes' if len(set(sums.values())) == 1 else '**no**'} | {export} |"


def measure(command: list[str]) -> Measured:
    """Run a Python command as a job of one rank. Exits if the command fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment = os.environ | rank | {"PYTHONPATH": str(ROOT)}
    log, start, peak = Path("/tmp") / f"bench_ptq_{os.getpid()}.log", time.perf_counter(), 0
    with open(log, "w") as stream:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT
        )
        while process.poll() is None:
            peak = max(peak, anonymous_bytes(process.pid))
            time.sleep(0.02)
    if process.returncode:
        sys.exit(f"error: {' '.join(command)} failed:\n{log.read_text()[-3000:]}")
    return Measured(peak, time.perf_counter() - start)


def anonymous_bytes(pid: int) -> int:
    """Return the anonymous resident memory of a process in bytes; 0 if it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon")), 0)


def sha256_of_weights(directory: Path) -> str:
    """Return one hash of all safetensors files of an exported model."""
    from megatron_qad.engine.run_directory import manifest

    names = sorted(file.name for file in directory.glob("*.safetensors"))
    return "".join(digest for _, digest in manifest.sums_of(directory, names).values())


def make_model(config: dict, target: Path, data: Path) -> None:
    """Write random tokens and an imported checkpoint of random weights, one layer in memory at a time."""
    from megatron_qad.engine import init_runtime

    init_runtime()
    import numpy as np
    import torch
    from megatron.core import dist_checkpointing
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    from megatron.core.dist_checkpointing import ShardedTensor

    from megatron_qad.engine.distributed import init_process_group
    from megatron_qad.engine.megatron_fixes import save_checkpoints_in_this_process
    from megatron_qad.engine.run_directory import manifest
    from megatron_qad.engine.run_directory.linked_weights import LinkedWeights
    from megatron_qad.models.families import family_of

    init_process_group()
    save_checkpoints_in_this_process()
    builder, rng = IndexedDatasetBuilder(f"{data}.bin", dtype=np.uint16), np.random.default_rng(0)
    for _ in range(64):
        builder.add_document(rng.integers(0, config["vocab_size"], 2048), [2048])
    builder.finalize(f"{data}.idx")
    torch.manual_seed(0)
    release, sums = target / "release", {}
    for _, maps in groupby(family_of(config).tensors(config), key=lambda tensor_map: tensor_map.layer):
        tensors = {m.megatron: torch.ones(m.shape) if m.kind == "norm" else torch.randn(m.shape) * 0.02 for m in maps}
        sharded = {name: ShardedTensor.from_rank_offsets(name, x.bfloat16()) for name, x in tensors.items()}
        part = target / "part" if sums else release
        part.mkdir(parents=True)
        dist_checkpointing.save(sharded, str(part))
        manifest.write_manifest(part)
        if part == release:
            sums = manifest.read(release)
            continue
        sums |= LinkedWeights(part, list(sharded)).add_to(release)
        shutil.rmtree(part)
    manifest.write_sums(release, sums | {".metadata": manifest.sum_of(release / ".metadata")})
    (target / "hf").mkdir()
    (target / "hf" / "config.json").write_text(json.dumps(config))
    manifest.write_manifest(target / "hf")
    (target / "latest_checkpointed_iteration.txt").write_text("release")


if __name__ == "__main__":
    main()
