"""Text and JSONL -> Megatron's .bin/.idx, with loss masks for chat. ``--help`` says how; the logic is in the data room.

python tools/prepare_data.py --input chats.jsonl --tokenizer my_model/ --output data/chats --workers 8
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_qad.data.prepare import PrepareOptions, prepare_data  # noqa: E402
from megatron_qad.data.sources import JSON_KEYS  # noqa: E402
from megatron_qad.engine import QADError, init_runtime  # noqa: E402

EPILOG = """
A JSONL line has "text" (a string) or "messages" (a list of {"role", "content"}, with "tools" if any), rendered through
the tokenizer's chat template; only what the assistant wrote counts in the loss. EOD ends each document.
With "finish": "length", as generate_data.py writes for a text that it cut off, the end does not count.
Bad lines are listed in OUTPUT.bad.txt and left out. Exit status: 0 if they are at most --max-bad-fraction of all
records; 1 otherwise, and then no data is written. Written: OUTPUT.bin, .idx, .json, and OUTPUT_loss_mask.bin, .idx
where some token does not count.
"""


def arguments() -> PrepareOptions:
    defaults = PrepareOptions(inputs=[], tokenizer="", output="")
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", dest="inputs", nargs="+", required=True, metavar="FILE", help="text or JSONL files")
    parser.add_argument(
        "--tokenizer", required=True, help="Hugging Face tokenizer directory or sentencepiece .model file"
    )
    parser.add_argument("--output", required=True, metavar="PREFIX", help="prefix of the files to write")
    parser.add_argument(
        "--format",
        choices=["auto", "text", "jsonl"],
        default=defaults.format,
        help="auto: .jsonl and .ndjson are JSONL, other files are text",
    )
    parser.add_argument(
        "--json-key", choices=JSON_KEYS, default=defaults.json_key, help="auto: the one of the two that a line has"
    )
    parser.add_argument(
        "--split-on",
        metavar="REGEX",
        help="what stands between two documents of a text file, or 'blank'; without it a file is one document",
    )
    parser.add_argument(
        "--prepend-bos", action="store_true", help="put BOS first where the tokenizer does not (sentencepiece)"
    )
    parser.add_argument(
        "--max-bad-fraction", type=float, default=defaults.max_bad_fraction, help="default %(default)s; 0 allows none"
    )
    parser.add_argument("--workers", type=int, default=defaults.workers, help="processes, default %(default)s")
    parser.add_argument("--force", action="store_true", help="replace an existing output")
    return PrepareOptions(**vars(parser.parse_args()))


def main() -> int:
    options = arguments()
    try:
        init_runtime()  # Megatron, whose index writer is used, is imported after this
        done = prepare_data(options)
    except QADError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(
        f"{options.output}: {done.documents} documents ({done.chat_documents} chats), {done.tokens} tokens, "
        f"{done.supervised_tokens} of them count in the loss, {done.unknown_tokens} unknown; vocabulary "
        f"{done.vocab_size} ({done.tokenizer_name}); {done.blank_lines} blank lines, {done.bad_lines} bad lines"
        + (f", listed in {options.output}.bad.txt" if done.bad_lines else "")
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
