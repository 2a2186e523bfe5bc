"""Prepare text and JSONL files as Megatron's PREFIX.bin/.idx with a loss mask and metadata (PREFIX.json).

The order of the records is kept; a chat may become several documents (``data.chat``). Files are written under a
temporary prefix and renamed when complete, so an output is either complete or absent. No record is dropped silently:
each bad record is listed in PREFIX.bad.txt with its line and the reason, and too many of them are an error.
"""

import collections
import multiprocessing
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from megatron_qad.data.chat import MULTI_TURN
from megatron_qad.data.metadata import DataMetadata, metadata_path, output_files
from megatron_qad.data.sources import BLANK_LINES, BadLine, Encoded, Record, encode_record, file_format, read_records
from megatron_qad.data.tokenizer import DataTokenizer, load_tokenizer
from megatron_qad.data.writer import DocumentWriter, publish
from megatron_qad.engine.errors import QADError
from megatron_qad.engine.plural import count
from megatron_qad.engine.processes import end_with_parent
from megatron_qad.engine.run_directory import locks

_BATCH_RECORDS = 64
_BATCH_BYTES = 1 << 20  # a batch is sent to a worker: large enough to hide the transfer, small enough to hold several

type Results = list[list[Encoded] | BadLine]
"""For each record its documents, or why there are none."""


@dataclass(frozen=True)
class PrepareOptions:
    """Options of ``prepare_data``."""

    inputs: Sequence[str]
    """Input files, in the order of the output."""
    tokenizer: str
    """Hugging Face tokenizer directory or sentencepiece .model file."""
    output: str
    """Prefix of the output files."""
    format: str = "auto"
    """Input format: "text", "jsonl", or "auto" (JSONL for .jsonl and .ndjson, text otherwise)."""
    json_key: str = "auto"
    """Key of the JSONL lines to use: "text", "messages", or "auto" (the one that a line has)."""
    split_on: str | None = None
    """Separator between documents of a text file: a regular expression or "blank". None: one document per file."""
    multi_turn: str = "each"
    """Which turns of the assistant count: "each" or "last", see ``data.chat.encode_chat``."""
    prepend_bos: bool = False
    """Prepend BOS to documents if the tokenizer does not do so itself."""
    max_bad_fraction: float = 0.01
    """Largest accepted fraction of bad records; above it no data is written. 0 accepts none."""
    workers: int = 1
    """Number of processes that tokenize. 1 means this process."""
    force: bool = False
    """Whether to replace an existing output."""


def prepare_data(options: PrepareOptions) -> DataMetadata:
    """Tokenize ``options.inputs`` into ``options.output``.bin/.idx/.json, and a loss mask if some token does not count.

    Token ids are uint16 below a vocabulary of 65500, else int32 (Megatron's own rule); masks are uint8.

    Returns:
        The metadata of the output.

    Raises:
        QADError: a missing input, an existing output, an unreadable tokenizer, no document, no token that counts in the
            loss, more bad records than allowed (then only PREFIX.bad.txt is written), or a failed write.

    Example::

        init_runtime()  # megatron_qad.engine: before Megatron is imported
        metadata = prepare_data(PrepareOptions(inputs=["chats.jsonl"], tokenizer="my_model", output="data/chats"))
        print(metadata.documents, metadata.supervised_tokens)
    """
    _check_options(options)
    tokenizer = load_tokenizer(options.tokenizer)
    if options.prepend_bos and tokenizer.bos is None:
        raise QADError(f"--prepend-bos: the tokenizer {tokenizer.name} has no BOS token. Omit the flag.")
    with locks.lock_output(options.output):
        return _prepare(options, tokenizer)


def _prepare(options: PrepareOptions, tokenizer: DataTokenizer) -> DataMetadata:
    bad_path = Path(f"{options.output}.bad.txt")
    bad_path.unlink(missing_ok=True)
    _remove_leftovers(options.output)
    aside = f"{options.output}.incomplete-{secrets.token_hex(4)}"  # nobody can plant a link of that name
    try:
        writer = DocumentWriter(aside, tokenizer)
        for results, blank in _encode_all(options, tokenizer):
            writer.blank_lines += blank
            writer.add(results, bad_path)
        metadata = writer.finish()
        _check_documents(writer, options, bad_path)
        metadata.save(metadata_path(aside))
        publish(aside, options.output)
    except OSError as error:
        raise QADError(
            f"Preparing {options.output} failed: {error}. No data was written. If the disk is full, free space or "
            "choose another --output."
        ) from error
    finally:
        for path in output_files(aside):
            path.unlink(missing_ok=True)
    return metadata


def _remove_leftovers(prefix: str) -> None:
    """Remove files of killed preparations of the same output. None can be running: this process has the lock."""
    leftover = re.compile(re.escape(Path(prefix).name) + r"\.incomplete-[0-9a-f]+(_loss_mask)?\.(bin|idx|json)")
    for path in Path(prefix).parent.iterdir():
        if leftover.fullmatch(path.name):
            path.unlink()


def _check_options(options: PrepareOptions) -> None:
    """Check everything that can be checked before reading the inputs."""
    missing = [f for f in options.inputs if not Path(f).is_file()]
    if missing or not options.inputs:
        raise QADError(f"--input: {', '.join(missing) or '(none)'} is not a file. Give existing text or JSONL files.")
    for file in options.inputs:
        file_format(Path(file), options.format)
    if not 0 <= options.max_bad_fraction <= 1:
        raise QADError(f"--max-bad-fraction {options.max_bad_fraction} is not between 0 and 1. Give such a fraction.")
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
    existing = [str(p) for p in output_files(options.output) if p.exists()]
    if existing and not options.force:
        raise QADError(
            f"--output: {', '.join(existing)} already exists. Choose another prefix, or give --force to replace it."
        )


def _encode_all(options: PrepareOptions, tokenizer: DataTokenizer) -> Iterator[tuple[Results, int]]:
    """Yield (results, number of blank records) batch by batch in input order, with a progress bar over input bytes."""
    split_on = BLANK_LINES if options.split_on == "blank" else options.split_on
    total = sum(Path(f).stat().st_size for f in options.inputs)
    blanks = collections.deque()

    def batches() -> Iterator[list[Record]]:
        batch, size, blank = [], 0, 0
        for file in options.inputs:
            for record in read_records(Path(file), file_format(Path(file), options.format), split_on):
                if isinstance(record, int):
                    blank += record
                    continue
                batch.append(record)
                size += len(record.data)
                if len(batch) >= _BATCH_RECORDS or size >= _BATCH_BYTES:
                    blanks.append(blank)
                    yield batch
                    batch, size, blank = [], 0, 0
        blanks.append(blank)
        yield batch

    # disable=None: no bar if stderr is not a terminal, to keep logs readable.
    with tqdm(total=total, unit="B", unit_scale=True, desc="tokenizing", disable=None) as bar:
        for results, size in _ordered_map(batches(), options, tokenizer):
            bar.update(size)
            yield results, blanks.popleft()


def _ordered_map(
    batches: Iterable[list[Record]], options: PrepareOptions, tokenizer: DataTokenizer
) -> Iterator[tuple[Results, int]]:
    """Encode batches in this process or in worker processes; at most four batches per worker are held at a time."""
    if options.workers == 1:
        for batch in batches:
            yield _encode_batch(batch, tokenizer, options), sum(len(r.data) for r in batch)
        return
    # spawn: the parent has threads (tokenizers, torch), and forking a process with threads may deadlock.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(options.workers, context, initializer=_start_worker, initargs=(options, os.getpid()))
    with pool:
        pending = collections.deque()
        try:
            for batch in batches:
                pending.append((pool.submit(_encode_in_worker, batch), sum(len(r.data) for r in batch)))
                if len(pending) >= 4 * options.workers:
                    future, size = pending.popleft()
                    yield future.result(), size
            while pending:
                future, size = pending.popleft()
                yield future.result(), size
        except BrokenProcessPool as error:
            raise QADError(
                "A worker process died, often because memory ran out. No data was written. Use fewer --workers, or "
                "--workers 1 to see the error in this process."
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _encode_batch(batch: list[Record], tokenizer: DataTokenizer, options: PrepareOptions) -> Results:
    settings = (options.json_key, options.prepend_bos, options.multi_turn)
    return [encode_record(record, tokenizer, *settings) for record in batch]


_worker: tuple[DataTokenizer, PrepareOptions]


def _start_worker(options: PrepareOptions, parent: int) -> None:
    """Load the tokenizer in a worker; it cannot always be pickled, so each worker loads its own."""
    global _worker
    end_with_parent(parent)  # also if the parent died while this process imported
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _worker = (load_tokenizer(options.tokenizer), options)


def _encode_in_worker(batch: list[Record]) -> Results:
    return _encode_batch(batch, *_worker)


def _check_documents(writer: DocumentWriter, options: PrepareOptions, bad_path: Path) -> None:
    """Check, before the output is put in place, the number of bad records, documents and counted tokens."""
    records = writer.records + writer.bad_lines
    if writer.bad_lines > options.max_bad_fraction * records:
        first = bad_path.read_text(encoding="utf-8").split("\n", 1)[0]
        verb = "is" if writer.bad_lines == 1 else "are"
        raise QADError(
            f"{writer.bad_lines} of {count(records, 'record')} {verb} bad, more than --max-bad-fraction "
            f"{options.max_bad_fraction} allows. The first: {first}. All are listed in {bad_path}. No data was "
            "written. Fix the records or allow a larger fraction."
        )
    if not writer.documents:
        blank = count(writer.blank_lines, "blank line")
        raise QADError(f"--input {' '.join(options.inputs)} has no document ({blank}). Give other files.")
    if not writer.supervised:
        raise QADError(
            f"--input {' '.join(options.inputs)}: no token of its {count(writer.documents, 'document')} "
            "would count in the loss. In chats only the assistant's tokens count; give such chats."
        )
