"""Options of ``prepare_data``, and everything about them that can be checked before the inputs are read."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_qad.data.chat import MULTI_TURN
from megatron_qad.data.images.image_settings import ImageSettings
from megatron_qad.data.metadata import metadata_path, output_files, valid_prefix
from megatron_qad.data.readers import expand_inputs, file_format
from megatron_qad.engine.errors import QADError

JSON_KEYS = ("auto", "text", "messages", "input_ids")
"""Keys of records that ``PrepareOptions.json_key`` may name."""


@dataclass(frozen=True)
class PrepareOptions:
    """Options of ``prepare_data``."""

    inputs: Sequence[str]
    """Input files and dataset directories, in the order of the output."""
    tokenizer: str
    """Hugging Face tokenizer directory or sentencepiece .model file."""
    output: str
    """Prefix of the output files."""
    format: str = "auto"
    """Input format: "text", "jsonl", or "auto" (JSON for .jsonl, .ndjson and .json, text otherwise)."""
    json_key: str = "auto"
    """Key of the records to use: "text", "messages", or "auto" (the one that a record has)."""
    split_on: str | None = None
    """Separator between documents of a text file: a regular expression or "blank". None: one document per file."""
    multi_turn: str = "each"
    """Which turns of the assistant count: "each" or "last", see ``data.chat.encode_chat``."""
    prepend_bos: bool = False
    """Prepend BOS to documents if the tokenizer does not do so itself."""
    validation_fraction: float | None = None
    """Fraction of the records that go to PREFIX_valid instead of PREFIX, chosen by a hash of their tokens."""
    max_bad_fraction: float = 0.01
    """Largest accepted fraction of bad records; above it no data is written. 0 accepts none."""
    workers: int = 1
    """Number of processes that tokenize. 1 means this process."""
    force: bool = False
    """Whether to replace an existing output."""
    images: ImageSettings | None = None
    """How the model turns images into tokens. None: records with images are bad."""
    image_root: str | None = None
    """Folder that has the image files. None: the folder of each input file."""

    def prefixes(self) -> list[str]:
        """Return the prefixes of the outputs: PREFIX and, with a validation fraction, PREFIX_valid."""
        return [self.output] + ([] if self.validation_fraction is None else [valid_prefix(self.output)])


def check_options(options: PrepareOptions) -> list[Path]:
    """Check the options and return the input files.

    Raises:
        QADError: an option that cannot be used.
    """
    paths = expand_inputs(list(options.inputs))
    for path in paths:
        if file_format(path, options.format) == "tar" and options.images is None:
            raise QADError(f"--input {path}: is a tar shard. Give --images-for with the model, or extract its records.")
    if options.image_root is not None and options.images is None:
        raise QADError("--image-root without --images-for: images are read for a model only. Give both, or neither.")
    if options.image_root is not None and not Path(options.image_root).is_dir():
        raise QADError(f"--image-root {options.image_root}: is not a directory. Give the folder of the image files.")
    if not 0 <= options.max_bad_fraction <= 1:
        raise QADError(f"--max-bad-fraction {options.max_bad_fraction} is not between 0 and 1. Give such a fraction.")
    fraction = options.validation_fraction
    if fraction is not None and not (math.isfinite(fraction) and 0 < fraction < 1):
        raise QADError(f"--validation-fraction {fraction}: expected a number above 0 and below 1, such as 0.01.")
    if options.multi_turn not in MULTI_TURN:
        raise QADError(f"--multi-turn {options.multi_turn!r}: expected one of {', '.join(MULTI_TURN)}.")
    try:
        re.compile(options.split_on or "")
    except re.error as error:
        raise QADError(
            f"--split-on {options.split_on!r} is not a regular expression: {error}. Escape special characters."
        ) from error
    if options.workers < 1:
        raise QADError(f"--workers {options.workers} is less than 1. Give 1 or more.")
    _check_output(options, paths)
    return paths


def _check_output(options: PrepareOptions, inputs: list[Path]) -> None:
    prefix = options.output
    if not Path(prefix).name or prefix.endswith(("/", "/.", "/..")) or prefix in (".", ".."):
        raise QADError(f"--output {prefix!r} is a directory. Give a prefix for file names, such as {prefix}/train.")
    targets = [file for p in options.prefixes() for file in output_files(p)]
    own = {file.resolve() for file in [*targets, bad_lines_file(prefix)]}
    for path in inputs:
        if path.resolve() in own:
            raise QADError(f"--output {prefix}: would overwrite the input {path}. Choose another prefix.")
    directories = [str(file) for file in [*targets, bad_lines_file(prefix)] if file.is_dir()]
    if directories:
        raise QADError(f"--output: {', '.join(directories)} is a directory. Choose another prefix.")
    existing = [str(file) for file in targets if file.exists()]
    if existing and not options.force:
        raise QADError(
            f"--output: {', '.join(existing)} already exists. Choose another prefix, or give --force to replace it."
        )
    held_out = valid_prefix(prefix)
    if options.validation_fraction is None and existing and metadata_path(held_out).exists():
        raise QADError(
            f"--output {prefix}: {held_out} was held out of it, but without --validation-fraction its documents would "
            "be in the training data too. Give the fraction, remove the files of the held-out data, or choose another "
            "prefix."
        )


def bad_lines_file(prefix: str) -> Path:
    """Return the path of the list of bad records."""
    return Path(f"{prefix}.bad.txt")
