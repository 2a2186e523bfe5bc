"""The provider with Megatron's own arguments, in one process."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from megatron_qad.data.data_options import DataOptions
from megatron_qad.data.provider import DatasetsProvider, check_data, dataset_config
from megatron_qad.engine.errors import QADError


@pytest.fixture
def chats(write_jsonl, prepared, hf_dir):
    chat = {"messages": [{"role": "user", "content": "ABC"}, {"role": "assistant", "content": "123"}]}
    return prepared(write_jsonl([chat] * 20), hf_dir)[0]


def test_the_provider_builds_all_splits(provider_for, chats, one_process, hf_tokenizer):
    provider = provider_for("--data-path", chats)
    assert provider.is_distributed
    train, valid, test = provider([12, 4, 0])
    assert len(train) >= 12 and len(valid) >= 4 and test is None
    counted = "".join(hf_tokenizer.hf.decode(s["labels"][s["loss_mask"] == 1]) for s in (train[i] for i in range(12)))
    assert set(counted.replace("<|im_end|>", "")) == set("123")


def test_a_blend_holds_what_calibration_reads_ahead(provider_for, chats, one_process, hf_tokenizer):
    """A job of one step (PTQ) asks for few samples, and a blend has no more than it was asked for."""
    provider = provider_for("--train-data-path", "0.6", chats, "0.4", chats, "--valid-data-path", chats)
    train, _, _ = provider([1, 1, 0])
    assert len(train) >= 8
    train[7]


def check(args, *checkpoints):
    options = DataOptions(calibration_samples=8, checkpoints=checkpoints)
    check_data(args, dataset_config(args, options), options)


def test_a_missing_prefix_is_named(args_for, chats):
    with pytest.raises(QADError, match=r"--data-path nowhere/x: nowhere/x.bin and nowhere/x.idx not found"):
        check(args_for("--data-path", "0.5", chats, "0.5", "nowhere/x"))
    with pytest.raises(QADError, match="nowhere/y"):
        check(args_for("--train-data-path", chats, "--valid-data-path", "nowhere/y"))


def test_no_data_and_other_data_are_refused(args_for, chats):
    with pytest.raises(QADError, match="No training data was given"):
        check(args_for())
    with pytest.raises(QADError, match="--mock-data is for other data"):
        check(args_for("--mock-data"))


def test_a_validation_that_cannot_be_is_refused(args_for, chats):
    splits = [["--data-path", chats, "--split", split] for split in ("100,0,0", "100", "99 0 1")]
    for flags in (*splits, ["--train-data-path", chats]):
        with pytest.raises(QADError, match="No validation data was given.*--eval-iters 0"):
            check(args_for(*flags))
        check(args_for(*flags, "--eval-iters", "0"))
    check(args_for("--data-path", chats, "--split", "99 1 0"))
    for flag in ("--full-validation", "--multiple-validation-sets"):
        with pytest.raises(QADError, match="--full-validation and --multiple-validation-sets"):
            check(args_for("--data-path", chats, flag))


def test_data_whose_metadata_says_that_nothing_counts_is_refused(args_for, chats):
    metadata = Path(f"{chats}.json")
    metadata.write_text(json.dumps(json.loads(metadata.read_text()) | {"supervised_tokens": 0}))
    with pytest.raises(QADError, match=r"out: none of its \d+ tokens counts in the loss .*out.json, supervised_tokens"):
        check(args_for("--data-path", chats))


def test_a_vocabulary_that_exceeds_the_model_is_refused(args_for, chats):
    args = args_for("--data-path", chats)
    check(args)
    args.padded_vocab_size = 448
    with pytest.raises(QADError, match=r"chatml of 500 ids, but the model has 448"):
        check(args)


def test_data_of_another_tokenizer_is_refused(args_for, write_jsonl, prepared, sp_model):
    prefix, _ = prepared(write_jsonl([{"text": "hello"}] * 3), sp_model, name="sp")
    with pytest.raises(QADError, match=r"made with the tokenizer tiny.model .* maps other pieces"):
        check(args_for("--data-path", prefix))


def test_a_copy_that_broke_off_is_refused(args_for, chats):
    with open(f"{chats}.bin", "r+b") as stream:
        stream.truncate(100)
    with pytest.raises(QADError, match=r"out.bin has 100 bytes; its index of 20 documents says"):
        check(args_for("--data-path", chats))
    with open(f"{chats}.idx", "r+b") as stream:
        stream.truncate(4)
    with pytest.raises(QADError, match=r"out.idx cannot be read"):
        check(args_for("--data-path", chats))


@pytest.fixture
def by_null_tokenizer(args_for):
    """``by_null_tokenizer(tokenizer, "--data-path", prefix)``: the job's default, a tokenizer without pieces; the
    teacher's checkpoint carries the files of ``tokenizer`` in ``hf/``."""

    def make(tokenizer, *flags):
        args = args_for("--tokenizer-type", "NullTokenizer", "--vocab-size", "512", *flags)
        args.tokenizer_model, args.rank = None, 0
        return args, str(tokenizer)

    return make


@pytest.fixture
def checkpoint_with(tmp_path):
    """``checkpoint_with(directory or file)``: CKPT whose ``hf/`` holds that tokenizer."""

    def make(tokenizer):
        if tokenizer.is_dir():
            shutil.copytree(tokenizer, tmp_path / "ckpt" / "hf")
        else:
            (tmp_path / "ckpt" / "hf").mkdir(parents=True)
            shutil.copyfile(tokenizer, tmp_path / "ckpt" / "hf" / "tokenizer.model")
        return tmp_path / "ckpt"

    return make


@pytest.fixture
def by_both(write_jsonl, prepared, sp_model, hf_dir):
    """Prefixes of the same text by the sentencepiece model and by the Hugging Face tokenizer."""
    texts = write_jsonl([{"text": "hello"}] * 3)
    return prepared(texts, sp_model, name="sp")[0], prepared(texts, hf_dir, name="hf")[0]


def test_data_of_another_tokenizer_than_the_checkpoints_is_refused(by_null_tokenizer, checkpoint_with, by_both, hf_dir):
    """Without --tokenizer-model, the tokenizer that the teacher's checkpoint carries is what data must come from."""
    of_pieces, of_hf = by_both
    checkpoint = checkpoint_with(hf_dir)
    check(*by_null_tokenizer(checkpoint, "--data-path", of_hf))
    with pytest.raises(QADError, match=r"tokenizer tiny.model .* the model's tokenizer in .*ckpt/hf maps other pieces"):
        check(*by_null_tokenizer(checkpoint, "--data-path", "0.5", of_hf, "0.5", of_pieces))
    # Another file with the same vocabulary passes, but has to be loaded for that.
    file = checkpoint / "hf" / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text())))
    check(*by_null_tokenizer(checkpoint, "--data-path", of_hf))
    file.write_text("{")
    with pytest.raises(
        QADError, match=r"tokenizer chatml, whose files are not those of .*ckpt/hf, and that one cannot"
    ):
        check(*by_null_tokenizer(checkpoint, "--data-path", of_hf))
    file.unlink()  # a checkpoint without a tokenizer has nothing to say
    check(*by_null_tokenizer(checkpoint, "--data-path", of_hf, of_pieces))


def test_the_same_piece_model_under_another_name(by_null_tokenizer, checkpoint_with, by_both, sp_model):
    of_pieces, of_hf = by_both
    checkpoint = checkpoint_with(sp_model)
    check(*by_null_tokenizer(checkpoint, "--data-path", of_pieces))
    with pytest.raises(QADError, match=r"tokenizer chatml.*ckpt/hf"):
        check(*by_null_tokenizer(checkpoint, "--data-path", of_hf))


def test_eod_mask_loss_takes_the_eod_of_the_data(
    by_null_tokenizer, checkpoint_with, write_jsonl, prepared, one_process, hf_dir, hf_tokenizer
):
    """The job's NullTokenizer would take its last id for the EOD."""
    texts, _ = prepared(write_jsonl([{"text": "plain text"}] * 40), hf_dir)
    args, checkpoint = by_null_tokenizer(checkpoint_with(hf_dir), "--data-path", texts, "--eod-mask-loss")
    provider = DatasetsProvider(args, DataOptions(calibration_samples=8, checkpoints=(checkpoint,)))
    train, _, _ = provider([12, 4, 0])
    assert train.config.tokenizer.eod != hf_tokenizer.eod
    after_eod = [s["loss_mask"][s["tokens"] == hf_tokenizer.eod] for s in (train[i] for i in range(12))]
    assert sum(map(len, after_eod)) > 0 and not torch.cat(after_eod).any()


def test_an_eod_that_nobody_knows_is_refused(by_null_tokenizer, checkpoint_with, chats, hf_dir):
    Path(f"{chats}.json").unlink()
    flags = ("--data-path", chats, "--eod-mask-loss")
    checkpoint = checkpoint_with(hf_dir)
    with pytest.raises(QADError, match=r"--eod-mask-loss: without .*out.json, .* nothing says which id"):
        check(*by_null_tokenizer(checkpoint, *flags))
    check(*by_null_tokenizer(checkpoint, *flags, "--null-tokenizer-eod-id", "2"))


@pytest.mark.parametrize("flag", ["--reset-position-ids", "--reset-attention-mask"])
def test_flags_that_would_not_keep_documents_apart_are_refused(args_for, chats, flag):
    with pytest.raises(QADError, match=f"{flag} does not keep .* --dataloader-inter-document-masking instead"):
        check(args_for("--data-path", chats, flag))
