"""Prepare text and JSON files or datasets as Megatron's PREFIX.bin/.idx with a loss mask and metadata (PREFIX.json).

The order of the records is kept; a chat may become several documents (``data.chat``). Files are written under a
temporary prefix and renamed when complete, so an output is either complete or absent. No record is dropped silently:
each bad record is listed in PREFIX.bad.txt with its line and the reason, and too many of them are an error.
"""

import collections
import contextlib
import hashlib
import itertools
import multiprocessing
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
from tqdm import tqdm

from megatron_qad.data.images.image_settings import ImageSettings
from megatron_qad.data.input_files import compression
from megatron_qad.data.metadata import DataMetadata, metadata_path, output_files, pairs_of_files
from megatron_qad.data.prepare_options import PrepareOptions, bad_lines_file, check_options
from megatron_qad.data.readers import BLANK_LINES, file_format, read_records
from megatron_qad.data.records import BadLine, Record
from megatron_qad.data.sources import Encoded, encode_record
from megatron_qad.data.tokenizer import DataTokenizer, load_tokenizer
from megatron_qad.data.writer import DocumentWriter, publish
from megatron_qad.engine.errors import QADError
from megatron_qad.engine.plural import count
from megatron_qad.engine.processes import end_with_parent
from megatron_qad.engine.run_directory import locks

_BATCH_RECORDS = 64
_BATCH_RECORDS_WITH_IMAGES = 4  # a worker returns the bytes of their images
_BATCH_BYTES = 1 << 20  # a batch is sent to a worker: large enough to hide the transfer, small enough to hold several
_HELD_BYTES = 1 << 26  # of batches in workers: a batch is larger than _BATCH_BYTES if a record is

type Results = list[list[Encoded] | BadLine]
"""For each record its documents, or why there are none."""


def prepare_data(options: PrepareOptions) -> DataMetadata:
    """Tokenize ``options.inputs`` into ``options.output``.bin/.idx/.json, and a loss mask if some token does not count.

    Token ids are uint16 below a vocabulary of 65500, else int32 (Megatron's own rule); masks are uint8.

    With a validation fraction, a part of the documents is written to ``options.output``_valid instead, a second output
    with its own metadata. Both appear, or neither.

    Returns:
        The metadata of ``options.output``.

    Raises:
        QADError: an input that is missing, damaged or of an unknown kind, an existing output, an unreadable tokenizer,
            no document or no token that counts in the loss (on either side), more bad records than allowed (then only
            PREFIX.bad.txt is written), or a failed write.

    Example::

        init_runtime()  # megatron_qad.engine: before Megatron is imported
        metadata = prepare_data(PrepareOptions(inputs=["chats.jsonl"], tokenizer="my_model", output="data/chats"))
        print(metadata.documents, metadata.supervised_tokens)
    """
    inputs = check_options(options)
    tokenizer = load_tokenizer(options.tokenizer)
    if options.prepend_bos and tokenizer.bos is None:
        raise QADError(f"--prepend-bos: the tokenizer {tokenizer.name} has no BOS token. Omit the flag.")
    if options.images is not None:
        _check_image_tokens(options.images, tokenizer)
    with contextlib.ExitStack() as stack:
        for prefix in options.prefixes():
            stack.enter_context(locks.lock_output(prefix))
        return _prepare(options, inputs, tokenizer)


def _prepare(options: PrepareOptions, inputs: list[Path], tokenizer: DataTokenizer) -> DataMetadata:
    token = secrets.token_hex(4)  # nobody can plant a link of that name
    outputs = {f"{prefix}.incomplete-{token}": prefix for prefix in options.prefixes()}
    try:
        bad_lines_file(options.output).unlink(missing_ok=True)
        _remove_leftovers(outputs.values())
        writers = [DocumentWriter(aside, tokenizer, options.images) for aside in outputs]
        num_bad, num_blank = _write(writers, options, inputs, tokenizer)
        metadata = [writer.finish(num_bad, num_blank) for writer in writers]
        _check_bad_lines(num_bad, sum(writer.records for writer in writers), options)
        for writer, prefix in zip(writers, outputs.values(), strict=True):
            _check_documents(writer, options, prefix, num_blank)
        for aside, one in zip(outputs, metadata, strict=True):
            one.save(metadata_path(aside))
        publish(outputs)
    except OSError as error:
        raise QADError(
            f"Preparing {options.output} failed: {error}. No data was written. If the disk is full, free space or "
            "choose another --output."
        ) from error
    finally:
        for path in itertools.chain.from_iterable(map(output_files, outputs)):
            with contextlib.suppress(OSError):  # the file system became read-only
                path.unlink(missing_ok=True)
    return metadata[0]


def _check_image_tokens(images: ImageSettings, tokenizer: DataTokenizer) -> None:
    """Check that the tokenizer has the tokens of images under the ids of the model."""
    pairs = {images.image_token: images.image_token_id, images.start_token: images.start_token_id}
    for token, expected in (pairs | {images.end_token: images.end_token_id}).items():
        if (found := tokenizer.vocab.get(token)) != expected:
            raise QADError(
                f"--tokenizer {tokenizer.name}: the id of {token} is {found}, expected {expected}, with which "
                f"{images.family} marks images. Give the model's tokenizer."
            )


def _write(
    writers: list[DocumentWriter], options: PrepareOptions, inputs: list[Path], tokenizer: DataTokenizer
) -> tuple[int, int]:
    """Write all documents, held-out ones with the second writer; return the numbers of bad and of blank records."""
    num_bad = num_blank = 0
    for results, blank in _encode_all(options, inputs, tokenizer):
        num_blank += blank
        bad = [result for result in results if isinstance(result, BadLine)]
        if bad:
            num_bad += len(bad)
            with bad_lines_file(options.output).open("a", encoding="utf-8", errors="backslashreplace") as stream:
                stream.writelines(" ".join(str(line).split("\n")) + "\n" for line in bad)
        for documents in results:
            if not isinstance(documents, BadLine):
                writers[is_held_out(documents, options.validation_fraction or 0)].add(documents)
    return num_bad, num_blank


def is_held_out(documents: Sequence[Encoded], fraction: float) -> bool:
    """Whether the documents of one record belong to the validation data.

    It depends on their tokens only: equal records are on the same side, whatever their order and the other records, and
    with a larger fraction those of a smaller one are still held out. For a record with images it depends on the first
    image only: all questions about an image are on the same side.
    """
    digest = hashlib.blake2b(digest_size=8)
    images = [file for document in documents for _, file in document.images]
    if images:
        digest.update(images[0].data)
    for document in () if images else documents:
        digest.update(np.asarray(document.ids, dtype="<i4"))
    return int.from_bytes(digest.digest(), "little") < fraction * 2**64


def _remove_leftovers(prefixes: Iterable[str]) -> None:
    """Remove files of killed preparations of the same outputs. None can be running: this process has the locks."""
    others = "|".join(pairs_of_files("").values())
    for prefix in prefixes:
        leftover = re.compile(re.escape(Path(prefix).name) + rf"\.incomplete-[0-9a-f]+({others})?\.(bin|idx|json)")
        for path in Path(prefix).parent.iterdir():
            if leftover.fullmatch(path.name):
                path.unlink()


def _encode_all(options: PrepareOptions, inputs: list[Path], tokenizer: DataTokenizer) -> Iterator[tuple[Results, int]]:
    """Yield (results, number of blank records) batch by batch in input order, with a progress bar over input bytes."""
    split_on = BLANK_LINES if options.split_on == "blank" else options.split_on
    # The size of the content is known before it is read only if that is neither compressed nor a table.
    known = all(file.is_file() and not compression(file) and file_format(file, "text") == "text" for file in inputs)
    total = sum(file.stat().st_size for file in inputs) if known else None
    blanks = collections.deque()
    batch_records = _BATCH_RECORDS if options.images is None else _BATCH_RECORDS_WITH_IMAGES

    def batches() -> Iterator[list[Record | BadLine]]:
        batch, size, blank = [], 0, 0
        for file in inputs:
            for record in read_records(file, file_format(file, options.format), split_on, options.images is not None):
                if isinstance(record, int):
                    blank += record
                    continue
                batch.append(record)
                size += _num_bytes([record])
                if len(batch) >= batch_records or size >= _BATCH_BYTES:
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
    batches: Iterable[list[Record | BadLine]], options: PrepareOptions, tokenizer: DataTokenizer
) -> Iterator[tuple[Results, int]]:
    """Encode batches in this process or in worker processes, of which a limited number and size is held at a time."""
    if options.workers == 1:
        for batch in batches:
            yield _encode_batch(batch, tokenizer, options), _num_bytes(batch)
        return
    # spawn: the parent has threads (tokenizers, torch), and forking a process with threads may deadlock.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(options.workers, context, initializer=_start_worker, initargs=(options, os.getpid()))
    with pool:
        pending, held = collections.deque(), 0
        try:
            for batch in batches:
                pending.append((pool.submit(_encode_in_worker, batch), _num_bytes(batch)))
                held += pending[-1][1]
                while pending and (len(pending) >= 4 * options.workers or held > _HELD_BYTES):
                    future, size = pending.popleft()
                    held -= size
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


def _num_bytes(batch: Iterable[Record | BadLine]) -> int:
    records = [record for record in batch if isinstance(record, Record)]
    return sum(len(record.data) + sum(len(data) for _, data in record.members) for record in records)


def _encode_batch(batch: list[Record | BadLine], tokenizer: DataTokenizer, options: PrepareOptions) -> Results:
    settings = (options.json_key, options.prepend_bos, options.multi_turn, options.images, options.image_root)
    return [record if isinstance(record, BadLine) else encode_record(record, tokenizer, *settings) for record in batch]


_worker: tuple[DataTokenizer, PrepareOptions]


def _start_worker(options: PrepareOptions, parent: int) -> None:
    """Load the tokenizer in a worker; it cannot always be pickled, so each worker loads its own."""
    global _worker
    end_with_parent(parent)  # also if the parent died while this process imported
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _worker = (load_tokenizer(options.tokenizer), options)


def _encode_in_worker(batch: list[Record | BadLine]) -> Results:
    return _encode_batch(batch, *_worker)


def _check_bad_lines(num_bad: int, num_good: int, options: PrepareOptions) -> None:
    """Check, before the output is put in place, the number of bad records."""
    records, bad_path = num_bad + num_good, bad_lines_file(options.output)
    if num_bad > options.max_bad_fraction * records:
        with bad_path.open(encoding="utf-8") as stream:
            first = stream.readline().rstrip("\n")
        verb = "is" if num_bad == 1 else "are"
        raise QADError(
            f"{num_bad} of {count(records, 'record')} {verb} bad, more than --max-bad-fraction "
            f"{options.max_bad_fraction} allows. The first: {first}. All are listed in {bad_path}. No data was "
            "written. Fix the records or allow a larger fraction."
        )


def _check_documents(writer: DocumentWriter, options: PrepareOptions, prefix: str, num_blank: int) -> None:
    """Check, before the output is put in place, the number of documents and of counted tokens of one side."""
    side = f"--input {' '.join(options.inputs)}"
    if options.validation_fraction is not None:
        side += f" with --validation-fraction {options.validation_fraction}: the data for {prefix}"
    if not writer.documents:
        blank = count(num_blank, "blank line")
        advice = "Give other files." if options.validation_fraction is None else "Give more data or another fraction."
        raise QADError(f"{side} has no document ({blank}). {advice}")
    if not writer.supervised:
        raise QADError(
            f"{side}: no token of its {count(writer.documents, 'document')} "
            "would count in the loss. In chats only the assistant's tokens count; give such chats."
        )
