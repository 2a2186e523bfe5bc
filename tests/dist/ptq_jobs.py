"""Functions that the ranks of test_ptq run."""

import torch

from megatron_qad.engine.events import Callback


def tensors(checkpoints: list[str], result: str) -> None:
    """Save every tensor of the newest iteration of each checkpoint, gate and up joined: a list of dicts by name."""
    from megatron_qad.checkpoint.torch_dist import TorchDistReader
    from megatron_qad.engine.distributed import init_process_group
    from megatron_qad.models.weight_loading import stored_shapes

    init_process_group()
    joined = []
    for checkpoint in checkpoints:
        stored = [name for name in stored_shapes(checkpoint) if not name.endswith(("_extra_state", "_v"))]
        joined.append(TorchDistReader(checkpoint).read([name.removesuffix("_w") for name in stored]))
    torch.save(joined, result)


def state(argv: list[str], result: str) -> None:
    """Run a PTQ job; save what its parameters and its wrapper are at the validation."""
    import training_jobs
    from megatron.core.distributed import DistributedDataParallel

    class Watch(Callback):
        def job_begins(self, job, resumes_at):
            self._job = job

        def forward_begins(self, batches, is_training):
            model = self._job.student
            parameters = [parameter for chunk in model for parameter in chunk.parameters()]
            found = {
                "trained": sum(p.requires_grad or p.grad is not None or hasattr(p, "main_grad") for p in parameters),
                "parameters": len(parameters),
                "wrapped": any(isinstance(chunk, DistributedDataParallel) for chunk in model),
                "is_training": is_training,
                "has_teacher": self._job.teacher is not None,
            }
            torch.save(found, result)

    training_jobs.train(argv, callbacks=[Watch()])
