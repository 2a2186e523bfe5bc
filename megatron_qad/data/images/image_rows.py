"""Rows of whole documents: a document with its images must not be cut.

The documents follow each other in an order that is shuffled for each epoch. A row takes documents as long as they fit;
the rest of it is padding. Nothing is dropped.
"""

import numpy as np

from megatron_qad.data.images.image_settings import ImageSettings
from megatron_qad.data.metadata import DataMetadata
from megatron_qad.engine.errors import QADError


def pack_whole_documents(
    documents: np.ndarray, lengths: np.ndarray, row: int, multiple: int, num_rows: int | None, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the document, sample and shuffle index of rows of whole documents.

    Args:
        documents: int32 [d], the documents to read.
        lengths: int32, the number of tokens of every document of the prefix, each at most ``row``.
        row: number of tokens of a row.
        multiple: documents start at multiples of this many tokens; ``row`` is one.
        num_rows: number of rows that are needed; None: those of one epoch.
        seed: of the order of the documents.

    Returns:
        document index, int32 [p]: the documents in the order in which they are read, over all epochs; sample index,
        int64 [rows + 1, 2]: row i has the positions ``[i, 0]`` to ``[i + 1, 0] - 1`` of it; shuffle index, uint32
        [rows]: 0, 1, 2, ..., since the documents are shuffled.
    """
    random, order, starts, used = np.random.RandomState(seed), [], [], row
    position = 0
    while not order or (num_rows is not None and len(starts) < num_rows):
        epoch = documents.astype(np.int32)
        random.shuffle(epoch)
        order.append(epoch)
        for size in padded(lengths[epoch], multiple).tolist():
            if used + size > row:
                starts.append(position)
                used = 0
            used += size
            position += 1
    sample_index = np.zeros((len(starts) + 1, 2), dtype=np.int64)
    sample_index[:, 0] = [*starts, position]
    return np.concatenate(order), sample_index, np.arange(len(starts), dtype=np.uint32)


def count_rows(lengths: np.ndarray, row: int, multiple: int) -> int:
    """Return the number of rows of one epoch, with the documents in the order of the file."""
    return len(pack_whole_documents(np.arange(len(lengths)), lengths, row, multiple, None, 0)[2])


def padded(lengths: np.ndarray, multiple: int) -> np.ndarray:
    """Return lengths rounded up to multiples of ``multiple``, int64."""
    return -(-lengths.astype(np.int64) // multiple) * multiple


def check_image_rows(
    prefix: str, metadata: DataMetadata, images: ImageSettings | None, lengths: np.ndarray, row: int
) -> None:
    """Check that a job can read the rows of a prefix with images.

    Args:
        images: settings of the job's model, or None.
        lengths: number of tokens of each document.
        row: ``--seq-length``.

    Raises:
        QADError: the model has no images or turns them into other tokens, or a document does not fit into a row.
    """
    own = metadata.image_settings()
    if images is None:
        raise QADError(
            f"--data-path {prefix}: was prepared with images for {own.family}, but the job's model has none. Give the "
            "model that it was prepared for, or data without images."
        )
    if differences := own.differences(images):
        raise QADError(
            f"--data-path {prefix}: its images became other tokens than the model's would ({differences[0]}; the data "
            "first). Prepare the data with --images-for and this model."
        )
    document = int(np.argmax(lengths))
    if lengths[document] > row:
        too_long = int((lengths > row).sum())
        raise QADError(
            f"--data-path {prefix}: document {document} has {lengths[document]} tokens, more than --seq-length {row}. "
            f"Data with images is read in whole documents, and {too_long} of {len(lengths)} do not fit. Raise "
            "--seq-length, or prepare the data without them."
        )
