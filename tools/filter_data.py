"""Keep the correct answers of generated data. A numeric comparison or your own function decides.

python tools/filter_data.py --input answers.jsonl --check numeric --output correct.jsonl
python tools/filter_data.py --input answers.jsonl --check my_checks.py:passes_tests --output correct.jsonl
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_qad.data.answer_filter import filter_answers, load_check  # noqa: E402
from megatron_qad.engine import entry_point  # noqa: E402
from megatron_qad.engine.plural import count  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, help="JSONL file of tools/generate_data.py, from prompts")
    parser.add_argument(
        "--check",
        required=True,
        help='numeric: the last number equals the record\'s "answer", which a .jsonl file of prompts can give; or '
        "FILE.py:FUNCTION, which gets each record and returns whether its answer is correct. FILE.py is executed",
    )
    parser.add_argument("--output", required=True, help="JSONL file to write")
    options = parser.parse_args()
    found = filter_answers(options.input, options.output, load_check(options.check))
    print(
        f"{options.output}: {count(found.kept, 'correct answer')}; left out: {found.incorrect} incorrect, "
        f"{found.truncated} truncated. {found.solved} of {count(found.prompts, 'prompt')} with a correct answer."
    )


if __name__ == "__main__":
    entry_point.run(main)
