"""Count duplicates in prepared training data, and validation documents that it contains.

python tools/check_overlap.py data/chats data/texts --validation data/chats_valid
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_qad.engine import entry_point, init_runtime  # noqa: E402

init_runtime()

from megatron_qad.data.overlap import measure_overlap  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("training", nargs="+", metavar="PREFIX", help="prefixes of the training data")
    parser.add_argument("--validation", metavar="PREFIX", help="prefix of the validation data")
    options = parser.parse_args()
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


if __name__ == "__main__":
    entry_point.run(main)
