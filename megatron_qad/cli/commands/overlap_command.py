"""Count duplicates in prepared training data, and validation documents that it contains.

megatron-qad overlap data/chats data/texts --validation data/chats_valid
"""

import argparse
from collections.abc import Sequence

from megatron_qad.cli.command_parser import command_parser
from megatron_qad.engine import init_runtime


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser("overlap", __doc__)
    parser.add_argument("training", nargs="+", metavar="PREFIX", help="prefixes of the training data")
    parser.add_argument("--validation", metavar="PREFIX", help="prefix of the validation data")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    options = make_parser().parse_args(argv)
    init_runtime()
    from megatron_qad.data.overlap import measure_overlap

    found = measure_overlap(options.training, options.validation)
    print(
        f"training: {found.training} documents, {found.duplicates} duplicates, {found.near_duplicates} near-duplicates"
    )
    if options.validation:
        print(
            f"validation: {found.validation} documents; {found.in_training} equal a training document, "
            f"{found.near_training} are near-duplicates of one, {found.contaminated} are contaminated (half of their "
            "13-grams occur in training)"
        )
        for number, share in found.worst:
            print(f"  document {number}: {share:.0%} of its 13-grams occur in training")
