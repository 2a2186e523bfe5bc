"""Prepare text, JSON or parquet as Megatron's .bin/.idx, with loss masks for chats (see ``megatron_qad.data.prepare``).

megatron-qad prepare --input chats.jsonl --tokenizer my_model/ --output data/chats --workers 8
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_qad.cli.command_parser import command_parser
from megatron_qad.data.chat import MULTI_TURN
from megatron_qad.data.images.image_settings import ImageSettings
from megatron_qad.data.metadata import DataMetadata, load_metadata, valid_prefix
from megatron_qad.data.prepare_options import JSON_KEYS, PrepareOptions
from megatron_qad.engine import init_runtime
from megatron_qad.engine.plural import count
from megatron_qad.engine.text_files import read_json

EPILOG = """
Inputs: text; JSON, one object per line or one list; both also compressed (gzip, zstd, bzip2, xz); parquet files;
directories of Hugging Face datasets. Nothing is downloaded. docs/prepared_data.md has the details.
A record has "text" (a string), "messages" (a list of {"role", "content"}, optionally with "tools"), "conversations"
(ShareGPT: a list of {"from", "value"}), or "input_ids" (a list, optionally with a "loss_mask"). Messages are
rendered with the tokenizer's chat template, and only the assistant's tokens count in the loss. EOD ends each document.
If the template removes earlier thoughts (Qwen3, Nemotron), a chat becomes several documents; docs/chats.md says which
messages are accepted and how they are rendered.
With --images-for MODEL, records may have images: LLaVA ("image" and <image> in the human's text), image_url and image
parts of content, "images" columns of parquet files with the bytes, and tar shards (KEY.json with KEY.jpg). Images are
local files or base64 text; they are checked here and decoded when a job reads them. docs/image_data.md has the details.
With "finish": "length", which megatron-qad generate writes for truncated text, the end does not count.
Bad lines are skipped and listed in OUTPUT.bad.txt. Exit status: 0 if they are at most --max-bad-fraction of all
records; otherwise 1, and no data is written. Output files: OUTPUT.bin, .idx, .json, and OUTPUT_loss_mask.bin, .idx
if some token does not count, and OUTPUT_images.bin, .idx and OUTPUT_image_refs.bin, .idx if some record has images.
"""


def make_parser() -> argparse.ArgumentParser:
    defaults = PrepareOptions(inputs=[], tokenizer="", output="")
    parser = command_parser("prepare", __doc__, epilog=EPILOG)
    parser.add_argument(
        "--input", dest="inputs", nargs="+", required=True, metavar="FILE", help="files or dataset directories"
    )
    parser.add_argument(
        "--tokenizer", required=True, help="Hugging Face tokenizer directory or sentencepiece .model file"
    )
    parser.add_argument("--output", required=True, metavar="PREFIX", help="prefix of the output files")
    parser.add_argument(
        "--format",
        choices=["auto", "text", "jsonl"],
        default=defaults.format,
        help="format of text and JSON files; auto: .jsonl, .ndjson and .json are JSON, other files are text",
    )
    parser.add_argument(
        "--json-key",
        choices=JSON_KEYS,
        default=defaults.json_key,
        help="key of the records to use; messages includes conversations; auto: the one that a record has",
    )
    parser.add_argument(
        "--split-on",
        metavar="REGEX",
        help="separator of the documents in a text file, or 'blank' for blank lines; default: one document per file",
    )
    parser.add_argument(
        "--multi-turn",
        choices=MULTI_TURN,
        default=defaults.multi_turn,
        help="turns of the assistant that count. each (default): every turn, with the text before it as the server had "
        "it; a chat becomes several documents where the template rewrites earlier turns. last: only the last turn of "
        "each chat, always one document",
    )
    parser.add_argument(
        "--prepend-bos", action="store_true", help="prepend BOS if the tokenizer does not do so (sentencepiece)"
    )
    parser.add_argument(
        "--validation-fraction",
        type=float,
        metavar="F",
        help="write this fraction of the documents to OUTPUT_valid instead, chosen by a hash of their tokens, so that "
        "equal documents are on the same side",
    )
    parser.add_argument(
        "--max-bad-fraction",
        type=float,
        default=defaults.max_bad_fraction,
        help="largest accepted fraction of bad records, default %(default)s; 0 accepts none",
    )
    parser.add_argument(
        "--workers", type=int, default=defaults.workers, help="number of processes, default %(default)s"
    )
    parser.add_argument(
        "--images-for",
        metavar="MODEL",
        help="Hugging Face directory of a vision-language model, for which records may have images; without it, such "
        "records are bad lines",
    )
    parser.add_argument(
        "--image-root", metavar="DIR", help="folder of the image files; default: the folder of each input file"
    )
    parser.add_argument("--force", action="store_true", help="replace an existing output")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    values = vars(make_parser().parse_args(argv))
    model = values.pop("images_for")
    init_runtime()  # must run before Megatron, whose index writer is used, is imported
    from megatron_qad.data.prepare import prepare_data

    images = None if model is None else settings_of_model(Path(model), values["tokenizer"])
    options = PrepareOptions(**values, images=images)
    metadata = prepare_data(options)
    report(options.output, metadata)
    if options.validation_fraction is not None:
        held_out = valid_prefix(options.output)
        report(held_out, load_metadata(held_out))
    if metadata.bad_lines:
        print(f"bad lines are listed in {options.output}.bad.txt")


def settings_of_model(model: Path, tokenizer: str) -> ImageSettings:
    """Return how a vision-language model turns images into tokens of a tokenizer.

    Raises:
        QADError: no such model, a model without images, or a tokenizer that lacks one of its tokens.
    """
    from megatron_qad.config.vision import image_settings
    from megatron_qad.data.tokenizer import load_tokenizer

    advice = "Expected the Hugging Face directory of a vision-language model."
    config, processor = model / "config.json", model / "preprocessor_config.json"
    given = read_json(processor, advice) if processor.is_file() else None
    return image_settings(read_json(config, advice), load_tokenizer(tokenizer).vocab.get, given)


def report(prefix: str, metadata: DataMetadata) -> None:
    chats = f" ({metadata.chat_documents} from {count(metadata.chats, 'chat')})" if metadata.chats else ""
    print(
        f"{prefix}: {count(metadata.documents, 'document')}{chats}, {count(metadata.tokens, 'token')}, "
        f"{metadata.supervised_tokens} of them in the loss, {metadata.unknown_tokens} unknown; "
        f"vocabulary {metadata.vocab_size} ({metadata.tokenizer_name}); {count(metadata.blank_lines, 'blank line')}, "
        f"{count(metadata.bad_lines, 'bad line')}"
    )
    if metadata.images is not None:
        images = metadata.images
        print(
            f"{prefix}: {count(images['images'], 'different image')} in {count(images['uses'], 'place')} of "
            f"{count(images['documents'], 'document')}, {count(images['tiles'], 'tile')}"
        )
