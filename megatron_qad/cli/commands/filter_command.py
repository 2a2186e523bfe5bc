"""Keep the correct answers of generated data. A numeric comparison or your own function decides.

megatron-qad filter --input answers.jsonl --check numeric --output correct.jsonl
megatron-qad filter --input answers.jsonl --check my_checks.py:passes_tests --output correct.jsonl
"""

import argparse
from collections.abc import Sequence

from megatron_qad.cli.command_parser import command_parser
from megatron_qad.engine.plural import count


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser("filter", __doc__)
    parser.add_argument("--input", required=True, help="JSONL file of megatron-qad generate, from prompts")
    parser.add_argument(
        "--check",
        required=True,
        help='numeric: the last number equals the record\'s "answer", which a .jsonl file of prompts can give; or '
        "FILE.py:FUNCTION, which gets each record and returns whether its answer is correct. FILE.py is executed",
    )
    parser.add_argument("--output", required=True, help="JSONL file to write")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    options = make_parser().parse_args(argv)
    from megatron_qad.data.answer_filter import filter_answers, load_check

    found = filter_answers(options.input, options.output, load_check(options.check))
    print(
        f"{options.output}: {count(found.kept, 'correct answer')}; left out: {found.incorrect} incorrect, "
        f"{found.truncated} truncated. {found.solved} of {count(found.prompts, 'prompt')} with a correct answer."
    )
