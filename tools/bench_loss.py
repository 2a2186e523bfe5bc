"""Benchmark of the KL loss, forward and backward, against modelopt, TRL, plain torch and torch.compile, and of the
fused output layer and loss against Liger.

    python tools/bench_loss.py [--repeat 5] [--sizes 512x32000,2048x32000,512x131072] [--dtype bfloat16]

All variants run in turn on the same logits, in one process per rank with one thread. Times are medians. Memory is the
allocation during one call, measured on the CPU from the profiler's events. "peak" is its maximum, including the
gradient of the logits if that is a separate tensor; "kept" is the memory between forward and backward pass. Errors are
relative to float64. The C library is configured to keep freed pages, because new pages would double the times of the
other variants. With GPUs, each rank uses one: "ms" is the time between events behind a filled queue, as in a training
step, and "host ms" the CPU time to fill it. Our bandwidth is reported as a fraction of that of a copy, counting 10
bytes per element in bfloat16.
"""

import argparse
import ctypes
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 40),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "0",
}
KLS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5, help="timed calls of each variant")
    parser.add_argument(
        "--sizes", default="512x32000,2048x32000,512x131072", help="tokens x vocabulary, comma-separated"
    )
    parser.add_argument(
        "--tp", default="1,2", help="numbers of ranks, comma-separated; on a GPU machine each rank needs one"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--fused-sizes", default="1024x32000", help="sizes with the output layer; '' skips them")
    parser.add_argument("--hidden", type=int, default=1024, help="hidden size of both models for --fused-sizes")
    parser.add_argument("--no-compile", action="store_true", help="skip torch.compile")
    parser.add_argument(
        "--trim",
        action="store_true",
        help="return freed pages to the system before each variant of --sizes, which then runs once untimed: for sizes "
        "that do not fit next to the fragmented memory of other variants",
    )
    parser.add_argument(
        "--clock",
        default="wall",
        choices=("wall", "cpu"),
        help="cpu: CPU time of the process, for machines that are in use",
    )
    parser.add_argument("--result", help=argparse.SUPPRESS)  # this process is a rank
    args = parser.parse_args()
    if args.result:
        return run_rank(args)
    for tp in args.tp.split(","):
        with tempfile.TemporaryDirectory() as directory:
            result = Path(directory) / "result.json"
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", tp, __file__]
            completed = subprocess.run(
                [*command, *sys.argv[1:], "--result", str(result)],
                env={**os.environ, **ENVIRONMENT, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"},
                capture_output=True,
                text=True,
            )
            if completed.returncode:
                output = f"{completed.stdout[-2000:]}\n{completed.stderr[-6000:]}"
                sys.exit(f"error: benchmark with {tp} ranks failed:\n{output}")
            print("".join(line for line in completed.stderr.splitlines(True) if line.startswith("skipped")), end="")
            results = json.loads(result.read_text())
        device = results["device"] or f"{args.clock} time"
        print(f"\nTP {tp}, {args.dtype}, {device}\n\n{table(results['cases'])}", flush=True)
        for case in results["cases"]:
            if copy := case["copy_ms"]:
                share = copy / case["variants"]["ours"]["ms"]
                print(
                    f"{case['size']}: a copy of the same size takes {copy:.2f} ms; "
                    f"ours has {share:.0%} of its bandwidth"
                )
        if results["fused"]:
            print(f"\nHidden size {args.hidden}, including output layers\n\n{table(results['fused'])}", flush=True)
        if results["errors"]:
            print(f"\n{error_table(results['errors'])}", flush=True)


def table(cases: list[dict]) -> str:
    columns = ("tokens x vocabulary", "loss", "ms", "host ms", "times ours", "peak MB", "bytes per element", "kept MB")
    columns += ("collectives",)
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for case in cases:
        ours = case["variants"]["ours"]
        for name, v in case["variants"].items():
            ratio, memory = v["ms"] / ours["ms"], v["peak"] / ours["peak"]
            calls = ", ".join(f"{n} {what}" for what, n in v["collectives"].items()) or "none"
            peak = f"{v['peak'] / 1e6:.1f} ({memory:.0f} x) | {v['peak'] / case['elements']:.3f}"
            ms = f"{v['ms']:.0f}" if v["ms"] > 100 else f"{v['ms']:.2f}"
            ms += f" | {v['host_ms']:.2f}" if v["host_ms"] is not None else " | -"
            lines.append(f"| {case['size']} | {name} | {ms} | {ratio:.2f} | {peak} | {v['kept'] / 1e6:.1f} | {calls} |")
    return "\n".join(lines)


def error_table(errors: list[dict]) -> str:
    names = list(errors[0]["variants"])
    lines = ["| KL | " + " | ".join(f"{n}: loss, gradient" for n in names) + " |", "|---" * (len(names) + 1) + "|"]
    for row in errors:
        cells = [f"{loss:.1e}, {grad:.1e}" for loss, grad in row["variants"].values()]
        lines.append(f"| {row['kl']:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def run_rank(args: argparse.Namespace) -> None:
    import torch

    on_gpu = start_rank()
    tp = torch.distributed.get_world_size()
    losses = variants(tp, compiled=not args.no_compile)
    cases = []
    for size in args.sizes.split(","):
        tokens, vocab = map(int, size.split("x"))
        case = {"size": size.replace("x", " x "), "elements": tokens * vocab // tp}
        case["variants"] = measure(losses, tokens, vocab, args)
        case["copy_ms"] = copy_ms(case["elements"], args) if on_gpu else None
        cases.append(case)
    errors = [] if tp > 1 else [{"kl": kl, "variants": errors_at(losses, kl)} for kl in KLS]
    fused = []
    for size in args.fused_sizes.split(",") if args.fused_sizes and tp == 1 else ():
        tokens, vocab = map(int, size.split("x"))
        measured = measure_fused(fused_variants(losses["ours"], vocab, args.hidden), tokens, vocab, args)
        fused.append({"size": size.replace("x", " x "), "elements": tokens * vocab, "variants": measured})
    if torch.distributed.get_rank() == 0:
        device = torch.cuda.get_device_name() if on_gpu else None
        result = {"cases": cases, "fused": fused, "errors": errors, "device": device}
        Path(args.result).write_text(json.dumps(result))


def start_rank(**group) -> bool:
    """Set up device, process group and tensor parallelism over all ranks. Returns whether there is a GPU.

    ``group``: arguments of ``init_process_group``, for ranks that torchrun did not start.
    """
    import torch
    from megatron.core import parallel_state  # our CPU backend is not used: inductor would mistake its "cuda" for a GPU

    torch.set_num_threads(1)
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    torch.set_default_device("cuda" if on_gpu else "cpu")
    torch.distributed.init_process_group("nccl" if on_gpu else "gloo", **group)
    parallel_state.initialize_model_parallel(torch.distributed.get_world_size())
    return on_gpu


def variants(tp: int, *, compiled: bool) -> dict:
    """Return functions (student logits [t, 1, V/tp], teacher logits) -> loss of each token, by name."""
    import torch

    losses = ours_and_modelopts(tp)
    if tp == 1:
        losses["plain torch"] = plain_kl
        if trl := _trl():
            losses["TRL"] = trl
        if compiled:
            losses["torch.compile"] = torch.compile(plain_kl, dynamic=False)
    return losses


def ours_and_modelopts(tp: int) -> dict:
    """Return the variants that need only the project's dependencies."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
    from modelopt.torch.distill.plugins.megatron import LogitsKLLoss

    from megatron_qad.distillation import VocabShard, per_token_loss

    group = parallel_state.get_tensor_model_parallel_group()

    def ours(student, teacher):
        width = student.shape[-1]
        return per_token_loss("kl", student, teacher, None, VocabShard(group.rank() * width, width, group))

    def modelopt(code_path_tp):
        config = SimpleNamespace(tensor_model_parallel_size=code_path_tp, sequence_parallel=False)
        loss = LogitsKLLoss(config)
        if tp == 1:
            return lambda student, teacher: loss(student, teacher)[0]
        return lambda student, teacher: reduce_from_tensor_model_parallel_region(loss(student, teacher)[0])

    losses = {"ours": ours, "modelopt, TP>1 path": modelopt(2)}
    return losses | ({"modelopt, TP=1 path": modelopt(1)} if tp == 1 else {})


def plain_kl(student, teacher):
    import torch

    log_s, log_t = torch.log_softmax(student.float(), -1), torch.log_softmax(teacher.float(), -1)
    return (log_t.exp() * (log_t - log_s)).sum(-1)


def _trl():
    """Return TRL's generalized Jensen-Shannon divergence at its limit KL(teacher || student), or None without TRL."""
    try:
        from trl.experimental.gkd import GKDTrainer
    except ModuleNotFoundError as missing:
        print(f"skipped: TRL ({missing})", file=sys.stderr)
        return None
    return lambda student, teacher: GKDTrainer.generalized_jsd_loss(student, teacher, beta=0.0, reduction="sum")


def fused_variants(ours, vocab: int, hidden_size: int) -> dict:
    """Return functions (hidden [t, H], weight [V, H], teacher hidden, teacher weight) -> sum of the loss, by name."""
    import torch

    from megatron_qad.distillation import LOSSES, VocabShard
    from megatron_qad.distillation.fused_linear import fused_linear_losses

    main_grad = torch.zeros(vocab, hidden_size)  # as with Megatron's DDP

    def fused(hidden, weight, teacher_hidden, teacher_weight):
        weight.main_grad = main_grad
        shard = VocabShard(0, vocab)
        (loss,) = fused_linear_losses([LOSSES["kl"]()], hidden, weight, teacher_hidden, teacher_weight, None, shard)
        return loss.sum()

    def separate(hidden, weight, teacher_hidden, teacher_weight):
        with torch.no_grad():
            teacher = teacher_hidden @ teacher_weight.t()
        return ours(hidden @ weight.t(), teacher).sum()

    class OnlyGEMMs(torch.autograd.Function):
        """The four GEMMs with the student's logits in place of their gradient."""

        @staticmethod
        def forward(ctx, hidden, weight, teacher_hidden, teacher_weight):
            teacher_hidden @ teacher_weight.t()
            ctx.save_for_backward(hidden, weight, logits := hidden @ weight.t())
            return logits[0, 0]

        @staticmethod
        def backward(ctx, _):
            hidden, weight, logits = ctx.saved_tensors
            return logits @ weight, logits.t() @ hidden, None, None

    losses = {"ours": fused, "ours, separate output layers": separate, "the four GEMMs, no loss": OnlyGEMMs.apply}
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    except ModuleNotFoundError as missing:
        print(f"skipped: Liger ({missing})", file=sys.stderr)
        return losses
    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=False)

    def liger(hidden, weight, teacher_hidden, teacher_weight):
        return loss(hidden, weight, teacher_hidden, teacher_weight, torch.zeros(len(hidden), dtype=torch.int64))

    return losses | {"Liger": liger}


def fused_inputs(tokens: int, vocab: int, args) -> list:
    """Return hidden states and output weights of the student (with gradients) and of the teacher."""
    import torch

    generator, dtype = _generator(0), getattr(torch, args.dtype)
    hidden = torch.randn(tokens, args.hidden, generator=generator)
    weight = torch.randn(vocab, args.hidden, generator=generator) * 3 / args.hidden**0.5
    noise = torch.randn(hidden.shape, generator=generator) * 0.03
    inputs = [x.to(dtype) for x in (hidden, weight, hidden + noise, weight)]
    inputs[0].requires_grad_()
    inputs[1] = inputs[1].clone().requires_grad_()
    return inputs


def measure_fused(losses: dict, tokens: int, vocab: int, args) -> dict:
    import torch

    inputs = fused_inputs(tokens, vocab, args)

    def call(loss):
        return torch.autograd.grad(loss(*inputs), inputs[:2])

    times = {name: [] for name in losses}
    for turn in range(args.repeat + 1):
        for name, loss in losses.items():
            seconds = _seconds(lambda loss=loss: call(loss), args)
            if turn:
                times[name].append(seconds)
    return {
        name: _medians(times[name])
        | {
            "collectives": {},
            "kept": _allocated(lambda loss=loss: loss(*inputs))[0],
            "peak": _allocated(lambda loss=loss: call(loss))[1],
        }
        for name, loss in losses.items()
    }


def measure(losses: dict, tokens: int, vocab: int, args) -> dict:
    import torch

    rank, tp = torch.distributed.get_rank(), torch.distributed.get_world_size()
    generator = _generator(rank)
    teacher = torch.randn(tokens, 1, vocab // tp, generator=generator).mul_(3)
    student = (teacher + torch.randn(teacher.shape, generator=generator) * 0.1).to(getattr(torch, args.dtype))
    teacher = teacher.to(student.dtype)
    leaf = torch.empty_like(student).requires_grad_()

    def seconds(loss) -> tuple[float, float | None]:
        logits = _as_output(leaf, student)
        torch.distributed.barrier()
        return _seconds(lambda: torch.autograd.grad(loss(logits, teacher).sum(), logits), args)

    times = {name: [] for name in losses}
    for turn in range(args.repeat + 1):
        for name, loss in losses.items():
            if args.trim:
                _trim()
                seconds(loss)
            call_seconds = seconds(loss)
            if turn:  # the first turn compiles and touches new pages
                times[name].append(call_seconds)
    results = {}
    for name, loss in losses.items():
        if args.trim:
            _trim()
        counts = _collectives(loss, leaf, student, teacher)
        results[name] = _medians(times[name]) | {"collectives": counts}
        results[name] |= _memory(loss, leaf, student, teacher)
    return results


def copy_ms(elements: int, args) -> float:
    """Return the time of a copy that reads and writes as many bytes as the KL, 10 per element in bfloat16."""
    import torch

    source = torch.ones(elements, dtype=getattr(torch, args.dtype))
    target = torch.empty_like(source)
    return 2.5 * _medians([_seconds(lambda: target.copy_(source), args) for _ in range(4 * args.repeat)])["ms"]


def _generator(seed: int):
    import torch

    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def _medians(times: list[tuple[float, float | None]]) -> dict[str, float | None]:
    seconds, host = zip(*times, strict=True)
    return {
        "ms": statistics.median(seconds) * 1e3,
        "host_ms": None if host[0] is None else statistics.median(host) * 1e3,
    }


def _seconds(call, args) -> tuple[float, float | None]:
    """Return the time of a call and, on a GPU, the host time of its launches."""
    from gpu_timing import call_seconds

    return call_seconds(call, time.process_time if args.clock == "cpu" else time.perf_counter)


def _trim() -> None:
    """Make glibc return the pages of freed memory to the system, including those between blocks in use."""
    ctypes.CDLL(None).malloc_trim(0)


def _as_output(leaf, values):
    """Return logits that are not a leaf, as a model's output, so that they may be overwritten."""
    import torch

    logits = leaf * 1
    with torch.no_grad():
        logits.copy_(values)
    return logits


def _collectives(loss, leaf, student, teacher) -> dict:
    import torch

    counts, originals = Counter(), {}
    for name in ("all_gather_into_tensor", "all_reduce", "all_gather", "reduce_scatter_tensor", "broadcast"):
        originals[name] = getattr(torch.distributed, name)

        def counting(*args, _name=name, **kwargs):
            counts[_name] += 1
            return originals[_name](*args, **kwargs)

        setattr(torch.distributed, name, counting)
    try:
        logits = _as_output(leaf, student)
        torch.autograd.grad(loss(logits, teacher).sum(), logits)
    finally:
        for name, original in originals.items():
            setattr(torch.distributed, name, original)
    return dict(counts)


def _memory(loss, leaf, student, teacher) -> dict:
    """Return the bytes allocated after the forward pass and at the peak, relative to those before the call."""
    import torch

    logits = _as_output(leaf, student)
    kept, _ = _allocated(lambda: loss(logits, teacher))
    logits = _as_output(leaf, student)
    _, peak = _allocated(lambda: torch.autograd.grad(loss(logits, teacher).sum(), logits))
    return {"kept": kept, "peak": peak}


def _allocated(call) -> tuple[int, int]:
    """Return the bytes allocated after the call (with its result) and at the peak, relative to those before it."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = call()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = call()
    allocations = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(allocations, key=lambda e: e.start_ns())]
    del kept
    totals = list(itertools.accumulate(sizes))
    return totals[-1], max(totals)


def errors_at(losses: dict, kl: float, tokens: int = 64, vocab: int = 32000, dtype: str = "float32") -> dict:
    """Return the RMS error of the loss and the relative error of the gradient of each variant.

    The mean KL is near ``kl`` before the logits are rounded to ``dtype``.
    """
    import torch

    generator = _generator(1)
    teacher = torch.randn(tokens, 1, vocab, generator=generator).mul_(3)
    noise = torch.randn(teacher.shape, generator=generator)

    def exact(student):
        z = student.double().requires_grad_()
        log_s, log_t = torch.log_softmax(z, -1), torch.log_softmax(teacher.double(), -1)
        loss = (log_t.exp() * (log_t - log_s)).sum(-1)
        return loss.detach().flatten(), torch.autograd.grad(loss.sum(), z)[0]

    scale = (2 * kl) ** 0.5
    for _ in range(3):  # KL is nearly quadratic in the noise
        scale *= (kl / exact(teacher + scale * noise)[0].mean().item()) ** 0.5
    student, teacher = (z.to(getattr(torch, dtype)) for z in (teacher + scale * noise, teacher))
    loss_64, grad_64 = exact(student)
    errors = {}
    for name, loss in losses.items():
        logits = _as_output(torch.empty_like(student).requires_grad_(), student)
        out = loss(logits, teacher)
        (grad,) = torch.autograd.grad(out.sum(), logits)
        if out.numel() == 1:  # a sum is compared as a mean
            error = abs(out.item() / tokens - loss_64.mean().item())
        else:
            error = (out.detach().double().flatten() - loss_64).square().mean().sqrt().item()
        errors[name] = (error, ((grad.double() - grad_64).norm() / grad_64.norm()).item())
    return errors


if __name__ == "__main__":
    main()
