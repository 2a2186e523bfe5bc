"""QAD as a plain loop: float32 masters, weights fake-quantized in every forward pass, torch's AdamW on the masters.

This is the reference for in-place quantization of weights. It uses no loop, schedule, DDP or optimizer of Megatron, and
not ``quantization.in_place_weights``. It shares with a job the model's modules, the input quantizers, the loss per
token and the NVFP4 arithmetic, each of which has its own tests.
"""

import sys

import torch
from torch.func import functional_call
from torch.optim.adamw import AdamW  # torch's class; engine.adamw replaces torch.optim.AdamW


class _FakeQuant(torch.autograd.Function):
    """fake_quant with one global scale per tensor and a straight-through gradient."""

    @staticmethod
    def forward(ctx, weight):
        from megatron_qad.formats import nvfp4

        return nvfp4.fake_quant(weight, nvfp4.global_scale_from_amax(weight.abs().amax()))

    @staticmethod
    def backward(ctx, grad):
        return grad


def train(argv: list[str], record: str, result: str, lr: float, weight_decay: float) -> None:
    """Train on the microbatches of a one-rank ``record``; write loss, grads and masters of each step to ``result``.

    Args:
        argv: command line of the job, which gives the model and its precision.
    """
    from megatron.training import initialize_megatron

    from megatron_qad.quantization.activations import ActivationQuantizers
    from megatron_qad.training.models import build_teacher
    from megatron_qad.training.start import read_command_line, start_job

    sys.argv = ["plain_qad"]
    job = start_job(read_command_line(argv))
    initialize_megatron()
    student, teacher = _student(job), build_teacher(job.config, job.args, job.forward).chunks[0]
    formats = job.config.formats
    steps = torch.load(f"{record}.rank0")
    inputs = ActivationQuantizers([student], formats)
    for name, quantizer in inputs.quantizers.items():
        quantizer.amax = steps[0]["amaxes"][name]

    masters = {name: p.detach().float().requires_grad_() for name, p in student.named_parameters()}
    optimizer = AdamW(
        [
            {"params": [m for m in masters.values() if m.dim() > 1], "weight_decay": weight_decay},
            {"params": [m for m in masters.values() if m.dim() == 1], "weight_decay": 0.0},
        ],
        lr=lr,
        fused=True,  # like engine.adamw on a CPU
    )
    results = []
    for step in steps:
        optimizer.zero_grad()
        total, count = torch.zeros(()), 0
        for batch in step["batches"]:
            loss = _loss(student, teacher, masters, formats, batch, job.config.student.vocab_size)
            loss.backward()
            total, count = total + loss.detach(), count + int(batch["loss_mask"].count_nonzero())
        for master in masters.values():
            master.grad *= 1.0 / count
        grads = {_global_name(name): master.grad.clone() for name, master in masters.items()}
        optimizer.step()
        results.append(
            {
                "loss": (total / count).item(),
                "grads": grads,
                "masters": {_global_name(name): master.detach().clone() for name, master in masters.items()},
            }
        )
    torch.save(results, result)


def _student(job):
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_qad.models.weight_loading import load_weights
    from megatron_qad.training.models import model_config

    config = model_config(job.config, job.args, job.config.student)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    chunks = config.get_builder_cls()(config).build_distributed_models(pg_collection=groups, wrap_with_ddp=False)
    load_weights(chunks, job.config.options.qad_student)
    return chunks[0]


def _loss(student, teacher, masters, formats, batch, vocab_size) -> torch.Tensor:
    from megatron_qad.distillation import VocabShard, per_token_loss

    weights = {}
    for name, master in masters.items():
        weight = master.to(torch.bfloat16)
        weights[name] = _FakeQuant.apply(weight) if formats.get(_global_name(name)) == "nvfp4" else weight
    inputs = (batch["tokens"], batch["position_ids"], None)
    keep = {"fp32_output": False}
    with torch.no_grad():
        target = teacher(*inputs, **keep)
    logits = functional_call(student, weights, inputs, keep)
    shard = VocabShard.for_rank(logits.shape[-1], vocab_size)
    return (per_token_loss("kl", logits, target, batch["labels"], shard) * batch["loss_mask"]).sum()


def _global_name(name: str) -> str:
    return name.removeprefix("module.")
