"""Functions that the ranks of test_axes run, in addition to training_jobs."""

import weakref

import torch


def packed_logits(checkpoint: str, lengths: list[int], result: str) -> None:
    """Save the differences between a packed row's logits and those of each single document, and the logits' spread."""
    from worker_job import job

    from megatron_qad.models.context_parallel import Documents
    from megatron_qad.training.batch import Batch
    from megatron_qad.training.models import build_teacher

    size = sum(lengths)
    flags = ["--seq-length", str(size), "--micro-batch-size", "1", "--global-batch-size", "1"]
    with job(checkpoint, 1, 1, *flags) as packed_job:
        teacher = build_teacher(packed_job.config, packed_job.args, packed_job.forward)
        tokens = torch.randint(0, 100, (1, size), generator=torch.Generator().manual_seed(5))
        row = Batch(tokens, torch.arange(size)[None], documents=Documents.from_lengths(lengths))
        teacher.attach_outputs([row], seq_length=size, micro_batch_size=1)
        row_logits, errors = row.teacher_output.logits(), []
        for part, logits in zip(tokens.split(lengths, 1), row_logits.split(lengths, 1), strict=True):
            single = Batch(part, torch.arange(part.shape[1])[None])
            teacher.attach_outputs([single], seq_length=part.shape[1], micro_batch_size=1)
            errors.append((logits - single.teacher_output.logits()).abs().max().item())
    torch.save({"errors": errors, "spread": row_logits.std().item()}, result)


def watch_teacher(argv: list[str], result: str) -> None:
    """Train; record the holders of teacher parameters, and the number of teacher logits at each forward step."""
    import os

    import pretrain_qad
    from megatron_qad.engine.events import Callback

    seen: dict = {"alive": []}
    logits: list = []
    jobs: list = []
    forward_step = pretrain_qad.forward_step

    def watched_forward(job, batches, model):
        jobs[:] = [job]
        seen["alive"].append(sum(ref() is not None for ref in logits))
        return forward_step(job, batches, model)

    class Watch(Callback):
        def student_begins(self, batches, is_training):
            outputs = [batch.teacher_output for batch in batches if batch.teacher_output is not None]
            logits[:] = [weakref.ref(output.tensor) for output in outputs]

        def step_ended(self, step):
            (job,), model, optimizer = jobs, step.model, step.optimizer
            teacher = [p for chunk in job.teacher.chunks for p in chunk.parameters()]
            storages = {p.untyped_storage().data_ptr() for p in teacher if p.numel()}

            def count(parameters):
                return sum(p.untyped_storage().data_ptr() in storages for p in parameters)

            buffers = [b for chunk in model for b in chunk.buffers + chunk.expert_parallel_buffers]
            seen["num_parameters"] = len(teacher)
            if hasattr(job.teacher, "host"):
                seen["fetched"] = job.teacher.host.num_fetched
            seen["num_teacher_params"] = {
                "trained": sum(p.requires_grad or p.grad is not None or hasattr(p, "main_grad") for p in teacher),
                "wrapped": count(p for chunk in model for p in chunk.parameters()),
                "optimizer": count(p for group in optimizer.param_groups for p in group["params"]),
                "buffers": count(p for b in buffers for p in b.params),
            }

    pretrain_qad.forward_step = watched_forward
    pretrain_qad.main(argv, [Watch()])
    torch.save(seen, f"{result}.rank{os.environ['RANK']}")


def measure_schedule(argv: list[str], result: str) -> None:
    """Train, and record the passes of this rank in each step as (kind, start, end)."""
    import os
    import time

    from megatron.core.pipeline_parallel import schedules

    import pretrain_qad

    steps: list[list] = []

    def timed(get_kind, function):
        def run(*args, **kwargs):
            start = time.monotonic()
            result = function(*args, **kwargs)
            steps[-1].append((get_kind(), start, time.monotonic()))
            return result

        return run

    from megatron_qad.engine.events import Callback

    class Watch(Callback):
        def step_begins(self, step, model):
            torch.distributed.barrier()
            steps.append([])

        def forward_begins(self, batches, is_training):
            if not is_training:
                self.step_begins(0, None)

    schedules.forward_step = timed(lambda: "F" if torch.is_grad_enabled() else "T", schedules.forward_step)
    schedules.backward_step = timed(lambda: "B", schedules.backward_step)
    pretrain_qad.main(argv, [Watch()])
    torch.save(steps, f"{result}.rank{os.environ['RANK']}")
