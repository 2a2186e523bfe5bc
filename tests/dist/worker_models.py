"""Worker: imports, logits, saves and exports of many models in one launch.

``arguments`` may hold each of these lists; they are worked off in this order, and what each yields is listed in order:
``imports`` [source, target, dtype]; ``logits`` and ``saves`` {model fields, layout fields, "flags"}; ``exports``
[checkpoint, output, layout, max_shard_bytes].
"""

from pathlib import Path

from launch import report


def cases(arguments: dict) -> list:
    from layout import job  # first: it prepares the machine

    import torch  # isort: skip
    from safetensors.torch import load_file

    from megatron_qad.checkpoint.export_hf import export_hf
    from megatron_qad.checkpoint.import_hf import import_hf
    from megatron_qad.engine.distributed import init_process_group

    init_process_group()
    results: list = [import_hf(*paths, getattr(torch, dtype)) for *paths, dtype in arguments.get("imports", ())]
    for case in arguments.get("logits", ()):
        expected = load_file(case["expected"])
        with job(case["checkpoint"], *case["parallel"], *_sizes(expected["tokens"].shape), *case["flags"]) as job_of:
            found = _logits(job_of, expected["tokens"])
            in_shards = job_of.args.sequence_parallel
            results.append({**case, "sequence_parallel": in_shards, **_compare(found, expected["logits"])})
    for case in arguments.get("saves", ()):
        # Unquantized: the export would put the weights of a quantizing policy on their grid.
        policy = ["--qad-policy", "bf16"]
        flags = ["--bf16", "--save", case["target"], "--save-interval", "1", *_sizes((2, 8)), *policy, *case["flags"]]
        with job(case["checkpoint"], *case["parallel"], *flags) as started:
            _save(started)
        results.append(case["target"])
    return results + [export_hf(*export).num_tensors for export in arguments.get("exports", ())]


def _sizes(shape) -> list[str]:
    """Megatron flags for two microbatches of half of ``shape`` [rows, length]."""
    rows, length = shape
    sizes = {"seq-length": length, "micro-batch-size": rows // 2, "global-batch-size": rows}
    return [word for name, value in sizes.items() for word in (f"--{name}", str(value))]


def _logits(job, tokens, prepare=None):
    """[rows, s, V] on the last stage, gathered over the tensor-parallel ranks; None elsewhere. Two microbatches."""
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


def _compare(found, expected) -> dict:
    """Over all ranks: the largest error, the padded vocabulary, the spread of the expected logits."""
    import torch

    numbers = torch.zeros(2)
    if found is not None:
        error = (found[..., : expected.shape[-1]] - expected).abs().max()
        numbers = torch.stack((error.nan_to_num(nan=torch.inf), torch.tensor(float(found.shape[-1]))))
    torch.distributed.all_reduce(numbers, op=torch.distributed.ReduceOp.MAX)
    return {"error": numbers[0].item(), "padded_vocab": int(numbers[1]), "std": expected.std().item()}


def _save(job) -> None:
    """Load the checkpoint and save it as the training loop does, with what export needs beside it."""
    from megatron.training.checkpointing import save_checkpoint

    from megatron_qad.training.models import build_teacher
    from megatron_qad.training.run_description import describe_run

    save = Path(job.args.save)
    chunks = build_teacher(job.config, job.args, job.forward).chunks
    if job.args.rank == 0:
        save.mkdir(parents=True, exist_ok=True)  # the lock is in it
        describe_run(job.config, save)
    job.saves.install()
    save_checkpoint(3, chunks, None, None, 0)


if __name__ == "__main__":
    report(cases)
