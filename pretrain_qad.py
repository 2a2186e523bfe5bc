"""Quantization-aware distillation: a frozen BF16 teacher and an NVFP4 student on every rank, inside Megatron's own
loop.

torchrun --nproc-per-node 2 pretrain_qad.py --qad-teacher CHECKPOINT --data-path PREFIX --save DIR ... [--config FILE]
"""

import sys

from megatron_qad.engine import QADError, prepare

prepare(to_compute=True)  # the CPU backend, if there is no GPU; before megatron is imported

from megatron.core.enums import ModelType  # noqa: E402
from megatron.training import pretrain, print_rank_0  # noqa: E402
from megatron.training.argument_utils import pretrain_cfg_container_from_args  # noqa: E402

from megatron_qad.data.provider import datasets_provider  # noqa: E402
from megatron_qad.training.arguments import parse_arguments  # noqa: E402
from megatron_qad.training.loss import forward_step  # noqa: E402
from megatron_qad.training.plan import print_plan  # noqa: E402
from megatron_qad.training.setup import resolve_formats, student_config  # noqa: E402
from megatron_qad.training.validation import report_validation  # noqa: E402


def main() -> None:
    args = parse_arguments()  # Megatron's flags, ours (--qad-*), the model's shape from its Hugging Face config
    print_rank_0(prepare().report())
    if args.qad.qad_dry_run:
        return print_plan(args, resolve_formats(args))
    student = student_config(args)  # its hook loads weights, inserts quantizers, builds the teacher, wraps the schedule
    pretrain(
        pretrain_cfg_container_from_args(args, student),
        datasets_provider,
        ModelType.encoder_or_decoder,
        forward_step,  # student logits -> KL(teacher || student)
        non_loss_data_func=report_validation,
    )


if __name__ == "__main__":
    try:
        main()
    except QADError as error:
        sys.exit(f"error: {error}")
