"""QADDataset on real files, built by Megatron's blend builder."""

import os

import numpy as np
import pytest
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from megatron.core.tokenizers import MegatronTokenizer
from prepared import write_indexed, write_prepared
from torch._utils import ExceptionWrapper

from megatron_qad.data.dataset import QADDataset, QADDatasetConfig, SampleError
from megatron_qad.data.metadata import loss_mask_prefix
from megatron_qad.engine.errors import QADError

SEQUENCE = 16


@pytest.fixture(scope="module")
def megatron_tokenizer(hf_dir):
    return MegatronTokenizer.from_pretrained(tokenizer_path=str(hf_dir), metadata_path={"library": "huggingface"})


@pytest.fixture
def build(megatron_tokenizer):
    def run(blend, sizes, split="80,20,0", cls=QADDataset, **changes):
        settings = {
            "random_seed": 7,
            "sequence_length": SEQUENCE,
            "blend": blend,
            "split": split,
            "tokenizer": megatron_tokenizer,
            "reset_position_ids": False,
            "reset_attention_mask": False,
            "eod_mask_loss": False,
            "create_attention_mask": False,
        }
        config = QADDatasetConfig(**(settings | changes))
        return BlendedMegatronDatasetBuilder(cls, sizes, lambda: True, config).build()

    return run


@pytest.fixture
def chats(write_jsonl, prepared, hf_dir):
    """Prefix of 40 chats in which users write capital letters and the assistant writes digits."""
    lines = [
        {
            "messages": [
                {"role": "user", "content": "ABCDEFG"[: i % 7 + 1]},
                {"role": "assistant", "content": str(10**7 + i)[i % 5 :]},
            ]
        }
        for i in range(40)
    ]
    return prepared(write_jsonl(lines, "chats.jsonl"), hf_dir, name="chats")[0]


@pytest.fixture
def texts(write_jsonl, prepared, hf_dir):
    lines = [{"text": "plain text here " * (i % 3 + 1)} for i in range(30)]
    return prepared(write_jsonl(lines, "texts.jsonl"), hf_dir, name="texts")[0]


def stream(dataset, prefix):
    """Return (tokens, mask) of all documents of this split, concatenated in its order: samples are cut from these."""
    order = dataset.document_index
    tokens = np.concatenate([dataset.dataset[int(d)] for d in order]).astype(np.int64)
    if not IndexedDataset.exists(loss_mask_prefix(prefix)):
        return tokens, np.ones(len(tokens))
    masks = IndexedDataset(loss_mask_prefix(prefix))
    return tokens, np.concatenate([masks[int(d)] for d in order])


def check_sample(dataset, prefix, index, sample):
    tokens, mask = stream(dataset, prefix)
    begin = int(dataset.shuffle_index[index]) * SEQUENCE
    assert sample["tokens"].tolist() == tokens[begin : begin + SEQUENCE].tolist()
    assert sample["labels"].tolist() == tokens[begin + 1 : begin + SEQUENCE + 1].tolist()
    assert sample["loss_mask"].tolist() == mask[begin + 1 : begin + SEQUENCE + 1].tolist()
    assert sample["position_ids"].tolist() == list(range(SEQUENCE))


def test_loss_mask_of_a_blend_refers_to_labels_across_documents(build, chats, texts, hf_tokenizer):
    train, valid, test = build(([chats, texts], [0.6, 0.4]), [60, 12, 0])
    assert test is None and len(train) >= 60
    prefixes, seen, num_crossings = [chats, texts], set(), 0
    for blended in (train, valid):
        for i in range(len(blended)):
            sample = dict(blended[i])
            dataset_id = int(sample.pop("dataset_id"))
            assert set(sample) == {"tokens", "labels", "loss_mask", "position_ids"}
            assert sample["loss_mask"].dtype == torch.float32
            check_sample(blended.datasets[dataset_id], prefixes[dataset_id], blended.dataset_sample_index[i], sample)
            seen.add(dataset_id)
            num_crossings += int((sample["tokens"] == hf_tokenizer.eod).any())
            if dataset_id == 0:
                counted = hf_tokenizer.hf.decode(sample["labels"][sample["loss_mask"] == 1])
                assert set(counted.replace("<|im_end|>", "")) <= set("0123456789")
    assert seen == {0, 1} and num_crossings > 10, "the test needs both parts and samples across document boundaries"


def test_train_and_valid_splits_share_no_document(build, chats):
    train, valid, _ = build(([chats], None), [20, 5, None])
    assert not set(train.document_index.tolist()) & set(valid.document_index.tolist())


def test_data_without_mask_matches_gpt_dataset(build, texts):
    ours = build(([texts], None), [20, 5, None])[0]
    megatron = build(([texts], None), [20, 5, None], cls=GPTDataset)[0]
    for i in range(20):
        actual, expected = ours[i], megatron[i]
        assert actual.keys() == expected.keys()
        # The tokenizer's pad is its EOS, so GPTDataset pads with -1 as well and nothing differs.
        assert all(torch.equal(actual[k], expected[k]) for k in actual)


def test_padding_never_counts_and_does_not_affect_other_samples(build, texts):
    changes = {"drop_last_partial_validation_sequence": False}
    valid = build(([texts], None), [None, None, None], split="0,100,0", **changes)[1]
    tokens, _ = stream(valid, texts)
    last = int(np.argmax(valid.shuffle_index))
    real = (len(tokens) - 1) % SEQUENCE
    assert real, "the test needs texts whose last sample is not full"
    padded = valid[last]  # read first on purpose: GPTDataset would cache the padded mask
    assert padded["loss_mask"].tolist() == [1.0] * real + [0.0] * (SEQUENCE - real)
    for i in range(len(valid)):
        if i != last:
            assert valid[i]["loss_mask"].sum() == SEQUENCE
    assert valid[None]["loss_mask"].sum() == 0


def test_eod_mask_loss_and_samples_without_extra_token(build, chats, hf_tokenizer):
    plain = build(([chats], None), [20, 5, None])[0]
    masked = build(([chats], None), [20, 5, None], eod_mask_loss=True)[0]
    for i in range(20):
        expected = plain[i]["loss_mask"] * (plain[i]["tokens"] != hf_tokenizer.eod)
        assert torch.equal(masked[i]["loss_mask"], expected)
    short = build(([chats], None), [20, 5, None], add_extra_token_to_sequence=False)[0]
    tokens, mask = stream(short, chats)
    for i in range(20):
        begin = int(short.shuffle_index[i]) * SEQUENCE
        expected = [*mask[begin + 1 : begin + SEQUENCE], 0]
        assert short[i]["loss_mask"].tolist() == expected and short[i]["tokens"][0] == tokens[begin]


def test_packed_samples_have_the_same_tokens(build, chats):
    """Separated documents: same tokens, positions that restart, and no label from the next document."""
    plain = build(([chats], None), [20, 5, None])[0]
    packed = build(([chats], None), [20, 5, None], inter_document_masking=True)[0]
    num_documents = 0
    for i in range(20):
        assert all(torch.equal(plain[i][k], packed[i][k]) for k in ("tokens", "labels"))
        cu_seqlens = packed[i]["cu_seqlens"].tolist()
        ends = cu_seqlens[1 : cu_seqlens.index(SEQUENCE) + 1]
        num_documents += len(ends)
        mask, positions = plain[i]["loss_mask"].clone(), []
        mask[[end - 1 for end in ends[:-1]]] = 0
        assert torch.equal(packed[i]["loss_mask"], mask)
        for start, end in zip([0, *ends], ends, strict=False):
            positions += range(end - start)
        assert packed[i]["position_ids"].tolist() == positions
    assert num_documents > 30


def test_label_from_the_next_document_does_not_count_at_the_row_end(build, tmp_path):
    """Every document is as long as a row, so each row's last label is the first token of another document."""
    builder = IndexedDatasetBuilder(f"{tmp_path}/rows.bin", dtype=np.int32)
    for i in range(40):
        builder.add_document(torch.arange(i, i + SEQUENCE), [SEQUENCE])
    builder.finalize(f"{tmp_path}/rows.idx")
    packed = build(([f"{tmp_path}/rows"], None), [20, 5, None], inter_document_masking=True)[0]
    for i in range(20):
        assert packed[i]["cu_seqlens"].tolist() == [0] + [SEQUENCE] * SEQUENCE
        assert packed[i]["loss_mask"].tolist() == [1] * (SEQUENCE - 1) + [0]


def test_data_prepared_again_does_not_use_cached_indices(build, texts, write_jsonl, prepared, hf_dir):
    build(([texts], None), [20, 5, None])
    lines = [{"text": "other " * (40 - i)} for i in range(30)]
    prepared(write_jsonl(lines, "other.jsonl"), hf_dir, name="texts", force=True)
    train = build(([texts], None), [20, 5, None])[0]
    for i in range(20):
        check_sample(train, texts, i, train[i])


def test_split_without_documents_is_an_error(build, write_jsonl, prepared, hf_dir):
    prefix, _ = prepared(write_jsonl([{"text": "only one"}]), hf_dir)
    with pytest.raises(QADError, match=r"valid split of .*out has 0 of 1 documents.*--split"):
        build(([prefix], None), [4, 4, None], split="90,10,0")


def test_missing_or_mismatched_loss_mask_is_an_error(build, chats, texts):
    for suffix in (".bin", ".idx"):
        source = loss_mask_prefix(chats) + suffix
        with open(source, "rb") as stream_, open(loss_mask_prefix(texts) + suffix, "wb") as target:
            target.write(stream_.read())
    with pytest.raises(QADError, match=r"texts_loss_mask does not match"):
        build(([texts], None), [4, 4, None])
    os.remove(loss_mask_prefix(chats) + ".bin")
    with pytest.raises(QADError, match=r"chats.json records a loss mask"):
        build(([chats], None), [4, 4, None])


def test_sample_with_an_unknown_id_is_refused(build, tmp_path):
    """Also in a data worker, from which torch passes errors on with the worker's traceback."""
    rows = [np.full(SEQUENCE, 100 + i) for i in range(20)]
    rows[7][3:5] = (448, 9)
    prefix = write_indexed(f"{tmp_path}/rows", rows, np.int32)
    error = f"{prefix}.bin: document 7 has the token id 448, but the model has 448 ids. Prepare the data with the "
    train = build(([prefix], None), [30, 0, 0], split="100,0,0", vocab_size=448)[0]
    with pytest.raises(SampleError) as raised:
        list(train)
    assert str(raised.value) == error + "model's tokenizer."
    try:
        list(train)
    except SampleError:
        from_worker = ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises(SampleError) as raised:
        from_worker.reraise()
    assert str(raised.value) == error + "model's tokenizer."
    list(build(([prefix], None), [30, 0, 0], split="100,0,0", vocab_size=449)[0])
    rows[7][3:5] = (-1, -7)  # -1 is also the id of padding
    write_indexed(prefix, rows, np.int32)
    with pytest.raises(SampleError, match="rows.bin: document 7 has the token id -1, but ids below 0 do not exist"):
        list(build(([prefix], None), [30, 0, 0], split="100,0,0")[0])


def test_mask_that_is_neither_zero_nor_one_is_refused(build, tmp_path):
    prefix = write_prepared(f"{tmp_path}/rows", [np.arange(1, 17)] * 20, [np.arange(16) % 3] * 20)
    train = build(([prefix], None), [10, 0, 0], split="100,0,0")[0]
    with pytest.raises(SampleError, match=r"rows_loss_mask.bin: document \d+ has the value 2, expected 0 or 1"):
        train[0]
