"""Checks all data of a job before anything is built from it: its files, their content, its ids, its tokenizer.

Each rank looks at the files, rank 0 reads the indices, and the ranks share the reading of the ids (``file_facts``). An
error on one rank is raised on every rank.
"""

import argparse
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.training import print_rank_0

from megatron_qad.data.data_options import DataOptions
from megatron_qad.data.file_facts import MAX_BYTES, FileFacts, Reading, read_facts
from megatron_qad.data.images.image_rows import check_image_rows
from megatron_qad.data.metadata import data_file
from megatron_qad.data.prefix_files import file_sizes
from megatron_qad.data.prepared_files import PreparedFiles, open_prefix
from megatron_qad.data.run_tokenizer import RunTokenizer, TokenizerUnreadableError
from megatron_qad.engine.distributed import on_every_rank, on_rank_0
from megatron_qad.engine.errors import QADError

_NUM_ENDS = 100
"""Number of documents of foreign data whose last token is compared with the EOD."""


def check_data(args: argparse.Namespace, prefixes: Sequence[str], options: DataOptions) -> None:
    """Check every prefix of a job. Collective.

    Args:
        args: needs ``data_cache_path``, ``eod_mask_loss``, ``tokenizer_model``, ``tokenizer_type``,
            ``null_tokenizer_eod_id``, and for data with images ``seq_length``.

    Raises:
        QADError: with the prefix, the value found and the value expected.
    """
    _check_same_on_all_ranks(prefixes)
    found = on_rank_0(lambda: [open_prefix(prefix) for prefix in prefixes])
    reading = read_contents(found, args.data_cache_path)
    _log(found, reading)

    def check() -> list[str]:
        for data in found:
            check_content(data, reading.facts, options.vocab_size)
            if data.metadata is not None and data.metadata.images is not None:
                documents = IndexedDataset(data.prefix, mmap=False)
                lengths = documents.sequence_lengths.copy()  # of a mapping that ends with the dataset
                check_image_rows(data.prefix, data.metadata, options.images, lengths, args.seq_length)
            _check_eod_is_known(args, data)
        return _check_tokenizers(found, reading.facts, RunTokenizer.from_checkpoints(args, options.checkpoints))

    for line in on_rank_0(check):
        print_rank_0(f"megatron_qad: WARNING: {line}")


def read_contents(found: Sequence[PreparedFiles], cache: str | None, max_bytes: int | None = MAX_BYTES) -> Reading:
    """Read all files of the prefixes. Collective.

    Args:
        cache: directory for the record of what was read; None: ``PREFIX/cache``, as for Megatron's indices.
    """
    files = {}
    for data in found:
        name = hashlib.sha256(str(Path(f"{data.prefix}.bin").resolve()).encode()).hexdigest()[:16]
        record = Path(cache or f"{data.prefix}/cache") / f"verified-{name}.json"
        files |= {file: (dtype, record) for file, dtype in data.files().items()}
    return read_facts(files, max_bytes)


def check_content(data: PreparedFiles, facts: dict[str, FileFacts], vocab_size: int | None) -> None:
    """Check the sums and ids of the files that were read.

    Args:
        vocab_size: number of ids of the model, without padding; None if it is unknown.

    Raises:
        QADError: a file is not the one that the metadata describes, or has an id that does not exist.
    """
    prefix, metadata = data.prefix, data.metadata
    for suffix, expected in metadata.sha256.items() if metadata is not None else ():
        file = data_file(prefix, suffix)
        if file in facts and facts[file].sha256 != expected:
            raise QADError(
                f"--data-path {prefix}: {file} is not the file that {prefix}.json describes: its SHA-256 is "
                f"{facts[file].sha256[:12]}, not {expected[:12]}. It is damaged, or one of the two belongs to other "
                "data. Copy all files of the prefix again, or prepare the data again."
            )
    _check_type_holds_vocabulary(data, vocab_size)
    known = facts.get(f"{prefix}.bin")
    if known is None or known.largest is None:
        return
    if known.smallest < 0:
        raise QADError(
            f"--data-path {prefix}: {prefix}.bin has the token id {known.smallest}; ids are 0 or more. Prepare the "
            "data again."
        )
    if vocab_size is not None and known.largest >= vocab_size:
        raise QADError(
            f"--data-path {prefix}: {prefix}.bin has the token id {known.largest}, but the model has the ids 0 to "
            f"{vocab_size - 1} (vocab_size {vocab_size}). Prepare the data with the model's tokenizer."
        )
    if known.largest == 0 and data.num_tokens > 1:
        raise QADError(
            f"--data-path {prefix}: all {data.num_tokens} tokens of {prefix}.bin have the id 0, so it is damaged or "
            "was never written. Copy or prepare the data again."
        )


def _check_type_holds_vocabulary(data: PreparedFiles, vocab_size: int | None) -> None:
    """Check that ids did not wrap around when they were stored: uint16 ends at 65535."""
    size = vocab_size if data.metadata is None else data.metadata.vocab_size
    if size is None or np.iinfo(data.dtype).max >= size - 1:
        return
    raise QADError(
        f"--data-path {data.prefix}: {data.prefix}.idx stores ids as {data.dtype}, up to {np.iinfo(data.dtype).max}, "
        f"but the vocabulary has {size}: larger ids are lost, or the data is of another tokenizer. Prepare the data "
        "with megatron-qad prepare and the model's tokenizer."
    )


def _check_same_on_all_ranks(prefixes: Sequence[str]) -> None:
    """Check that the files exist on every rank, with the sizes that they have on rank 0."""

    def sizes(*_) -> dict[str, int]:
        return {file: size for prefix in prefixes for file, size in file_sizes(prefix).items()}

    hashes = on_every_rank(lambda *_: hashlib.sha256(str(sizes()).encode()).hexdigest())
    if len(set(hashes)) == 1:
        return
    by_rank = on_every_rank(sizes)
    rank, other = next((rank, other) for rank, other in enumerate(by_rank) if other != by_rank[0])
    file = min(name for name, _ in other.items() ^ by_rank[0].items())
    found = [f"{s[file]} bytes" if file in s else "no such file" for s in (by_rank[0], other)]
    raise QADError(
        f"{file} differs between the machines of the job: {found[0]} on rank 0, {found[1]} on rank {rank}. Copy the "
        "same data to each machine."
    )


def _check_eod_is_known(args: argparse.Namespace, data: PreparedFiles) -> None:
    if data.metadata is not None or not args.eod_mask_loss:
        return
    if args.tokenizer_type == "NullTokenizer" and args.null_tokenizer_eod_id is None:
        raise QADError(
            f"--eod-mask-loss needs the id of EOD, but {data.prefix}.json, which megatron-qad prepare writes, does "
            "not exist. Prepare the data with that tool, or give --null-tokenizer-eod-id."
        )


def _check_tokenizers(
    found: Sequence[PreparedFiles], facts: dict[str, FileFacts], tokenizer: RunTokenizer | None
) -> list[str]:
    """Check that all data has the run's tokenizer, or at least one tokenizer. Returns warnings."""
    described = [data for data in found if data.metadata is not None]
    warnings = []
    for data in found:
        if tokenizer is not None and data.metadata is not None:
            warnings.append(tokenizer.check(data.prefix, data.metadata))
        elif tokenizer is not None:
            warnings.append(_check_foreign(data, facts, tokenizer))
    for data in described[1:]:
        first, other = described[0].metadata, data.metadata
        if first.vocab_sha256 != other.vocab_sha256:
            raise QADError(
                f"--data-path {data.prefix} was made with the tokenizer {other.tokenizer_name}, and "
                f"{described[0].prefix} with {first.tokenizer_name}, whose ids mean other pieces. Prepare all data "
                "of a job with the model's tokenizer."
            )
    return [line for line in warnings if line is not None]


def _check_foreign(data: PreparedFiles, facts: dict[str, FileFacts], run_tokenizer: RunTokenizer) -> str | None:
    """Check data that says nothing about its tokenizer, as far as its ids tell. Returns a warning or None."""
    try:
        tokenizer, known = run_tokenizer.load(), facts.get(f"{data.prefix}.bin")
    except TokenizerUnreadableError as error:
        return f"--data-path {data.prefix}: not compared with {run_tokenizer.name}, which cannot be loaded: {error}"
    if known is not None and known.largest is not None and known.largest >= tokenizer.vocab_size:
        raise QADError(
            f"--data-path {data.prefix}: {data.prefix}.bin has the token id {known.largest}, but {run_tokenizer.name} "
            f"has the ids 0 to {tokenizer.vocab_size - 1}. Prepare the data with the model's tokenizer."
        )
    documents = IndexedDataset(data.prefix, mmap=False)
    count = min(len(documents), _NUM_ENDS)
    if not any(documents[i][-1] == tokenizer.eod for i in range(count) if documents.sequence_lengths[i]):
        return (
            f"--data-path {data.prefix}: none of its first {count} documents ends with the EOD {tokenizer.eod}, so the "
            "model sees no ends of documents. Prepare the data with --append-eod (Megatron's preprocess_data.py) or "
            "with megatron-qad prepare."
        )
    return None


def _log(found: Sequence[PreparedFiles], reading: Reading) -> None:
    for data in found:
        if data.metadata is None:
            print_rank_0(
                f"megatron_qad: {data.prefix}.json does not exist: the data is of another tool, and neither its "
                "SHA-256 nor its tokenizer can be compared. Its ids are compared with the vocabulary"
            )
    if reading.read:
        total = sum(reading.facts[file].stamp[0] for file in reading.read)
        print_rank_0(
            f"megatron_qad: read {len(reading.read)} data files ({total / 1e9:.2f} GB) in {reading.seconds:.1f} s to "
            "check them; later starts read only those that have changed"
        )
    if reading.skipped:
        print_rank_0(
            f"megatron_qad: WARNING: not checked when the job starts, because that would take minutes: "
            f"{', '.join(reading.skipped)}. Run megatron-qad verify once, which reads them completely"
        )
