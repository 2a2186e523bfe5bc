"""Write documents to the indexed datasets of tokens, loss mask and images, and rename them to their final prefix."""

import contextlib
import os
from pathlib import Path

import numpy as np

from megatron_qad.data.images.image_files import ImageWriter
from megatron_qad.data.images.image_settings import ImageSettings
from megatron_qad.data.metadata import (
    IMAGE_SUFFIXES,
    DataMetadata,
    data_file,
    loss_mask_prefix,
    metadata_path,
    output_files,
)
from megatron_qad.data.sources import Encoded
from megatron_qad.data.tokenizer import DataTokenizer
from megatron_qad.engine.run_directory import manifest


class DocumentWriter:
    """Writes documents to indexed datasets at a temporary prefix and counts them."""

    def __init__(self, prefix: str, tokenizer: DataTokenizer, images: ImageSettings | None = None):
        # Imported here so that worker processes, which write nothing, do not load Megatron.
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

        self.prefix, self.tokenizer = prefix, tokenizer
        dtype = DType.optimal_dtype(tokenizer.vocab_size)
        self.tokens = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
        self.mask = IndexedDatasetBuilder(f"{loss_mask_prefix(prefix)}.bin", dtype=np.uint8)
        self.images = None if images is None else ImageWriter(prefix, images)
        self.records = self.documents = self.chats = self.chat_documents = 0
        self.num_tokens = self.supervised = self.unknown = 0

    def add(self, documents: list[Encoded]) -> None:
        """Write the documents of one record."""
        self.records += 1
        self.chats += documents[0].is_chat
        for document in documents:
            ids = np.asarray(document.ids)
            if document.mask is None:
                mask = np.ones(len(ids), dtype=np.uint8)
            else:
                mask = np.asarray(document.mask, dtype=np.uint8)
            self.chat_documents += document.is_chat
            self.tokens.add_document(ids, [len(ids)])
            self.mask.add_document(mask, [len(ids)])
            if self.images is not None:
                self.images.add(document.images)
            self.documents += 1
            self.num_tokens += len(ids)
            self.supervised += int(mask.sum())
            self.unknown += 0 if self.tokenizer.unk is None else int((ids == self.tokenizer.unk).sum())

    def finish(self, bad_lines: int, blank_lines: int) -> DataMetadata:
        """Close the data files, remove a mask of all ones and image files without images, and return the metadata, with
        these counts of the inputs."""
        mask_prefix = loss_mask_prefix(self.prefix)
        self.tokens.finalize(f"{self.prefix}.idx")
        self.mask.finalize(f"{mask_prefix}.idx")
        has_mask = self.supervised != self.num_tokens
        if not has_mask:
            for suffix in (".bin", ".idx"):
                Path(mask_prefix + suffix).unlink()
        images = None if self.images is None else self.images.finish()
        suffixes = ["bin", "idx", *(["loss_mask.bin", "loss_mask.idx"] if has_mask else [])]
        suffixes += IMAGE_SUFFIXES if images is not None else []
        return DataMetadata(
            tokenizer_name=self.tokenizer.name,
            tokenizer_kind=self.tokenizer.kind,
            tokenizer_files_sha256=self.tokenizer.files_sha256(),
            vocab_sha256=self.tokenizer.vocab_sha256(),
            probe_sha256=self.tokenizer.probe_sha256(),
            vocab_size=self.tokenizer.vocab_size,
            eod=self.tokenizer.eod,
            documents=self.documents,
            chats=self.chats,
            chat_documents=self.chat_documents,
            tokens=self.num_tokens,
            supervised_tokens=self.supervised,
            unknown_tokens=self.unknown,
            bad_lines=bad_lines,
            blank_lines=blank_lines,
            loss_mask=has_mask,
            sha256={suffix: _sha256(data_file(self.prefix, suffix)) for suffix in suffixes},
            images=images,
        )


def publish(outputs: dict[str, str]) -> None:
    """Rename the finished files of each prefix in ``outputs`` to the prefix that it maps to.

    The index and metadata of earlier outputs are removed first and the new ones renamed last, so that an interruption
    leaves incomplete outputs rather than a mixture of two. After a failure none of the outputs exists.
    """
    moves = [
        pair
        for aside, prefix in outputs.items()
        for pair in zip(output_files(aside), output_files(prefix), strict=True)
    ]
    moves.sort(key=lambda pair: pair[1].suffix == ".json")  # stable: all data before the first metadata
    for prefix in outputs.values():
        metadata_path(prefix).unlink(missing_ok=True)
        Path(f"{prefix}.idx").unlink(missing_ok=True)
    try:
        for source, target in moves:
            if source.exists():
                os.replace(source, target)
            else:  # the replaced output may have a loss mask or images although this one has none
                target.unlink(missing_ok=True)
    except OSError:
        for _, target in moves:
            with contextlib.suppress(OSError):
                target.unlink(missing_ok=True)
        raise


def _sha256(path: str) -> str:
    return manifest.sum_of(Path(path))[1]
