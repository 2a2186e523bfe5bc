"""Post-training quantization: the job of pretrain_qad.py with --qad-ptq.

megatron-qad ptq --qad-teacher CKPT --train-data-path DATA --valid-data-path DATA_valid --save RUN ...
"""

from collections.abc import Sequence

from megatron_qad.cli.commands import train_command


def main(argv: Sequence[str] | None = None) -> None:
    train_command.main([*(argv or []), "--qad-ptq"], command="ptq")
