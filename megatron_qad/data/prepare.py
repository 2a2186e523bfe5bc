"""Text and JSONL files -> Megatron's PREFIX.bin/.idx, the loss mask beside it, and PREFIX.json.

Order is kept: document n of the output is the n-th good record of the input. Everything is written aside and renamed
when it is complete, so that a prefix is whole or absent. No input is dropped without a word: each bad record is named
in PREFIX.bad.txt with its line and reason, and too many of them stop the preparation.
"""

import collections
import multiprocessing
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from megatron_qad.data.metadata import DataMetadata, metadata_path, output_files
from megatron_qad.data.sources import BLANK_LINES, BadLine, Encoded, Record, encode_record, file_format, read_records
from megatron_qad.data.tokenizer import DataTokenizer, load_tokenizer
from megatron_qad.data.writer import DocumentWriter, publish
from megatron_qad.engine.errors import QADError
from megatron_qad.engine.processes import end_with_parent
from megatron_qad.engine.run_directory import locks

_BATCH_RECORDS = 64
_BATCH_BYTES = 1 << 20  # a batch is what travels to a worker: large enough to hide the trip, small enough to hold many


@dataclass(frozen=True)
class PrepareOptions:
    """What ``prepare_data`` is asked to do."""

    inputs: Sequence[str]
    """Files, in the order of the output."""
    tokenizer: str
    """Hugging Face tokenizer directory or sentencepiece .model file."""
    output: str
    """Prefix of the files written."""
    format: str = "auto"
    """"text", "jsonl", or "auto": JSONL for .jsonl and .ndjson, text for the rest."""
    json_key: str = "auto"
    """"text", "messages", or "auto": whichever one a line has."""
    split_on: str | None = None
    """Regular expression between two documents of a text file, "blank" for blank lines; None: a file is a document."""
    prepend_bos: bool = False
    """Put BOS first where the tokenizer does not do so itself."""
    max_bad_fraction: float = 0.01
    """Bad records / all records above which nothing is written; 0 allows none."""
    workers: int = 1
    """Processes that tokenize; 1 works in this process."""
    force: bool = False
    """Replace what is there."""


def prepare_data(options: PrepareOptions) -> DataMetadata:
    """Tokenize ``options.inputs`` into ``options.output``.bin/.idx/.json (and the loss mask where it says something).

    Token ids are uint16 below a vocabulary of 65500, else int32 (Megatron's own rule); masks are uint8.

    Returns:
        The metadata that was written.

    Raises:
        QADError: missing input, existing output, unreadable tokenizer, no document at all, no token that counts in
            the loss, more bad records than allowed (they are in PREFIX.bad.txt then, and nothing else is), or a failed
            write.
    """
    _check(options)
    tokenizer = load_tokenizer(options.tokenizer)
    if options.prepend_bos and tokenizer.bos is None:
        raise QADError(f"--prepend-bos: the tokenizer {tokenizer.name} has no BOS token. Leave the flag out.")
    with locks.lock_output(options.output):
        return _prepare(options, tokenizer)


def _prepare(options: PrepareOptions, tokenizer: DataTokenizer) -> DataMetadata:
    bad_path = Path(f"{options.output}.bad.txt")
    bad_path.unlink(missing_ok=True)
    _remove_left_overs(options.output)
    aside = f"{options.output}.incomplete-{os.getpid()}"
    try:
        writer = DocumentWriter(aside, tokenizer)
        for results, blank in _encode_all(options, tokenizer):
            writer.blank_lines += blank
            writer.add(results, bad_path)
        metadata = writer.finish()
        _judge(writer, options, bad_path)
        metadata.save(metadata_path(aside))
        publish(aside, options.output)
    except OSError as error:
        raise QADError(
            f"Preparing {options.output} failed: {error}. Nothing was put in place. If the disk is full, free space or "
            "choose another --output."
        ) from error
    finally:
        for path in output_files(aside):
            path.unlink(missing_ok=True)
    return metadata


def _remove_left_overs(prefix: str) -> None:
    """What preparations of the same output left when they were killed; none is running, as this one has the lock."""
    ending = re.compile(re.escape(Path(prefix).name) + r"\.incomplete-\d+(_loss_mask)?\.(bin|idx|json)")
    for path in Path(prefix).parent.iterdir():
        if ending.fullmatch(path.name):
            path.unlink()


def _check(options: PrepareOptions) -> None:
    """Problems that can be known before any work."""
    missing = [f for f in options.inputs if not Path(f).is_file()]
    if missing or not options.inputs:
        raise QADError(
            f"--input: {', '.join(missing) or 'nothing given'} is not a file. Give existing text or JSONL files."
        )
    for file in options.inputs:
        file_format(Path(file), options.format)
    if not 0 <= options.max_bad_fraction <= 1:
        raise QADError(f"--max-bad-fraction {options.max_bad_fraction} is not between 0 and 1.")
    try:
        re.compile(options.split_on or "")
    except re.error as error:
        raise QADError(f"--split-on {options.split_on!r} is not a regular expression: {error}.") from error
    if options.workers < 1:
        raise QADError(f"--workers {options.workers} is less than 1.")
    existing = [str(p) for p in output_files(options.output) if p.exists()]
    if existing and not options.force:
        raise QADError(f"--output: {', '.join(existing)} exists. Choose another prefix, or replace it with --force.")


def _encode_all(options: PrepareOptions, tokenizer: DataTokenizer) -> Iterator[tuple[list[Encoded | BadLine], int]]:
    """(results, number of blank records) batch after batch, in input order, with a progress bar over input bytes."""
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

    # disable=None: no bar where stderr is not a terminal, so that logs stay readable.
    with tqdm(total=total, unit="B", unit_scale=True, desc="tokenizing", disable=None) as bar:
        for results, size in _ordered_map(batches(), options, tokenizer):
            bar.update(size)
            yield results, blanks.popleft()


def _ordered_map(
    batches: Iterable[list[Record]], options: PrepareOptions, tokenizer: DataTokenizer
) -> Iterator[tuple[list[Encoded | BadLine], int]]:
    """Encode batches in this process or in worker processes; at most four batches a worker are held at a time."""
    if options.workers == 1:
        for batch in batches:
            yield _encode_batch(batch, tokenizer, options), sum(len(r.data) for r in batch)
        return
    # spawn: the parent has threads (tokenizers, torch), and a fork of a process with threads may deadlock.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(options.workers, context, initializer=_start_worker, initargs=(options, os.getpid()))
    with pool:
        waiting = collections.deque()
        try:
            for batch in batches:
                waiting.append((pool.submit(_work, batch), sum(len(r.data) for r in batch)))
                if len(waiting) >= 4 * options.workers:
                    future, size = waiting.popleft()
                    yield future.result(), size
            while waiting:
                future, size = waiting.popleft()
                yield future.result(), size
        except BrokenProcessPool as error:
            raise QADError(
                "A worker process died (often: out of memory). Nothing was written. Run with fewer --workers; with "
                "--workers 1 the problem shows in this process."
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _encode_batch(batch: list[Record], tokenizer: DataTokenizer, options: PrepareOptions) -> list[Encoded | BadLine]:
    return [encode_record(record, tokenizer, options.json_key, options.prepend_bos) for record in batch]


_worker: tuple[DataTokenizer, PrepareOptions]


def _start_worker(options: PrepareOptions, parent: int) -> None:
    """Runs once in each worker: a tokenizer cannot always be pickled, so each worker reads its own."""
    global _worker
    end_with_parent(parent)  # which may have died while this process imported
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _worker = (load_tokenizer(options.tokenizer), options)


def _work(batch: list[Record]) -> list[Encoded | BadLine]:
    return _encode_batch(batch, *_worker)


def _judge(writer: DocumentWriter, options: PrepareOptions, bad_path: Path) -> None:
    """Stop before anything is put in place if too much of the input was bad."""
    records = writer.documents + writer.bad_lines
    if writer.bad_lines > options.max_bad_fraction * records:
        first = bad_path.read_text(encoding="utf-8").split("\n", 1)[0]
        raise QADError(
            f"{writer.bad_lines} of {records} records are bad, more than --max-bad-fraction {options.max_bad_fraction} "
            f"allows. The first: {first}. All are listed in {bad_path}. Nothing else was written; mend the lines or "
            "allow a larger fraction."
        )
    if not writer.documents:
        raise QADError(f"--input {' '.join(options.inputs)} holds no document ({writer.blank_lines} blank lines).")
    if not writer.supervised:
        raise QADError(
            f"--input {' '.join(options.inputs)}: none of the {writer.num_tokens} tokens of its {writer.documents} "
            "documents would count in the loss. In chats only what the assistant says counts: give chats with answers."
        )
