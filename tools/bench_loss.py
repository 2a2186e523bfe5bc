"""The KL loss, forward and backward, beside modelopt's LogitsKLLoss, TRL's GKD loss, plain torch and torch.compile of
the same; and output layer with loss beside Liger's.

    python tools/bench_loss.py [--repeat 5] [--sizes 512x32000,2048x32000,512x131072] [--dtype bfloat16]

All variants get the same logits, in turn, in one process a rank with one thread. Times are medians. Memory is what the
allocator handed out during one call above what was there, on the CPU counted from the profiler's events: "peak" at its
highest, gradient of the logits included where it is a tensor of its own; "kept" between the forward and the backward
pass. Errors are against float64. The C library is told to keep freed pages, because fresh ones would double the peers'
times. Where a GPU is there, a rank runs on one; "ms" is the time of its events behind a filled queue, as in a training
step, "host ms" what the CPU takes to fill it; and the rate of ours is given as a share of a copy's, counting 10 bytes
an element in bfloat16.
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
    parser.add_argument("--sizes", default="512x32000,2048x32000,512x131072", help="tokens x vocabulary, with commas")
    parser.add_argument(
        "--tp", default="1,2", help="numbers of ranks, with commas; each needs a GPU where one is there"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--fused-sizes", default="1024x32000", help="the same with the output layer; '' leaves it out")
    parser.add_argument("--hidden", type=int, default=1024, help="hidden size of both models there")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument(
        "--trim",
        action="store_true",
        help="give freed pages back before each variant of --sizes, which then runs once untimed: for sizes whose "
        "variants do not fit into memory beside what the others left in pieces",
    )
    parser.add_argument(
        "--clock", default="wall", choices=("wall", "cpu"), help="cpu: of the process, where others use the machine too"
    )
    parser.add_argument("--result", help=argparse.SUPPRESS)  # this process is a rank
    args = parser.parse_args()
    if args.result:
        return run_rank(args)
    for tp in args.tp.split(","):
        with tempfile.TemporaryDirectory() as directory:
            result = Path(directory) / "result.json"
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", tp, __file__]
            done = subprocess.run(
                [*command, *sys.argv[1:], "--result", str(result)],
                env={**os.environ, **ENVIRONMENT, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"},
                capture_output=True,
                text=True,
            )
            if done.returncode:
                sys.exit(f"error: the bench of {tp} ranks failed:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
            print("".join(line for line in done.stderr.splitlines(True) if line.startswith("left out")), end="")
            found = json.loads(result.read_text())
        where = found["device"] or f"{args.clock} time"
        print(f"\nTP {tp}, {args.dtype}, {where}\n\n{table(found['cases'])}", flush=True)
        for case in found["cases"]:
            if copy := case["copy_ms"]:
                share = copy / case["variants"]["ours"]["ms"]
                print(f"{case['size']}: a copy of as many bytes takes {copy:.2f} ms; ours has {share:.0%} of its rate")
        if found["fused"]:
            print(f"\nHidden size {args.hidden}, output layers included\n\n{table(found['fused'])}", flush=True)
        if found["errors"]:
            print(f"\n{error_table(found['errors'])}", flush=True)


def table(cases: list[dict]) -> str:
    columns = ("tokens x vocabulary", "loss", "ms", "host ms", "times ours", "peak MB", "bytes an element", "kept MB")
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
        found = measure_fused(fused_variants(losses["ours"], vocab, args.hidden), tokens, vocab, args)
        fused.append({"size": size.replace("x", " x "), "elements": tokens * vocab, "variants": found})
    if torch.distributed.get_rank() == 0:
        device = torch.cuda.get_device_name() if on_gpu else None
        result = {"cases": cases, "fused": fused, "errors": errors, "device": device}
        Path(args.result).write_text(json.dumps(result))


def start_rank(**group) -> bool:
    """Device, process group and tensor parallelism over all ranks, of which torchrun or ``group`` tells; whether there
    is a GPU."""
    import torch
    from megatron.core import parallel_state  # without our CPU backend: inductor would take its "cuda" for a GPU

    torch.set_num_threads(1)
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    torch.set_default_device("cuda" if on_gpu else "cpu")
    torch.distributed.init_process_group("nccl" if on_gpu else "gloo", **group)
    parallel_state.initialize_model_parallel(torch.distributed.get_world_size())
    return on_gpu


def variants(tp: int, *, compiled: bool) -> dict:
    """name -> (student logits [t, 1, V/tp], teacher's) -> loss of each token."""
    import torch

    found = ours_and_modelopts(tp)
    if tp == 1:
        found["plain torch"] = plain_kl
        if trl := _trl():
            found["TRL"] = trl
        if compiled:
            found["torch.compile"] = torch.compile(plain_kl, dynamic=False)
    return found


def ours_and_modelopts(tp: int) -> dict:
    """The part of ``variants`` that needs nothing but what the project depends on."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
    from modelopt.torch.distill.plugins.megatron import LogitsKLLoss

    from megatron_qad.distillation import VocabShard, per_token_loss

    group = parallel_state.get_tensor_model_parallel_group()

    def ours(student, teacher):
        width = student.shape[-1]
        return per_token_loss("kl", student, teacher, None, VocabShard(group.rank() * width, width, group))

    def modelopt(path_of):
        config = SimpleNamespace(tensor_model_parallel_size=path_of, sequence_parallel=False)
        loss = LogitsKLLoss(config)
        if tp == 1:
            return lambda student, teacher: loss(student, teacher)[0]
        return lambda student, teacher: reduce_from_tensor_model_parallel_region(loss(student, teacher)[0])

    found = {"ours": ours, "modelopt, TP>1 path": modelopt(2)}
    return found | ({"modelopt, TP=1 path": modelopt(1)} if tp == 1 else {})


def plain_kl(student, teacher):
    import torch

    log_s, log_t = torch.log_softmax(student.float(), -1), torch.log_softmax(teacher.float(), -1)
    return (log_t.exp() * (log_t - log_s)).sum(-1)


def _trl():
    """TRL's generalized Jensen-Shannon divergence at its limit KL(teacher || student), where TRL is installed."""
    try:
        from trl.experimental.gkd import GKDTrainer
    except ModuleNotFoundError as missing:
        print(f"left out: TRL ({missing})", file=sys.stderr)
        return None
    return lambda student, teacher: GKDTrainer.generalized_jsd_loss(student, teacher, beta=0.0, reduction="sum")


def fused_variants(ours, vocab: int, hidden_size: int) -> dict:
    """name -> (hidden [t, H], weight [V, H], teacher's hidden, teacher's weight) -> sum of the loss."""
    import torch

    from megatron_qad.distillation import LOSSES, VocabShard
    from megatron_qad.distillation.fused_linear import fused_linear_losses

    main_grad = torch.zeros(vocab, hidden_size)  # as Megatron's DDP has it

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
        """With the student's logits in the place of their gradient."""

        @staticmethod
        def forward(ctx, hidden, weight, teacher_hidden, teacher_weight):
            teacher_hidden @ teacher_weight.t()
            ctx.save_for_backward(hidden, weight, logits := hidden @ weight.t())
            return logits[0, 0]

        @staticmethod
        def backward(ctx, _):
            hidden, weight, logits = ctx.saved_tensors
            return logits @ weight, logits.t() @ hidden, None, None

    found = {"ours": fused, "ours, output layers apart": separate, "the four GEMMs, no loss": OnlyGEMMs.apply}
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    except ModuleNotFoundError as missing:
        print(f"left out: Liger ({missing})", file=sys.stderr)
        return found
    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=False)

    def liger(hidden, weight, teacher_hidden, teacher_weight):
        return loss(hidden, weight, teacher_hidden, teacher_weight, torch.zeros(len(hidden), dtype=torch.int64))

    return found | {"Liger": liger}


def fused_inputs(tokens: int, vocab: int, args) -> list:
    """Hidden states and output weights of the student, which take gradients, and of the teacher."""
    import torch

    generator, dtype = _generator(0), getattr(torch, args.dtype)
    hidden = torch.randn(tokens, args.hidden, generator=generator)
    weight = torch.randn(vocab, args.hidden, generator=generator) * 3 / args.hidden**0.5
    move = torch.randn(hidden.shape, generator=generator) * 0.03
    inputs = [x.to(dtype) for x in (hidden, weight, hidden + move, weight)]
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
            found = _seconds(lambda loss=loss: call(loss), args)
            if turn:
                times[name].append(found)
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
            found = seconds(loss)
            if turn:  # the first compiles and pages in
                times[name].append(found)
    found = {}
    for name, loss in losses.items():
        if args.trim:
            _trim()
        counts = _collectives(loss, leaf, student, teacher)
        found[name] = _medians(times[name]) | {"collectives": counts}
        found[name] |= _memory(loss, leaf, student, teacher)
    return found


def copy_ms(elements: int, args) -> float:
    """What a copy would take that reads and writes as many bytes as the KL: in bfloat16 10 an element."""
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
    """Of a call, and on a GPU of its launches alone."""
    from gpu_timing import call_seconds

    return call_seconds(call, time.process_time if args.clock == "cpu" else time.perf_counter)


def _trim() -> None:
    """glibc gives the pages of freed memory back, those between pieces in use, too."""
    ctypes.CDLL(None).malloc_trim(0)


def _as_output(leaf, values):
    """Logits as a model returns them: no leaf, so that they may be overwritten."""
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
    """Bytes above those before the call: the most at any moment, and after the forward pass."""
    import torch

    logits = _as_output(leaf, student)
    kept, _ = _allocated(lambda: loss(logits, teacher))
    logits = _as_output(leaf, student)
    _, peak = _allocated(lambda: torch.autograd.grad(loss(logits, teacher).sum(), logits))
    return {"kept": kept, "peak": peak}


def _allocated(call) -> tuple[int, int]:
    """Bytes above those before the call: after it, with what it returns, and at its highest."""
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
    found = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(found, key=lambda e: e.start_ns())]
    del kept
    totals = list(itertools.accumulate(sizes))
    return totals[-1], max(totals)


def errors_at(losses: dict, kl: float, tokens: int = 64, vocab: int = 32000, dtype: str = "float32") -> dict:
    """Root mean square error of the loss and relative error of the gradient, mean KL near ``kl`` before the logits are
    rounded to ``dtype``."""
    import torch

    generator = _generator(1)
    teacher = torch.randn(tokens, 1, vocab, generator=generator).mul_(3)
    move = torch.randn(teacher.shape, generator=generator)

    def exact(student):
        z = student.double().requires_grad_()
        log_s, log_t = torch.log_softmax(z, -1), torch.log_softmax(teacher.double(), -1)
        loss = (log_t.exp() * (log_t - log_s)).sum(-1)
        return loss.detach().flatten(), torch.autograd.grad(loss.sum(), z)[0]

    scale = (2 * kl) ** 0.5
    for _ in range(3):  # KL is nearly quadratic in the move
        scale *= (kl / exact(teacher + scale * move)[0].mean().item()) ** 0.5
    student, teacher = (z.to(getattr(torch, dtype)) for z in (teacher + scale * move, teacher))
    loss_64, grad_64 = exact(student)
    found = {}
    for name, loss in losses.items():
        logits = _as_output(torch.empty_like(student).requires_grad_(), student)
        out = loss(logits, teacher)
        (grad,) = torch.autograd.grad(out.sum(), logits)
        if out.numel() == 1:  # a sum is compared as a mean
            error = abs(out.item() / tokens - loss_64.mean().item())
        else:
            error = (out.detach().double().flatten() - loss_64).square().mean().sqrt().item()
        found[name] = (error, ((grad.double() - grad_64).norm() / grad_64.norm()).item())
    return found


if __name__ == "__main__":
    main()
