"""Check an exported NVFP4 checkpoint: every fault on a line, a summary, exit code 1 if there was a fault."""

import argparse
import sys

from megatron_qad.checkpoint.validate import validate_nvfp4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "directory", metavar="DIR", help="an HF checkpoint in the modelopt or compressed-tensors NVFP4 layout"
    )
    report = validate_nvfp4(parser.parse_args().directory)
    for fault in report.faults:
        print(f"FAULT {fault}")
    print(report.summary())
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(main())
