"""Benchmark of our training step against modelopt's distillation: teacher and student on every rank, same parallelism.

    python tools/bench_colocation.py [--repeat 2] [--hidden 256] [--layers 4] [--vocab 8192] [--seq-length 256] ...

Both are complete jobs in Megatron's training loop, in BF16 with the distributed optimizer and with the same models and
batches, run in turn on this machine. Ours is pretrain_qad.py. The other is modelopt's code: ``modelopt.torch.distill``
with its Megatron plugin (teacher inside the student's module, hidden states of both concatenated between stages,
``LogitsKLLoss``) and weight and input quantizers in every forward pass, with modelopt's kernels on a GPU and with ours
on the CPU, for which modelopt has none. The results are the median time of Megatron's ``train_step`` (slowest rank),
the growth of the peak memory (resident or GPU) after the student's weights are allocated (largest rank), and the bytes
that all ranks send between pipeline stages per step.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SIDES = ("ours", "modelopt")
TP2 = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
PP2 = ["--pipeline-model-parallel-size", "2"]
LAYOUTS = {"one rank": (1, []), "TP2": (2, TP2), "PP2": (2, PP2), "TP2xPP2": (4, TP2 + PP2)}
RECOMPUTE = ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]
WARM_UP = 2  # steps; the first one also calibrates


def main() -> None:
    if sys.argv[1:2] == ["--rank-of"]:  # this process is a rank of one of the jobs
        return run_rank(sys.argv[2], sys.argv[4:], sys.argv[3])
    if sys.argv[1:2] == ["--write-inputs"]:
        return write_inputs(Path(sys.argv[2]), argparse.Namespace(**json.loads(sys.argv[3])))
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--repeat", type=int, default=2, help="number of jobs per side and parallelism")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument(
        "--head-dim", type=int, default=32, help="head dimension; there are half as many key-value heads as heads"
    )
    parser.add_argument("--layers", type=int, default=4, help="blocks of attention and MLP")
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--microbatches", type=int, default=4)
    parser.add_argument("--recompute", action="store_true", help="full activation recompute")
    parser.add_argument("--layouts", nargs="+", default=[x for x in LAYOUTS if x != "one rank"], choices=LAYOUTS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        flags = prepare_inputs(Path(directory), args)
        results = {(layout, side): [] for layout in args.layouts for side in SIDES}
        for layout in args.layouts:
            for _ in range(args.repeat):
                for side in SIDES:
                    results[layout, side].append(run(layout, side, flags, Path(directory)))
    report(results, args)


def prepare_inputs(directory: Path, args) -> list[str]:
    """Create a teacher and a student with random weights, and random data. Returns the flags of a job with them."""
    run_checked(
        "writing the inputs", [sys.executable, __file__, "--write-inputs", str(directory), json.dumps(vars(args))]
    )
    return [
        *("--qad-teacher", f"{directory}/teacher", "--qad-student", f"{directory}/student"),
        *("--data-path", f"{directory}/data", "--data-cache-path", f"{directory}/cache", "--split", "100,0,0"),
        *("--seq-length", str(args.seq_length), "--micro-batch-size", "1"),
        *("--global-batch-size", str(args.microbatches), "--train-iters", str(args.steps), "--lr", "1e-5"),
        *("--eval-interval", "1000", "--eval-iters", "0", "--log-interval", "1"),
        *("--qad-calibration-samples", str(args.microbatches)),
        *("--qad-weight-scale-rule", "max"),  # as modelopt quantizes weights in training
        *("--bf16", "--use-distributed-optimizer"),
        *(RECOMPUTE if args.recompute else ()),
    ]


def write_inputs(directory: Path, args) -> None:
    """Write models and data. Runs in a separate process, so that its memory does not count for any job."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "dist")]
    import tiny_job
    import torch

    from megatron_qad.engine import init_runtime

    init_runtime()
    from megatron_qad.checkpoint.import_hf import import_hf
    from megatron_qad.engine.distributed import init_process_group

    init_process_group()
    config = tiny_job.LLAMA | {
        "hidden_size": args.hidden,
        "intermediate_size": 3 * args.hidden,
        "num_attention_heads": args.hidden // args.head_dim,
        "num_key_value_heads": max(args.hidden // args.head_dim // 2, 2),
        "head_dim": args.head_dim,
        "num_hidden_layers": args.layers,
        "vocab_size": args.vocab,
        "max_position_embeddings": args.seq_length,
    }
    for role, noise in (("teacher", 0.0), ("student", 0.1)):
        source = tiny_job.write_hf(directory / f"hf_{role}", config, noise=noise, dtype=torch.bfloat16)
        import_hf(source, directory / role)
    documents = 30 + args.seq_length * args.microbatches * (args.steps + 6) // 40
    tiny_job.write_data(directory / "data", vocab_size=args.vocab, num_documents=documents)


def run(layout: str, side: str, flags: list[str], directory: Path) -> list[dict]:
    """Run one job. Returns the measurements of each rank."""
    nproc, layout_flags = LAYOUTS[layout]
    result = directory / f"result_{side}_{time.monotonic_ns()}"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc), __file__]
    command += ["--rank-of", side, str(result), *flags, *layout_flags]
    run_checked(f"{side} with {layout}", command)
    return [json.loads(Path(f"{result}.rank{rank}").read_text()) for rank in range(nproc)]


def run_checked(what: str, command: list[str]) -> None:
    """Run a command, or exit with its output if it fails."""
    path = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    completed = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    if completed.returncode:
        errors = completed.stderr.split("torch/distributed/elastic")[0]  # without the launcher's traceback
        sys.exit(f"error: {what} failed:\n{completed.stdout[-1000:]}\n{errors[-3000:]}")


def report(results: dict, args) -> None:
    """Print a table of the measurements."""
    print(
        f"hidden {args.hidden}, {args.layers} blocks, vocabulary {args.vocab}, {args.microbatches} microbatches of "
        f"{args.seq_length} tokens"
    )
    columns = (
        "layout",
        "side",
        "seconds per step",
        "peak MiB per rank",
        "bytes between stages per step",
        "loss, first and last",
    )
    print("| " + " | ".join(columns) + " |")
    print("|---|---|---|---|---|---|")
    for layout in args.layouts:
        summaries = {}
        for side in SIDES:
            jobs = results[layout, side]
            seconds, memory = medians(jobs)
            sent = sum(rank["sent"] for rank in jobs[0])
            summaries[side] = seconds, memory / 2**20, sent
            losses = next(rank["losses"] for rank in jobs[0] if rank["losses"])
            row = (
                layout,
                side,
                f"{seconds:.3f}",
                f"{memory / 2**20:.0f}",
                f"{sent:,}",
                f"{losses[0]:.4f}, {losses[-1]:.4f}",
            )
            print("| " + " | ".join(row) + " |")
        ours, peer = summaries["ours"], summaries["modelopt"]
        sent = f"{ours[2] / peer[2]:.2f}" if peer[2] else "-"
        print(f"| {layout} | ratio | {peer[0] / ours[0]:.2f}x faster | {ours[1] / peer[1]:.2f} | {sent} | |")


def medians(jobs: list[list[dict]]) -> tuple[float, float]:
    """Return seconds per step of the slowest rank, and growth of the peak memory in bytes of the largest rank."""
    steps = [max(times) for job in jobs for times in zip(*(rank["seconds"] for rank in job), strict=True)]
    return statistics.median(steps), statistics.median(max(rank["memory"] for rank in job) for job in jobs)


def run_rank(side: str, argv: list[str], result: str) -> None:
    import pretrain_qad  # noqa: I001  first, because it initializes the backend
    import torch

    from megatron_qad.engine.events import Callback
    from megatron_qad.planning.live_bytes import LiveBytes
    from megatron_qad.training.plan import plan

    measured = {"seconds": [], "memory": 0, "sent": 0, "losses": [], "saved": 0}
    sent = count_sends()

    class Measurements(Callback):
        def job_begins(self, job, resumes_at):
            measured["plan"] = list(plan(job.config, job.args))  # as --qad-dry-run prints it
            reset_peak(measured)

        def step_begins(self, step, model):
            self.live = None
            if not measured["seconds"]:  # the first step, whose time does not count
                self.live = LiveBytes(parameter for chunk in model for parameter in chunk.parameters())
                self.hooks = self.live.counting()
                self.hooks.__enter__()
            torch.distributed.barrier()
            torch.cuda.synchronize()
            self.before, self.began = sent[0], time.perf_counter()

        def step_ended(self, step):
            torch.cuda.synchronize()
            measured["seconds"].append(time.perf_counter() - self.began)
            if self.live is not None:
                self.hooks.__exit__(None, None, None)
                measured["saved"] = self.live.peak
            measured["sent"] = sent[0] - self.before
            for value in step.losses.values():
                measured["losses"].append(float(torch.as_tensor(value).reshape(-1)[0]))

    if side == "modelopt":
        train_peer(argv, [Measurements()])
    else:
        pretrain_qad.main(argv, [Measurements()])
    measured["seconds"] = measured["seconds"][WARM_UP:]
    measured["before"], measured["memory"] = measured["memory"], peak_memory() - measured["memory"]
    Path(f"{result}.rank{os.environ['RANK']}").write_text(json.dumps(measured))


def on_gpu() -> bool:
    from megatron_qad.engine import capabilities

    return capabilities().device == "cuda"


def peak_memory() -> int:
    import torch

    return torch.cuda.max_memory_allocated() if on_gpu() else status_bytes("VmHWM")


def status_bytes(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def reset_peak(measured: dict) -> None:
    """Reset the peak after the student's weights are allocated, whose size is the same on both sides."""
    import torch

    if on_gpu():
        torch.cuda.reset_peak_memory_stats()
        measured["memory"] = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")
        measured["memory"] = status_bytes("VmRSS")


def count_sends() -> list[int]:
    """Count the bytes that this rank sends to other pipeline stages, in a list with one element."""
    import torch

    original, total = torch.distributed.P2POp, [0]

    def counted(operation, tensor, *args, **kwargs):
        if operation is torch.distributed.isend:
            total[0] += tensor.numel() * tensor.element_size()
        return original(operation, tensor, *args, **kwargs)

    torch.distributed.P2POp = counted
    return total


def train_peer(argv: list[str], callbacks: list) -> None:
    """Train with modelopt's distillation, with the same command line, data and training loop as ours."""
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from megatron_qad.training.models import model_config
    from megatron_qad.training.start import read_command_line, start_job

    job = start_job(read_command_line(argv), callbacks)
    student = model_config(job.config, job.args, job.config.student)
    student.pre_wrap_hooks.append(partial(prepare_peer, job))
    with job.loop.running():
        pretrain(
            pretrain_cfg_container_from_args(job.args, student),
            job.datasets_provider,
            ModelType.encoder_or_decoder,
            peer_forward_step,
        )


def prepare_peer(job, chunks):
    """Set up modelopt's distillation: quantizers in the student, the teacher inside it, concatenated tensors."""
    import modelopt.torch.distill as mtd
    from megatron.core.utils import unwrap_model
    from modelopt.torch.distill.plugins import megatron as plugin

    from megatron_qad.engine.events import TrainedStep
    from megatron_qad.engine.patches import replace
    from megatron_qad.formats.nvfp4_format import NVFP4
    from megatron_qad.models.weight_loading import load_weights
    from megatron_qad.quantization.activations import input_attributes
    from megatron_qad.quantization.names import named_modules_globally
    from megatron_qad.training.batch import iterators
    from megatron_qad.training.calibration_pass import CalibrationPass
    from megatron_qad.training.models import build_teacher

    job.events.job_begins(job, 0)
    load_weights(chunks, job.config.student.checkpoint)
    job.activations = job.quantize_activations(chunks)
    weights = job.weights = job.quantize_weights(chunks)
    amaxes = dict(zip(weights.weights, weights.amaxes(), strict=True))
    quantizers = []
    for name, module in named_modules_globally(chunks[0]):
        if f"{name}.weight" in amaxes:
            module.weight_quantizer.set_from_attribute_config(input_attributes(NVFP4))
            if on_gpu():
                for quantizer in (module.weight_quantizer, module.input_quantizer):
                    quantizer.backend = None  # modelopt's kernels
            module.weight_quantizer.amax = amaxes[f"{name}.weight"].view(1)
            quantizers.append(module.weight_quantizer)
    assert quantizers, "no weight quantizer on this rank"
    (student,), (teacher,) = chunks, build_teacher(job.config, job.args, job.forward).chunks
    teacher = unwrap_model(teacher)
    config = plugin.setup_distillation_config(None, student.config, teacher.config)
    kd = {"teacher_model": teacher, "criterion": config.criterion, "loss_balancer": config.loss_balancer}
    student = mtd.convert(student, mode=[("kd_loss", kd)])
    plugin.adjust_distillation_model_for_mcore(student, config)
    # Parts of our step that are still used: one calibration with unquantized weights, and reading microbatches.
    calibration = CalibrationPass(job)
    is_calibrated = False

    def run_step(schedule, *, data_iterator, num_microbatches, **call):
        nonlocal is_calibrated
        shape = {k: call.pop(k) for k in ("seq_length", "micro_batch_size", "decoder_seq_length")}
        adjust = plugin.get_tensor_shapes_adjust_fn_for_distillation(call["model"], **shape)
        if adjust is not None:
            call["adjust_tensor_shapes_fn"] = adjust
        for quantizer in quantizers if not is_calibrated else ():
            quantizer.disable()
        batches = calibration.next_batches(
            partial(schedule, adjust_tensor_shapes_fn=adjust) if adjust is not None else schedule,
            data_iterator,
            num_microbatches,
            shape,
            call["model"],
            is_training=not call.get("forward_only"),
        )
        for quantizer in quantizers if not is_calibrated else ():
            quantizer.enable()
        is_calibrated = True
        batches = iterators(batches, data_iterator)
        return schedule(data_iterator=batches, num_microbatches=num_microbatches, **call, **shape)

    # modelopt's step does not use our step guard. Only the schedule is replaced, and the step is timed.
    def timed(upstream):
        def train_step(forward, data_iterator, model, optimizer, scheduler, *args, **kwargs):
            job.events.step_begins(job.loop.step, model)
            outputs = upstream(forward, data_iterator, model, optimizer, scheduler, *args, **kwargs)
            job.events.step_ended(TrainedStep(job.loop.step, outputs[0], outputs[5], model, optimizer, scheduler))
            return outputs

        return train_step

    def schedules(upstream):
        return lambda *args, **kwargs: partial(run_step, upstream(*args, **kwargs))

    replace("megatron.training.training:get_forward_backward_func", schedules)
    replace("megatron.training.training:train_step", timed)
    return [student]


def peer_forward_step(batches, model):
    batch = next(batches)
    output = model(batch.tokens, batch.position_ids, None, labels=batch.labels)
    return output, partial(peer_loss, batch, model)


def peer_loss(batch, model, output):
    """Loss as in Megatron's post-training: masked sums, with the KL summed over the vocabulary shards."""
    import torch
    from megatron.core import mpu
    from megatron.core.utils import unwrap_model

    def masked(loss):
        is_shard = False
        if isinstance(loss, tuple):
            loss, is_shard, _ = loss
        total = (loss.float() * batch.loss_mask).sum()
        if is_shard and mpu.get_tensor_model_parallel_world_size() > 1:
            torch.distributed.all_reduce(total, group=mpu.get_tensor_model_parallel_group())
        return total

    losses = unwrap_model(model).compute_kd_loss(student_loss=masked(output), loss_reduction_fn=masked)
    total = losses["kd_loss"] if isinstance(losses, dict) else losses
    num_tokens = batch.loss_mask.count_nonzero().int()
    return total, num_tokens, {"kl loss": torch.stack((total.detach(), num_tokens.float()))}


if __name__ == "__main__":
    main()
