"""Worker: imports, logits, saves and exports of many models in one launch.

``arguments`` may contain each of these lists. They are processed in this order, and the results are in the same order:
``imports`` [source, target, dtype]; ``logits`` and ``saves`` {model fields, "parallel", "flags"}; ``exports``
[checkpoint, output, export layout, max_shard_bytes].
"""

from pathlib import Path

from launch import report


def cases(arguments: dict) -> list:
    from worker_job import job  # first, because it initializes the runtime

    import torch  # isort: skip
    from safetensors.torch import load_file

    from megatron_qad.checkpoint.export_hf import export_hf
    from megatron_qad.checkpoint.import_hf import import_hf
    from megatron_qad.engine.distributed import init_process_group

    init_process_group()
    results: list = [import_hf(*paths, getattr(torch, dtype)) for *paths, dtype in arguments.get("imports", ())]
    for case in arguments.get("logits", ()):
        expected = load_file(case["expected"])
        with job(case["checkpoint"], *case["parallel"], *_sizes(expected["tokens"].shape), *case["flags"]) as started:
            actual = _logits(started, expected["tokens"])
            sequence_parallel = started.args.sequence_parallel
            results.append({**case, "sequence_parallel": sequence_parallel, **_compare(actual, expected["logits"])})
    for case in arguments.get("saves", ()):
        # Without quantization, because the export would quantize the weights of a quantizing policy.
        policy = ["--qad-policy", "bf16"]
        flags = ["--bf16", "--save", case["target"], "--save-interval", "1", *_sizes((2, 8)), *policy, *case["flags"]]
        with job(case["checkpoint"], *case["parallel"], *flags) as started:
            _save(started)
        results.append(case["target"])
    return results + [export_hf(*export).num_tensors for export in arguments.get("exports", ())]


def _sizes(shape) -> list[str]:
    """Return Megatron flags for two microbatches, each half of ``shape`` [rows, length]."""
    rows, length = shape
    sizes = {"seq-length": length, "micro-batch-size": rows // 2, "global-batch-size": rows}
    return [word for name, value in sizes.items() for word in (f"--{name}", str(value))]


def _logits(job, tokens, prepare=None):
    """Return the logits of two microbatches on the last stage, [rows, s, V], and None on other stages.

    They are gathered over the tensor-parallel ranks. ``prepare(teacher)`` runs before the forward pass.
    """
    import torch
    from megatron.core import mpu

    from megatron_qad.training.batch import Batch
    from megatron_qad.training.models import build_teacher

    args = job.args
    teacher = build_teacher(job.config, args, job.forward)
    if prepare is not None:
        prepare(teacher)
    positions = torch.arange(args.seq_length).expand(args.micro_batch_size, -1)
    batches = [Batch(part, positions) for part in tokens.split(args.micro_batch_size)]
    teacher.attach_outputs(
        batches, seq_length=args.seq_length, micro_batch_size=args.micro_batch_size, decoder_seq_length=None
    )
    if not mpu.is_pipeline_last_stage():
        return None
    shard = torch.cat([batch.teacher_output.logits() for batch in batches]).contiguous()
    group = mpu.get_tensor_model_parallel_group()
    shards = [torch.empty_like(shard) for _ in range(group.size())]
    torch.distributed.all_gather(shards, shard, group=group)
    return torch.cat(shards, dim=-1)


def _compare(actual, expected) -> dict:
    """Return the largest error over all ranks, the padded vocabulary size, and the spread of the expected logits."""
    import torch

    numbers = torch.zeros(2)
    if actual is not None:
        error = (actual[..., : expected.shape[-1]] - expected).abs().max()
        numbers = torch.stack((error.nan_to_num(nan=torch.inf), torch.tensor(float(actual.shape[-1]))))
    torch.distributed.all_reduce(numbers, op=torch.distributed.ReduceOp.MAX)
    return {"error": numbers[0].item(), "padded_vocab": int(numbers[1]), "std": expected.std().item()}


def _save(job) -> None:
    """Load the checkpoint and save it as the training loop does, with the files that an export needs."""
    from megatron.training.checkpointing import save_checkpoint

    from megatron_qad.training.models import build_teacher
    from megatron_qad.training.run_description import describe_run

    save = Path(job.args.save)
    chunks = build_teacher(job.config, job.args, job.forward).chunks
    if job.args.rank == 0:
        save.mkdir(parents=True, exist_ok=True)  # for the lock file
        describe_run(job.config, save)
    job.saves.install()
    save_checkpoint(3, chunks, None, None, 0)


if __name__ == "__main__":
    report(cases)
