"""What the ranks of test_axes run beside training_jobs."""

import weakref

import torch


def packed_logits(checkpoint: str, lengths: list[int], result: str) -> None:
    """Logits of a packed row's documents, and of each document by itself: largest difference, and logits' spread."""
    from worker_job import job

    from megatron_qad.models.context_parallel import Documents
    from megatron_qad.training.batch import Batch
    from megatron_qad.training.models import build_teacher

    size = sum(lengths)
    flags = ["--seq-length", str(size), "--micro-batch-size", "1", "--global-batch-size", "1"]
    with job(checkpoint, 1, 1, *flags) as found:
        teacher = build_teacher(found.config, found.args, found.forward)
        tokens = torch.randint(0, 100, (1, size), generator=torch.Generator().manual_seed(5))
        row = Batch(tokens, torch.arange(size)[None], documents=Documents.from_lengths(lengths))
        teacher.attach_outputs([row], seq_length=size, micro_batch_size=1)
        whole, errors = row.teacher_output.logits(), []
        for part, logits in zip(tokens.split(lengths, 1), whole.split(lengths, 1), strict=True):
            alone = Batch(part, torch.arange(part.shape[1])[None])
            teacher.attach_outputs([alone], seq_length=part.shape[1], micro_batch_size=1)
            errors.append((logits - alone.teacher_output.logits()).abs().max().item())
    torch.save({"errors": errors, "spread": whole.std().item()}, result)


def watch_teacher(argv: list[str], result: str) -> None:
    """Train, and record where parameters of the teacher are found, and how many teacher logits live at each forward."""
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

            def number(parameters):
                return sum(p.untyped_storage().data_ptr() in storages for p in parameters)

            buffers = [b for chunk in model for b in chunk.buffers + chunk.expert_parallel_buffers]
            seen["num_parameters"] = len(teacher)
            if hasattr(job.teacher, "host"):
                seen["fetched"] = job.teacher.host.num_fetched
            seen["found"] = {
                "trained": sum(p.requires_grad or p.grad is not None or hasattr(p, "main_grad") for p in teacher),
                "wrapped": number(p for chunk in model for p in chunk.parameters()),
                "optimizer": number(p for group in optimizer.param_groups for p in group["params"]),
                "buffers": number(p for b in buffers for p in b.params),
            }

    pretrain_qad.forward_step = watched_forward
    pretrain_qad.main(argv, [Watch()])
    torch.save(seen, f"{result}.rank{os.environ['RANK']}")


def measure_schedule(argv: list[str], result: str) -> None:
    """Train, and record for each step when each pass of this rank began and ended: (kind, start, end)."""
    import os
    import time

    from megatron.core.pipeline_parallel import schedules

    import pretrain_qad

    steps: list[list] = []

    def timed(kind_of, function):
        def run(*args, **kwargs):
            start = time.monotonic()
            found = function(*args, **kwargs)
            steps[-1].append((kind_of(), start, time.monotonic()))
            return found

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
