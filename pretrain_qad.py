"""Quantization-aware distillation: a frozen BF16 teacher and an NVFP4 student on every rank, inside Megatron's own
loop.

torchrun --nproc-per-node 2 pretrain_qad.py --qad-teacher CHECKPOINT --data-path PREFIX --save DIR ... [--config FILE]
"""

import sys
from collections.abc import Iterator, Sequence
from functools import partial

from megatron_qad.engine import QADError, init_runtime

init_runtime(for_compute=True)  # the CPU backend, if there is no GPU; before megatron is imported

import torch  # noqa: E402
from megatron.core.enums import ModelType  # noqa: E402
from megatron.training import pretrain, print_rank_0  # noqa: E402
from megatron.training.argument_utils import pretrain_cfg_container_from_args  # noqa: E402

from megatron_qad.engine.events import Callback  # noqa: E402
from megatron_qad.training.batch import Batch  # noqa: E402
from megatron_qad.training.job import QADJob, Step  # noqa: E402
from megatron_qad.training.plan import print_plan  # noqa: E402
from megatron_qad.training.start import read_command_line, start_job  # noqa: E402


def qad_step(job: QADJob, step: Step) -> list[dict]:
    """One step on every rank, or one iteration of an evaluation. Megatron's optimizer then updates the masters."""
    job.teacher_pass(step)  # BF16, frozen: its next-token distribution is left in each microbatch
    with job.quantized_weights(step):  # the parameters hold NVFP4 values until the next update
        return step.run_student()  # Megatron's schedule: forward_step and, in training, a backward pass of each


def forward_step(job: QADJob, batches: Iterator[Batch], model: torch.nn.Module):
    """One microbatch through the student. Returns its output and the function that turns that into a loss."""
    batch = next(batches)
    logits = job.student_pass(model, batch)  # inputs of its linears quantized, too
    return logits, partial(job.loss, batch, model)  # KL(teacher || student)


def main(argv: Sequence[str] | None = None, callbacks: Sequence[Callback] = ()) -> None:
    config = read_command_line(sys.argv[1:] if argv is None else argv)  # Megatron's flags, ours (--qad-*), YAML files
    job = start_job(config, callbacks)
    print_rank_0(init_runtime().report())
    if config.options.qad_dry_run:
        return print_plan(config, job.args)
    with job.loop.running():
        pretrain(
            pretrain_cfg_container_from_args(job.args, job.model_config(qad_step)),
            job.datasets_provider,
            ModelType.encoder_or_decoder,
            partial(forward_step, job),
            non_loss_data_func=job.evaluated,
        )


if __name__ == "__main__":
    try:
        main()
    except QADError as error:
        sys.exit(f"error: {error}")
