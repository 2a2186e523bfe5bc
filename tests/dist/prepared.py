"""Writes prepared data without a tokenizer: any ids and loss masks, with or without PREFIX.json."""

from collections.abc import Sequence

import numpy as np


def write_prepared(
    prefix: str, documents: Sequence, masks: Sequence | None = None, *, dtype=np.uint16, tokenizer=None
) -> str:
    """Write PREFIX.bin/.idx, the loss mask if ``masks`` is given, and PREFIX.json; return the prefix as a string.

    Args:
        tokenizer: ``DataTokenizer`` that PREFIX.json names.
    """
    from megatron_qad.data.metadata import DataMetadata, data_file, loss_mask_prefix, metadata_path
    from megatron_qad.engine.run_directory import manifest

    prefix = str(prefix)
    write_indexed(prefix, documents, dtype)
    suffixes = ["bin", "idx"]
    if masks is not None:
        write_indexed(loss_mask_prefix(prefix), masks, np.uint8)
        suffixes.append("loss_mask.bin")
    num_tokens = sum(map(len, documents))
    DataMetadata(
        tokenizer_name="none" if tokenizer is None else tokenizer.name,
        tokenizer_kind="huggingface" if tokenizer is None else tokenizer.kind,
        tokenizer_files_sha256={} if tokenizer is None else tokenizer.files_sha256(),
        vocab_sha256="" if tokenizer is None else tokenizer.vocab_sha256(),
        vocab_size=int(max(max(document) for document in documents)) + 1,
        eod=0,
        documents=len(documents),
        chat_documents=0,
        tokens=num_tokens,
        supervised_tokens=num_tokens if masks is None else int(sum(np.sum(mask) for mask in masks)),
        unknown_tokens=0,
        bad_lines=0,
        blank_lines=0,
        loss_mask=masks is not None,
        sha256={suffix: manifest.sum_of(data_file(prefix, suffix))[1] for suffix in suffixes},
    ).save(metadata_path(prefix))
    return prefix


def write_indexed(prefix: str, documents: Sequence, dtype) -> str:
    """Write PREFIX.bin/.idx alone, as Megatron's preprocess_data.py does."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        builder.add_document(np.asarray(document), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return prefix
