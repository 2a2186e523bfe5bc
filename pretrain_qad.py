"""Quantization-aware distillation (QAD): trains an NVFP4 student to match the output distribution of its BF16 teacher.

By default the student starts from the teacher's weights. Before the first step, a few forward passes calibrate the
amaxes of its activation quantizers. Then each training step, run by Megatron's own training loop:

1. runs the teacher, frozen and in BF16, on all microbatches and stores its outputs,
2. quantizes the student's weights to NVFP4 in place; activations are quantized in the forward pass,
3. runs the student on each microbatch; the loss is KL(teacher || student) of the next-token distributions, and the
   gradients pass through the quantizers unchanged (straight-through estimator),
4. updates the float32 master weights; BF16 copies of them replace the quantized weights until the next step.

With --qad-ptq nothing is trained: the student is calibrated, saved and validated, without gradients or an optimizer.

Both models are on every rank and use the same tensor, pipeline, context, expert and data parallelism.

    torchrun --nproc-per-node 2 pretrain_qad.py [--config FILE] --qad-teacher CHECKPOINT --data-path DATA --save RUN ...
"""

import sys
from collections.abc import Iterator, Sequence
from functools import partial

from megatron_qad.engine import entry_point, init_runtime

init_runtime(for_compute=True)  # selects the CPU backend if there is no GPU; must run before megatron is imported

import torch  # noqa: E402
from megatron.core.enums import ModelType  # noqa: E402
from megatron.training import pretrain, print_rank_0  # noqa: E402

from megatron_qad.engine.events import Callback  # noqa: E402
from megatron_qad.training.batch import Batch  # noqa: E402
from megatron_qad.training.job import QADJob, Step  # noqa: E402
from megatron_qad.training.plan import print_plan  # noqa: E402
from megatron_qad.training.ptq import run_ptq  # noqa: E402
from megatron_qad.training.start import check_dry_run, read_command_line, start_job  # noqa: E402


def qad_step(job: QADJob, step: Step) -> list[dict]:
    """Run the passes of one training step, or of one iteration of an evaluation, on this rank.

    Returns the loss report of each microbatch on the last pipeline stage. Megatron's optimizer update comes next.
    """
    job.teacher_pass(step)  # stores the teacher's output in each microbatch
    with job.quantized_weights(step):  # the parameters hold NVFP4 values until the next update
        return step.run_student()  # Megatron's schedule: forward_step and, in training, the backward pass


def forward_step(job: QADJob, batches: Iterator[Batch], model: torch.nn.Module):
    """Run the student on one microbatch. Returns its output and the function that computes the loss from it."""
    batch = next(batches)
    output = job.student_pass(model, batch)  # quantizes the inputs of linear layers, too
    return output, partial(job.loss, batch, model)  # KL(teacher || student)


def main(argv: Sequence[str] | None = None, callbacks: Sequence[Callback] = ()) -> None:
    """Run a job from its command line.

        import pretrain_qad

        pretrain_qad.main(["--config", "job.yaml", "--qad-dry-run"])  # prints the plan

    Args:
        argv: Megatron's flags, QAD's flags (``--qad-*``) and ``--config FILE.yaml``. None takes those of the process.
        callbacks: additional callbacks, which run after the job's own.

    Raises:
        QADError: a flag, a file or a step of the training is not valid; the message gives the next step.
    """
    config = read_command_line(sys.argv[1:] if argv is None else argv)
    job = start_job(config, callbacks)
    print_rank_0(init_runtime().report())
    if config.options.qad_dry_run:
        return print_plan(config, job.args, check_dry_run(job, qad_step))
    with job.loop.running():
        if config.options.qad_ptq:
            return run_ptq(job, job.model_config(qad_step), partial(forward_step, job))
        pretrain(
            job.pretrain_config(qad_step),
            job.datasets_provider,
            ModelType.encoder_or_decoder,
            partial(forward_step, job),
            non_loss_data_func=job.evaluated,
        )


if __name__ == "__main__":
    entry_point.run(main)
