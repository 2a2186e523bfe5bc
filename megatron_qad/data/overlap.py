"""Counts duplicates and near-duplicates in prepared data, and validation documents that training documents contain.

A validation KL on text that was trained on is too low, and near-duplicates waste steps. Everything works on token ids.

- Near-duplicates: the Jaccard similarity of two documents' sets of 5-grams is at least 0.8, as estimated by MinHash
  with 128 permutations (standard error 0.035), for pairs that locality-sensitive hashing proposes (datasketch).
- Contaminated: at least half of the validation document's 13-grams occur in training documents (13 as in GPT-3,
  arXiv:2005.14165, appendix C). The 13-grams that more than ten training documents and more than 1 % of them have are
  left out: they belong to chat templates and system prompts.

It takes about a millisecond and 3 KB of memory per document.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset
from tqdm import tqdm

from megatron_qad.data.prefix_files import file_sizes
from megatron_qad.data.prepared_files import open_prefix
from megatron_qad.engine.errors import QADError

SIMILARITY = 0.8
"""Jaccard similarity from which two documents are near-duplicates."""
CONTAINMENT = 0.5
"""Share of a validation document's 13-grams in training from which it is contaminated."""
_SHINGLE, _GRAM = 5, 13
_COMMON, _COMMON_SHARE = 10, 0.01
_PERMUTATIONS = 128
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # an odd number, so that the polynomial hash is a bijection in each token


@dataclass(frozen=True)
class Overlap:
    """Result of ``measure_overlap``. All counts are of documents."""

    training: int
    duplicates: int
    """Training documents that equal an earlier one."""
    near_duplicates: int
    """Other training documents that are similar to an earlier one."""
    validation: int = 0
    in_training: int = 0
    """Validation documents that equal a training document."""
    near_training: int = 0
    """Other validation documents that are similar to a training document."""
    contaminated: int = 0
    """Validation documents, duplicates included, of whose 13-grams at least half occur in training."""
    worst: tuple[tuple[int, float], ...] = ()
    """(number of the validation document, share of its 13-grams in training), at most five, the largest first."""


def measure_overlap(training: Sequence[str], validation: str | None = None) -> Overlap:
    """Count duplicates within training data, and of validation data in training data.

    Args:
        training: prefixes of prepared data.
        validation: prefix of the validation data; None counts within the training data only.

    Raises:
        QADError: a prefix cannot be read, or the package datasketch is missing.

    Example::

        overlap = measure_overlap(["data/chats"], "data/chats_valid")
        print(f"{overlap.contaminated} of {overlap.validation} validation documents were seen in training")
    """
    try:
        from datasketch import MinHash, MinHashLSH
    except ImportError as error:
        raise QADError(
            "Counting near-duplicates needs the package datasketch: pip install 'megatron_qad[data]'."
        ) from error
    held_out = _HeldOut([] if validation is None else list(_documents([validation])))
    index = MinHashLSH(threshold=SIMILARITY, num_perm=_PERMUTATIONS)
    template = MinHash(num_perm=_PERMUTATIONS, hashfunc=int)

    def signature(ids: np.ndarray):
        minhash = template.copy()
        minhash.update_batch((np.unique(_ngram_hashes(ids, _SHINGLE)) >> np.uint64(32)).tolist())
        return minhash

    def is_similar(minhash) -> bool:
        return any(minhash.jaccard(signatures[key]) >= SIMILARITY for key in index.query(minhash))

    seen: set[bytes] = set()
    signatures = []
    num_documents = duplicates = near_duplicates = 0
    for ids in tqdm(_documents(training), desc="comparing", unit="doc", disable=None):
        num_documents += 1
        held_out.count(ids)
        if (key := ids.tobytes()) in seen:
            duplicates += 1
            continue
        seen.add(key)
        minhash = signature(ids)
        near_duplicates += is_similar(minhash)
        index.insert(len(signatures), minhash)
        signatures.append(minhash)
    in_training = [ids.tobytes() in seen for ids in held_out.documents]
    near_training = [
        not equal and is_similar(signature(ids)) for ids, equal in zip(held_out.documents, in_training, strict=True)
    ]
    shares = held_out.shares(num_documents)
    worst = sorted(((i, share) for i, share in enumerate(shares) if share), key=lambda pair: -pair[1])[:5]
    return Overlap(
        num_documents,
        duplicates,
        near_duplicates,
        len(held_out.documents),
        sum(in_training),
        sum(near_training),
        sum(share >= CONTAINMENT for share in shares),
        tuple(worst),
    )


class _HeldOut:
    """The validation documents, and in how many training documents each of their 13-grams occurs."""

    def __init__(self, documents: list[np.ndarray]):
        self.documents = documents
        self._grams = [np.unique(_ngram_hashes(ids, _GRAM)) for ids in documents]
        self._all = np.unique(np.concatenate(self._grams)) if documents else np.array([], np.uint64)
        self._counts = np.zeros(len(self._all), np.int64)

    def count(self, ids: np.ndarray) -> None:
        """Add one training document."""
        if len(self._all):
            _, found, _ = np.intersect1d(
                self._all, np.unique(_ngram_hashes(ids, _GRAM)), assume_unique=True, return_indices=True
            )
            self._counts[found] += 1

    def shares(self, num_training: int) -> list[float]:
        """Return for each document which share of its 13-grams occurs in training, template text left out."""
        common = self._counts > max(_COMMON, _COMMON_SHARE * num_training)
        shares = []
        for grams in self._grams:
            places = np.searchsorted(self._all, grams)
            counts = self._counts[places][~common[places]]
            shares.append(float((counts > 0).mean()) if len(counts) else 0.0)
        return shares


def _documents(prefixes: Sequence[str]) -> Iterator[np.ndarray]:
    """Yield the int64 ids of each document."""
    for prefix in prefixes:
        file_sizes(prefix)
        open_prefix(prefix)
        data = IndexedDataset(prefix)
        for i in range(len(data)):
            yield data[i].astype(np.int64)


def _ngram_hashes(ids: np.ndarray, size: int) -> np.ndarray:
    """Return a 64-bit hash of each n-gram; a document that is shorter than ``size`` is one n-gram."""
    size = min(size, len(ids))
    with np.errstate(over="ignore"):
        hashes = np.zeros(len(ids) - size + 1, np.uint64)
        for i in range(size):
            hashes = (hashes + ids[i : len(ids) - size + 1 + i].astype(np.uint64) + np.uint64(1)) * _FACTOR
            hashes ^= hashes >> np.uint64(29)
    return hashes
