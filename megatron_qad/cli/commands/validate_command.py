"""Validate an exported NVFP4 checkpoint: print one line per issue and a summary; exit with 1 if there are issues.

    megatron-qad validate EXPORT [--against HF_BF16_DIR] [--no-sums]

Always checked: names, dtypes and shapes of all tensors, the configurations of the layout, signs and ranges of scales,
weights that are all zeros, the SHA-256 of every file, and input scales against calibration.json. --against also
compares the content with the model that training began from: weights, norms and embeddings within what rounding and
training explain, config.json, generation_config.json and the tokenizer. docs/validator.md has the bounds.
"""

import argparse
from collections.abc import Sequence

from megatron_qad.cli.command_parser import command_parser

AGAINST = (
    "Hugging Face directory of the BF16 model that training began from; after megatron-qad smooth the smoothed one "
    "(megatron-qad export --layout bf16)"
)
NO_SUMS = "do not compare files with the SHA-256 in qad_export.json; for exports whose files were edited on purpose"


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser("validate", __doc__)
    parser.add_argument(
        "directory", metavar="DIR", help="exported HF checkpoint in the modelopt or compressed-tensors layout"
    )
    parser.add_argument("--against", metavar="HF_BF16_DIR", help=AGAINST)
    parser.add_argument("--no-sums", action="store_true", help=NO_SUMS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    options = make_parser().parse_args(argv)
    from megatron_qad.checkpoint.validate import validate_nvfp4

    result = validate_nvfp4(options.directory, against=options.against, with_sums=not options.no_sums)
    for issue in result.issues:
        print(f"ISSUE {issue}")
    for note in result.notes:
        print(f"NOTE {note}")
    print(result.summary())
    return 1 if result.issues else 0
