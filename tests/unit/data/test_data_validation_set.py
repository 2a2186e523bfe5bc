"""Validation sets of the provider in one process: fixed order, every sample once, and errors."""

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset
from prepared import write_prepared

from megatron_qad.data import provider
from megatron_qad.data.validation_set import ValidationSet
from megatron_qad.engine.errors import QADError

SEQUENCE = 16


@pytest.fixture
def write(tmp_path, hf_tokenizer):
    """``write(name, masks)``: write documents of random tokens with these masks and return the prefix."""

    def make(name, masks, seed=0):
        rng = np.random.default_rng(seed)
        documents = [rng.integers(0, 500, size=len(mask)) for mask in masks]
        return write_prepared(f"{tmp_path}/{name}", documents, masks, tokenizer=hf_tokenizer)

    return make


@pytest.fixture
def some(write):
    """40 documents whose first tokens never count, because the first token of the split is not a label."""
    rng = np.random.default_rng(3)
    return write("some", [[0, *(rng.random(int(rng.integers(5, 40))) < 0.5)] for _ in range(40)])


@pytest.fixture
def provided(provider_for, one_process):
    """``provided(*flags, eval_global_batch_size=4)``: (training dataset, validation set, arguments of the job)."""

    def run(*flags, **changes):
        provider = provider_for(*flags, **changes)
        train, valid, _ = provider([1, 1, 1])
        return train, valid, provider.args

    return run


def read(valid, num_samples) -> list[tuple]:
    """Return the contents of the first ``num_samples`` samples as tuples that can be compared."""
    samples = [valid[i] for i in range(num_samples)]
    return [tuple(tuple(s[k].tolist()) for k in ("tokens", "labels", "loss_mask")) for s in samples]


def counted(prefix: str, share: float = 0.8) -> int:
    """Return the number of counted tokens in the documents of the validation split, read from the files."""
    masks = IndexedDataset(f"{prefix}_loss_mask")
    return sum(int(masks[i].sum()) for i in range(round(share * len(masks)), len(masks)))


def test_an_evaluation_counts_every_token_once(provided, some):
    """The order depends neither on the seed nor on the batch size, and a resumed job starts at the first sample."""
    _, valid, args = provided("--data-path", some)
    first, total = read(valid, valid.num_samples), valid.samples_per_evaluation
    assert len(first) == len(set(first)) == len(valid.samples)
    assert (args.eval_iters, total) == (-(-len(first) // 4), 4 * args.eval_iters)
    assert sum(sum(mask) for _, _, mask in first) == counted(some)
    for seed, batch, consumed in (("7", 4, 0), ("1234", 8, 24), ("1", 2, 1000)):
        _, other, args = provided(
            "--data-path", some, "--seed", seed, eval_global_batch_size=batch, consumed_valid_samples=consumed
        )
        assert read(other, other.num_samples) == first and args.consumed_valid_samples == 0
        assert other.samples_per_evaluation % batch == 0 and other.samples_per_evaluation - len(first) < batch


def test_hash_tells_held_out_tokens_apart(provided, write, some):
    """It depends on tokens, masks and cuts; not on the prefix, the seed, the batch size or the training data."""
    _, valid, _ = provided("--data-path", some)
    expected = valid.sha256()
    rng = np.random.default_rng(3)
    masks = [[0, *(rng.random(int(rng.integers(5, 40))) < 0.5)] for _ in range(40)]
    same = write("same", masks)
    other_tokens = write("tokens", masks, seed=1)
    masks[-1][-1] = not masks[-1][-1]
    other_mask = write("mask", masks)
    sums = [
        provided("--data-path", same, "--seed", "5", eval_global_batch_size=2)[1].sha256(),
        provided("--train-data-path", other_tokens, "--valid-data-path", some, "--eval-iters", "1000")[1].sha256(),
        provided("--data-path", other_tokens)[1].sha256(),
        provided("--data-path", other_mask)[1].sha256(),
        provided("--data-path", some, "--eval-iters", "2")[1].sha256(),
        provided("--data-path", some, "--dataloader-inter-document-masking")[1].sha256(),
    ]
    assert sums[0] == expected and len({expected, *sums}) == 6


def test_fillers_do_not_count_and_the_next_evaluation_restarts():
    samples = [{"tokens": torch.full((4,), i), "loss_mask": torch.ones(4)} for i in range(5)]
    valid = ValidationSet(samples, 3, 8)
    read_samples = [(int(valid[i]["tokens"][0]), int(valid[i]["loss_mask"].sum())) for i in range(8 * 100 + 8)]
    assert read_samples[:8] == [(0, 4), (1, 4), (2, 4), (0, 0), (1, 0), (2, 0), (0, 0), (1, 0)]
    assert read_samples[8:16] == read_samples[800:] == read_samples[:8]
    assert all(sample["loss_mask"].all() for sample in samples)  # fillers are copies


def test_eval_iters_selects_a_prefix_and_is_limited_to_the_set(provided, some, capsys):
    _, full, args = provided("--data-path", some)
    needed = args.eval_iters
    assert f"every evaluation reads all {full.num_samples} validation samples" in capsys.readouterr().out
    _, part, args = provided("--data-path", some, "--eval-iters", "2")
    assert (args.eval_iters, part.num_samples, part.samples_per_evaluation) == (2, 8, 8)
    assert read(part, 8) == read(full, 8)
    assert f"the first 8 of {full.num_samples} validation samples" in capsys.readouterr().out
    _, limited, args = provided("--data-path", some, "--eval-iters", "1000")
    assert args.eval_iters == needed and limited.num_samples == full.num_samples
    assert f"--eval-iters 1000 becomes {needed}" in capsys.readouterr().out


def test_default_number_of_tokens_limits_a_large_set(provided, some, monkeypatch):
    monkeypatch.setattr(provider, "DEFAULT_TOKENS", 6 * SEQUENCE + 1)
    for batch in (4, 8):
        _, valid, args = provided("--data-path", some, eval_global_batch_size=batch)
        assert valid.num_samples == 6 and args.eval_iters == -(-6 // batch)


def test_set_shorter_than_a_row_is_one_padded_sample(provided, write):
    prefix = write("short", [[0, 1, 1, 1, 1]] * 10)
    _, valid, _ = provided("--data-path", prefix, "--split", "90,10,0")
    assert valid.num_samples == 1 and valid[0]["loss_mask"].sum() == 4


def test_blend_is_read_completely_or_in_proportion_to_its_weights(provided, some, write):
    other = write("other", [[0] + [1] * 20] * 40, seed=5)
    _, full, _ = provided("--data-path", some, other)
    samples = read(full, full.num_samples)
    assert len(set(samples)) == len(samples) == sum(len(part) for part in full.samples.datasets)
    assert sum(sum(mask) for *_, mask in samples) == counted(some) + counted(other)
    given = ["--train-data-path", some, "--valid-data-path", "0.25", some, "0.75", other]
    runs = []
    for seed, batch in (("1", 4), ("2", 8)):
        _, valid, _ = provided(*given, "--seed", seed, eval_global_batch_size=batch)
        samples = read(valid, valid.num_samples)
        sizes = [len(part) for part in valid.samples.datasets]
        assert len(set(samples)) == len(samples)
        num_other = int(valid.samples._dataset_index[: len(samples)].sum())
        assert num_other == sizes[1] and abs(num_other / len(samples) - 0.75) < 0.02  # until ``other`` is exhausted
        runs.append(samples)
    assert runs[0] == runs[1] and valid.describe() == f"all {len(runs[0])} validation samples"
    _, valid, _ = provided(*given, "--eval-iters", "1")
    assert read(valid, 4) == runs[0][:4] and valid.describe() == "the first 4 validation samples"


@pytest.mark.parametrize("split", ["train", "valid"])
def test_split_without_counted_tokens_is_an_error(provided, write, split):
    masks = [[1 if (i < 32) == (split == "valid") else 0] * 20 for i in range(40)]
    prefix = write("half", masks)
    with pytest.raises(QADError, match=f"The {split} split of .*half: no token counts in the loss"):
        provided("--data-path", prefix)
    masks[32 if split == "valid" else 31][-1] = 1
    provided("--data-path", write("enough", masks))
    if split == "valid":
        provided("--data-path", prefix, "--eval-iters", "0")


def test_cyclic_dataloader_is_an_error(provided, some):
    with pytest.raises(QADError, match="--dataloader-type cyclic would read the validation set in a different order"):
        provided("--data-path", some, "--dataloader-type", "cyclic")


@pytest.mark.parametrize("flag", ["--dataloader-inter-document-masking", "--eod-mask-loss"])
def test_data_in_which_only_first_tokens_count_is_an_error(provided, write, flag):
    """The first token of a document is not a label if the documents are separated."""
    prefix = write("first", [[1] + [0] * 20] * 40)
    provided("--data-path", prefix)
    with pytest.raises(QADError, match="The train split of .*first: no token counts in the loss"):
        provided("--data-path", prefix, flag)
