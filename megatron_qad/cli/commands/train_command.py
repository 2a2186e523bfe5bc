"""Quantization-aware distillation: the job of pretrain_qad.py.

megatron-qad train --qad-teacher CKPT --train-data-path DATA --valid-data-path DATA_valid --save RUN ...
"""

from collections.abc import Sequence

from megatron_qad.cli.job_help import print_all_flags, print_flags


def main(argv: Sequence[str] | None = None, *, command: str = "train") -> None:
    words = list(argv or [])
    if "--help-all" in words:
        return print_all_flags()
    if "-h" in words or "--help" in words:
        return print_flags(command)
    import pretrain_qad

    pretrain_qad.main(words)
