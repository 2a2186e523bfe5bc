"""Quantization-aware distillation: the job of pretrain_qad.py.

megatron-qad train --qad-teacher CKPT --train-data-path DATA --valid-data-path DATA_valid --save RUN ...
"""

from collections.abc import Sequence

from megatron_qad.cli.job_help import print_all_flags, print_flags


def main(argv: Sequence[str] | None = None, *, command: str = "train") -> None:
    flags = list(argv or [])
    if "--help-all" in flags:
        return print_all_flags()
    if "-h" in flags or "--help" in flags:
        return print_flags(command)
    import pretrain_qad

    pretrain_qad.main(flags)
