"""Write documents to the indexed datasets of tokens and loss mask, and rename them to their final prefix."""

import contextlib
import itertools
import os
from pathlib import Path

import numpy as np

from megatron_qad.data.metadata import DataMetadata, loss_mask_prefix, metadata_path, output_files
from megatron_qad.data.sources import BadLine, Encoded
from megatron_qad.data.tokenizer import DataTokenizer
from megatron_qad.engine.run_directory import manifest


class DocumentWriter:
    """Writes documents to indexed datasets at a temporary prefix and counts them."""

    def __init__(self, prefix: str, tokenizer: DataTokenizer):
        # Imported here so that worker processes, which write nothing, do not load Megatron.
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

        self.prefix, self.tokenizer = prefix, tokenizer
        dtype = DType.optimal_dtype(tokenizer.vocab_size)
        self.tokens = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
        self.mask = IndexedDatasetBuilder(f"{loss_mask_prefix(prefix)}.bin", dtype=np.uint8)
        self.records = self.documents = self.chats = self.chat_documents = 0
        self.num_tokens = self.supervised = self.unknown = 0
        self.bad_lines = self.blank_lines = 0

    def add(self, results: list[list[Encoded] | BadLine], bad_path: Path) -> None:
        bad = [result for result in results if isinstance(result, BadLine)]
        if bad:
            self.bad_lines += len(bad)
            with bad_path.open("a", encoding="utf-8", errors="backslashreplace") as stream:
                stream.writelines(" ".join(str(line).split("\n")) + "\n" for line in bad)
        good = [documents for documents in results if not isinstance(documents, BadLine)]
        self.records += len(good)
        self.chats += sum(documents[0].is_chat for documents in good)
        for document in itertools.chain.from_iterable(good):
            ids = np.asarray(document.ids, dtype=np.int64)
            if document.mask is None:
                mask = np.ones(len(ids), dtype=np.uint8)
            else:
                mask = np.asarray(document.mask, dtype=np.uint8)
            self.chat_documents += document.is_chat
            self.tokens.add_document(ids, [len(ids)])
            self.mask.add_document(mask, [len(ids)])
            self.documents += 1
            self.num_tokens += len(ids)
            self.supervised += int(mask.sum())
            self.unknown += 0 if self.tokenizer.unk is None else int((ids == self.tokenizer.unk).sum())

    def finish(self) -> DataMetadata:
        """Close the data files, remove a mask of all ones, and return the metadata."""
        mask_prefix = loss_mask_prefix(self.prefix)
        self.tokens.finalize(f"{self.prefix}.idx")
        self.mask.finalize(f"{mask_prefix}.idx")
        has_mask = self.supervised != self.num_tokens
        sha256 = {"bin": _sha256(f"{self.prefix}.bin"), "idx": _sha256(f"{self.prefix}.idx")}
        if has_mask:
            sha256["loss_mask.bin"] = _sha256(f"{mask_prefix}.bin")
        else:
            for suffix in (".bin", ".idx"):
                Path(mask_prefix + suffix).unlink()
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
            bad_lines=self.bad_lines,
            blank_lines=self.blank_lines,
            loss_mask=has_mask,
            sha256=sha256,
        )


def publish(aside: str, prefix: str) -> None:
    """Rename the finished files of the prefix ``aside`` to ``prefix``.

    The index and metadata of an earlier output are removed first and the new ones renamed last, so that an interruption
    leaves an incomplete output rather than a mixture of two.
    """
    metadata_path(prefix).unlink(missing_ok=True)
    Path(f"{prefix}.idx").unlink(missing_ok=True)
    for source, target in zip(output_files(aside), output_files(prefix), strict=True):
        if source.exists():
            os.replace(source, target)
        else:  # the replaced output may have a loss mask although this one has none
            with contextlib.suppress(FileNotFoundError):
                target.unlink()


def _sha256(path: str) -> str:
    return manifest.sum_of(Path(path))[1]
