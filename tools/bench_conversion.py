"""Measures time and memory of import and export with a synthetic model of real shapes.

    python tools/bench_conversion.py --model qwen3-8b --blocks 12 --directory /scratch

Prints a Markdown table. The weights of linears are representable in NVFP4, as those of a QAD job. Memory is sampled
every 5 ms: "RssAnon" is the largest anonymous memory of any process of a conversion beyond that after its imports,
"RSS" includes the pages of mapped files, which the system can take back. A copy reads and writes the same files with
one thread. Both end when the data is on the disk. The page cache is warm.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
FORMAT = "nvfp4-w4a16"
QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_hidden_layers": 36,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
NEMOTRON_3_NANO = {
    "architectures": ["NemotronHForCausalLM"],
    "model_type": "nemotron_h",
    "hybrid_override_pattern": "ME" * 4,
    "num_hidden_layers": 8,
    "vocab_size": 131072,
    "hidden_size": 2688,
    "intermediate_size": 1856,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "mamba_num_heads": 64,
    "mamba_head_dim": 64,
    "n_groups": 8,
    "ssm_state_size": 128,
    "conv_kernel": 4,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 1856,
    "moe_shared_expert_intermediate_size": 3712,
    "routed_scaling_factor": 2.5,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "mlp_hidden_act": "relu2",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": False,
    "max_position_embeddings": 262144,
    "torch_dtype": "bfloat16",
}


def config_of(options: argparse.Namespace) -> dict:
    if options.model == "qwen3-8b":
        return QWEN3_8B | {"num_hidden_layers": options.blocks, "vocab_size": options.vocab or QWEN3_8B["vocab_size"]}
    return NEMOTRON_3_NANO | {
        "hybrid_override_pattern": "ME" * options.blocks,
        "num_hidden_layers": 2 * options.blocks,
        "n_routed_experts": options.experts,
        "vocab_size": options.vocab or NEMOTRON_3_NANO["vocab_size"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("qwen3-8b", "nemotron-3-nano"), default="qwen3-8b")
    parser.add_argument("--blocks", type=int, default=1, help="attention or Mamba layers, each with its MLP or experts")
    parser.add_argument("--experts", type=int, default=128, help="experts of a layer of nemotron-3-nano")
    parser.add_argument("--vocab", type=int, help="vocabulary size; default: the model's")
    parser.add_argument("--num-workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--scale-rule", choices=("max", "four_over_six", "mse"), default="max")
    parser.add_argument("--directory", type=Path, help="place for 4 times the model's size; default: /tmp")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        return run_step(options)
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        options.directory = Path(directory)
        measure(options)


def measure(options: argparse.Namespace) -> None:
    """Run every step in a process of its own and print the table."""
    directory = options.directory
    load = os.getloadavg()[0]
    made = child(options, "make")
    rows = []
    for step in ("import", "export"):
        source = directory / {"import": "hf", "export": "checkpoint/iter_0000001"}[step]
        num_bytes = sum(file.stat().st_size for file in source.iterdir())
        copy_seconds = copy(source, directory / "copy")
        result = child(options, step)
        rows.append((step, num_bytes, copy_seconds, result))
        if step == "import":
            (directory / "checkpoint" / "release").rename(directory / "checkpoint" / "iter_0000001")
            (directory / "checkpoint" / "latest_checkpointed_iteration.txt").write_text("1")
    pack = child(options, "pack")["weights_per_second"]
    print(
        f"\n{options.model}, {options.blocks} blocks, {made['num_weights'] / 1e9:.3g} G weights, largest tensor "
        f"{made['largest'] / 2**20:.0f} MiB, {options.num_workers} workers, rule {options.scale_rule}; load {load:.1f} "
        f"before and {os.getloadavg()[0]:.1f} after. Packing from memory with one thread: {pack / 1e6:.0f} M "
        "weights/s.\n"
    )
    print("| step | read | time | rate | weights | copy of what is read | RssAnon | RSS |")
    print("|---|---|---|---|---|---|---|---|")
    for step, num_bytes, copy_seconds, result in rows:
        seconds, weights = result["seconds"], made["num_weights"] / result["seconds"]
        print(
            f"| {step} | {num_bytes / 1e9:.3g} GB | {seconds:.1f} s | {num_bytes / seconds / 1e6:.0f} MB/s "
            f"| {weights / 1e6:.0f} M/s | {num_bytes / copy_seconds / 1e6:.0f} MB/s "
            f"| {result['anonymous'] / 2**20:.0f} MiB | {result['resident'] / 2**20:.0f} MiB |"
        )


def copy(source: Path, target: Path) -> float:
    """Return the seconds that it takes to copy a directory's files to the disk, and remove the copy."""
    start = time.monotonic()
    shutil.copytree(source, target, copy_function=shutil.copyfile)
    for file in target.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    seconds = time.monotonic() - start
    shutil.rmtree(target)
    return seconds


def child(options: argparse.Namespace, step: str) -> dict:
    """Run one step and return its result with the peak memory of its processes."""
    flags = [f for n, v in vars(options).items() if v is not None for f in (f"--{n.replace('_', '-')}", str(v))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    process = subprocess.Popen(
        [sys.executable, __file__, *flags, "--step", step], stdout=subprocess.PIPE, text=True, env=environment
    )
    base, peak, ended = {}, {"RssAnon": 0, "VmRSS": 0}, threading.Event()

    def sample() -> None:
        while not ended.wait(0.005):
            for sizes in memory_of(process.pid):
                for key in peak if base else ():
                    peak[key] = max(peak[key], sizes.get(key, 0))

    thread = threading.Thread(target=sample)
    thread.start()
    result = None
    for line in process.stdout:
        if line.startswith("ready"):
            base |= next(memory_of(process.pid))
        elif line.startswith("{"):
            result = json.loads(line)
        else:
            print(line, end="", flush=True)
    ended.set()
    thread.join()
    if process.wait() or result is None:
        sys.exit(f"error: the step {step!r} failed.")
    return result | {"anonymous": peak["RssAnon"] - base.get("RssAnon", 0), "resident": peak["VmRSS"]}


def memory_of(pid: int) -> Iterator[dict[str, int]]:
    """Yield the memory of a process and of each of its children: bytes by the field names of /proc/PID/status."""
    try:
        pids = [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    except psutil.NoSuchProcess:
        return
    for each in pids:
        try:
            lines = Path(f"/proc/{each}/status").read_text().splitlines()
        except OSError:  # it has ended
            continue
        yield {key: int(value.split()[0]) << 10 for key, _, value in (x.partition(":") for x in lines) if "kB" in value}


def run_step(options: argparse.Namespace) -> None:
    """Run one step in this process and print its result."""
    from megatron_qad.engine import init_runtime

    init_runtime()
    from megatron_qad.checkpoint.export_hf import export_hf
    from megatron_qad.checkpoint.import_hf import import_hf
    from megatron_qad.engine.distributed import init_process_group

    init_process_group()
    directory = options.directory
    print("ready", flush=True)
    start = time.monotonic()
    if options.step == "make":
        result = make(directory, options)
    elif options.step == "pack":
        result = pack(options.scale_rule)
    elif options.step == "import":
        result = {"tensors": import_hf(directory / "hf", directory / "checkpoint", num_workers=options.num_workers)}
    else:
        describe_job(directory, options)
        written = export_hf(
            directory / "checkpoint", directory / "exported", "modelopt", num_workers=options.num_workers
        )
        result = {"tensors": written.num_tensors}
    print(json.dumps({"seconds": time.monotonic() - start} | result), flush=True)


def make(directory: Path, options: argparse.Namespace) -> dict:
    """Write the Hugging Face model: repeated random tiles, fake-quantized if a linear."""
    import torch

    from megatron_qad.checkpoint.safetensors_file import num_bytes, write_file
    from megatron_qad.models.families import family_of

    config, specs = config_of(options), {}
    maps = family_of(config).tensors(config)
    for tensor_map in maps:
        specs |= {
            name: ("F32" if tensor_map.is_float32 else "BF16", shape)
            for name, shape in zip(tensor_map.hf, tensor_map.hf_shapes(), strict=True)
        }
    (directory / "hf").mkdir()
    (directory / "hf" / "config.json").write_text(json.dumps(config))
    noise = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)).mul_(0.02)
    noise = fake_quantized(noise.bfloat16().view(-1, 1024), options.scale_rule).view(-1)

    def tensors():
        for name, (dtype, shape) in specs.items():
            count = torch.Size(shape).numel()
            values = noise.repeat(-(-count // len(noise)))[:count].view(shape)
            yield name, values.float() if dtype == "F32" else values

    write_file(directory / "hf" / "model.safetensors", specs, tensors())
    sizes = [num_bytes(spec) for spec in specs.values()]
    return {"num_weights": sum(sizes) // 2, "largest": max(torch.Size(m.shape).numel() * 2 for m in maps)}


def fake_quantized(weight, rule: str):
    from megatron_qad.formats.format_registry import FORMATS

    number_format = FORMATS[FORMAT].weight
    amax = weight.abs().amax().float()
    return number_format.rounded(weight, number_format.scale_from_amax(amax, rule=rule), name="noise", rule=rule)


def describe_job(directory: Path, options: argparse.Namespace) -> None:
    """Write the record of a QAD job next to the checkpoint: the format of every linear."""
    from megatron_qad.engine.run_directory import json_records
    from megatron_qad.engine.run_directory.run_files import JOB_FILE
    from megatron_qad.models.families import family_of

    config = config_of(options)
    formats = {
        linear.megatron: "bf16" if linear.kind == "head" else FORMAT for linear in family_of(config).linears(config)
    }
    record = {"formats": formats, "scale_rule": options.scale_rule}
    json_records.write(directory / "checkpoint" / JOB_FILE, record)


def pack(rule: str) -> dict:
    """Measure packing of a weight in memory with one thread: the best of five."""
    import torch

    from megatron_qad.formats.format_registry import FORMATS

    torch.set_num_threads(1)
    weight = fake_quantized(torch.randn(4096, 4096).bfloat16(), rule)
    seconds = []
    for _ in range(5):
        start = time.monotonic()
        _, codes = FORMATS[FORMAT].weight.pack([weight], name="weight")
        seconds.append(time.monotonic() - start)
    assert codes is not None
    return {"weights_per_second": weight.numel() / min(seconds)}


if __name__ == "__main__":
    main()
