"""Validate an exported NVFP4 checkpoint: print one line per issue and a summary; exit with 1 if there are issues."""

import argparse

from megatron_qad.checkpoint.validate import validate_nvfp4
from megatron_qad.engine import entry_point

NO_SUMS = "do not compare files with the SHA-256 in qad_export.json; for exports whose files were edited on purpose"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "directory", metavar="DIR", help="exported HF checkpoint in the modelopt or compressed-tensors layout"
    )
    parser.add_argument("--no-sums", action="store_true", help=NO_SUMS)
    options = parser.parse_args()
    result = validate_nvfp4(options.directory, with_sums=not options.no_sums)
    for issue in result.issues:
        print(f"ISSUE {issue}")
    print(result.summary())
    return 1 if result.issues else 0


if __name__ == "__main__":
    entry_point.run(main)
