"""What the ranks of test_axes run beside training_jobs."""

import sys
import weakref

import torch


def packed_logits(checkpoint: str, lengths: list[int], result: str) -> None:
    """Logits of a packed row's documents, and of each document by itself: largest difference, and logits' spread."""
    from layout import job

    from megatron_qad.models.context_parallel import Documents
    from megatron_qad.training.batch import Batch
    from megatron_qad.training.setup import build_teacher

    size = sum(lengths)
    flags = ["--seq-length", str(size), "--micro-batch-size", "1", "--global-batch-size", "1"]
    with job(checkpoint, 1, 1, *flags) as args:
        teacher = build_teacher(args)
        tokens = torch.randint(0, 100, (1, size), generator=torch.Generator().manual_seed(5))
        row = Batch(tokens, torch.arange(size)[None], documents=Documents.of(lengths))
        teacher.annotate([row], seq_length=size, micro_batch_size=1)
        whole, errors = row.teacher_output.logits(), []
        for part, logits in zip(tokens.split(lengths, 1), whole.split(lengths, 1), strict=True):
            alone = Batch(part, torch.arange(part.shape[1])[None])
            teacher.annotate([alone], seq_length=part.shape[1], micro_batch_size=1)
            errors.append((logits - alone.teacher_output.logits()).abs().max().item())
    torch.save({"errors": errors, "spread": whole.std().item()}, result)


def watch_teacher(argv: list[str], result: str) -> None:
    """Train, and record where parameters of the teacher are found, and how many teacher logits live at each forward."""
    import os

    from megatron.training import training as megatron_loop

    import pretrain_qad
    from megatron_qad.training.schedule import QADStep
    from megatron_qad.training.teacher import Teacher

    seen: dict = {"alive": []}
    steps, logits = [], []
    run, annotate, train_step = QADStep.run, Teacher.annotate, megatron_loop.train_step
    forward_step = pretrain_qad.forward_step

    def watched_run(step, *args, **kwargs):
        steps[:] = [step]
        return run(step, *args, **kwargs)

    def watched_annotate(teacher, batches, **kwargs):
        annotate(teacher, batches, **kwargs)
        logits[:] = [weakref.ref(batch.teacher_output.tensor) for batch in batches if batch.teacher_output is not None]

    def watched_forward(batches, model):
        seen["alive"].append(sum(ref() is not None for ref in logits))
        return forward_step(batches, model)

    def watched_step(forward, data, model, optimizer, *args, **kwargs):
        found = train_step(forward, data, model, optimizer, *args, **kwargs)
        teacher = [p for chunk in steps[0].teacher.chunks for p in chunk.parameters()]
        storages = {p.untyped_storage().data_ptr() for p in teacher if p.numel()}

        def number(parameters):
            return sum(p.untyped_storage().data_ptr() in storages for p in parameters)

        buffers = [b for chunk in model for b in chunk.buffers + chunk.expert_parallel_buffers]
        seen["num_parameters"] = len(teacher)
        if hasattr(steps[0].teacher, "host"):
            seen["fetched"] = steps[0].teacher.host.num_fetched
        seen["found"] = {
            "trained": sum(p.requires_grad or p.grad is not None or hasattr(p, "main_grad") for p in teacher),
            "wrapped": number(p for chunk in model for p in chunk.parameters()),
            "optimizer": number(p for group in optimizer.param_groups for p in group["params"]),
            "buffers": number(p for b in buffers for p in b.params),
        }
        return found

    QADStep.run, Teacher.annotate, megatron_loop.train_step = watched_run, watched_annotate, watched_step
    pretrain_qad.forward_step = watched_forward
    sys.argv = ["pretrain_qad.py", *argv]
    pretrain_qad.main()
    torch.save(seen, f"{result}.rank{os.environ['RANK']}")


def measure_schedule(argv: list[str], result: str) -> None:
    """Train, and record for each step when each pass of this rank began and ended: (kind, start, end)."""
    import os
    import time

    from megatron.core.pipeline_parallel import schedules

    import pretrain_qad
    from megatron_qad.training.schedule import QADStep

    steps: list[list] = []

    def timed(kind_of, function):
        def run(*args, **kwargs):
            start = time.monotonic()
            found = function(*args, **kwargs)
            steps[-1].append((kind_of(), start, time.monotonic()))
            return found

        return run

    run_step = QADStep.run

    def watched(step, *args, **kwargs):
        torch.distributed.barrier()
        steps.append([])
        return run_step(step, *args, **kwargs)

    QADStep.run = watched
    schedules.forward_step = timed(lambda: "F" if torch.is_grad_enabled() else "T", schedules.forward_step)
    schedules.backward_step = timed(lambda: "B", schedules.backward_step)
    sys.argv = ["pretrain_qad.py", *argv]
    pretrain_qad.main()
    torch.save(steps, f"{result}.rank{os.environ['RANK']}")
