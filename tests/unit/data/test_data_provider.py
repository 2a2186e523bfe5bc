"""The datasets provider with Megatron's own arguments, in one process."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from megatron_qad.data.checks import check_data
from megatron_qad.data.data_options import DataOptions
from megatron_qad.data.provider import DatasetsProvider, dataset_config, prefixes_of
from megatron_qad.engine.errors import QADError


@pytest.fixture
def chats(write_jsonl, prepared, hf_dir):
    chat = {"messages": [{"role": "user", "content": "ABC"}, {"role": "assistant", "content": "123"}]}
    return prepared(write_jsonl([chat] * 20), hf_dir)[0]


def test_provider_builds_train_and_validation_sets(provider_for, chats, one_process, hf_tokenizer):
    provider = provider_for("--data-path", chats)
    assert provider.is_distributed
    train, valid, test = provider([12, 4, 0])
    assert len(train) >= 12 and len(valid) >= 4 and test is None
    counted = "".join(hf_tokenizer.hf.decode(s["labels"][s["loss_mask"] == 1]) for s in (train[i] for i in range(12)))
    assert set(counted.replace("<|im_end|>", "")) == set("123")


def test_blend_has_the_samples_that_calibration_reads_ahead(provider_for, chats, one_process, hf_tokenizer):
    """A job of one step (PTQ) requests few samples, and a blend has only the requested samples."""
    provider = provider_for("--train-data-path", "0.6", chats, "0.4", chats, "--valid-data-path", chats)
    train, _, _ = provider([1, 1, 0])
    assert len(train) >= 8
    train[7]


def check(args, *checkpoints):
    options = DataOptions(calibration_samples=8, checkpoints=checkpoints)
    check_data(args, prefixes_of(dataset_config(args, options)), options)


def test_missing_prefix_is_an_error(args_for, chats):
    with pytest.raises(QADError, match=r"--data-path nowhere/x: nowhere/x.bin and nowhere/x.idx not found"):
        check(args_for("--data-path", "0.5", chats, "0.5", "nowhere/x"))
    with pytest.raises(QADError, match="nowhere/y"):
        check(args_for("--train-data-path", chats, "--valid-data-path", "nowhere/y"))


def test_no_data_and_mock_data_are_errors(args_for, chats):
    with pytest.raises(QADError, match="No training data was given"):
        check(args_for())
    with pytest.raises(QADError, match="--mock-data is not supported"):
        check(args_for("--mock-data"))


def test_missing_validation_data_is_an_error(args_for, chats):
    splits = [["--data-path", chats, "--split", split] for split in ("100,0,0", "100", "99 0 1")]
    for flags in (*splits, ["--train-data-path", chats]):
        with pytest.raises(QADError, match="No validation data was given.*--eval-iters 0"):
            check(args_for(*flags))
        check(args_for(*flags, "--eval-iters", "0"))
    check(args_for("--data-path", chats, "--split", "99 1 0"))
    for flag in ("--full-validation", "--multiple-validation-sets"):
        with pytest.raises(QADError, match="--full-validation and --multiple-validation-sets"):
            check(args_for("--data-path", chats, flag))


def test_data_without_supervised_tokens_is_an_error(args_for, chats):
    metadata = Path(f"{chats}.json")
    metadata.write_text(json.dumps(json.loads(metadata.read_text()) | {"supervised_tokens": 0}))
    with pytest.raises(QADError, match=r"out: none of its \d+ tokens counts in the loss .*out.json, supervised_tokens"):
        check(args_for("--data-path", chats))


def test_data_of_another_tokenizer_is_an_error(args_for, write_jsonl, prepared, sp_model):
    prefix, _ = prepared(write_jsonl([{"text": "hello"}] * 3), sp_model, name="sp")
    with pytest.raises(QADError, match=r"made with the tokenizer tiny.model .* maps the ids to other pieces"):
        check(args_for("--data-path", prefix))


def test_truncated_data_files_are_an_error(args_for, chats):
    with open(f"{chats}.bin", "r+b") as stream:
        stream.truncate(100)
    with pytest.raises(QADError, match=r"out.bin has 100 bytes, but its index of 20 documents implies"):
        check(args_for("--data-path", chats))
    with open(f"{chats}.idx", "r+b") as stream:
        stream.truncate(4)
    with pytest.raises(QADError, match=r"out.idx cannot be read"):
        check(args_for("--data-path", chats))


@pytest.fixture
def null_tokenizer_args(args_for):
    """``null_tokenizer_args(checkpoint, "--data-path", prefix)``: (arguments, checkpoint) of a job with the default
    NullTokenizer."""

    def make(checkpoint, *flags):
        args = args_for("--tokenizer-type", "NullTokenizer", "--vocab-size", "512", *flags)
        args.tokenizer_model, args.rank = None, 0
        return args, str(checkpoint)

    return make


@pytest.fixture
def checkpoint_with(tmp_path):
    """``checkpoint_with(directory or file)``: a checkpoint directory with that tokenizer in ``hf/``."""

    def make(tokenizer):
        if tokenizer.is_dir():
            shutil.copytree(tokenizer, tmp_path / "ckpt" / "hf")
        else:
            (tmp_path / "ckpt" / "hf").mkdir(parents=True)
            shutil.copyfile(tokenizer, tmp_path / "ckpt" / "hf" / "tokenizer.model")
        return tmp_path / "ckpt"

    return make


@pytest.fixture
def sp_and_hf_data(write_jsonl, prepared, sp_model, hf_dir):
    """Prefixes of the same text prepared with the sentencepiece model and with the Hugging Face tokenizer."""
    texts = write_jsonl([{"text": "hello"}] * 3)
    return prepared(texts, sp_model, name="sp")[0], prepared(texts, hf_dir, name="hf")[0]


def test_data_must_match_the_tokenizer_of_the_checkpoint(null_tokenizer_args, checkpoint_with, sp_and_hf_data, hf_dir):
    """Without --tokenizer-model the data must be made with the tokenizer in the teacher's checkpoint."""
    sp_data, hf_data = sp_and_hf_data
    checkpoint = checkpoint_with(hf_dir)
    check(*null_tokenizer_args(checkpoint, "--data-path", hf_data))
    with pytest.raises(QADError, match=r"tokenizer tiny.model .* the model's tokenizer in .*ckpt/hf maps the ids to"):
        check(*null_tokenizer_args(checkpoint, "--data-path", "0.5", hf_data, "0.5", sp_data))
    # Another file with the same vocabulary passes, but has to be loaded for that.
    file = checkpoint / "hf" / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text())))
    check(*null_tokenizer_args(checkpoint, "--data-path", hf_data))
    file.write_text("{")
    with pytest.raises(
        QADError, match=r"tokenizer chatml, whose files differ from those of .*ckpt/hf, which cannot be loaded"
    ):
        check(*null_tokenizer_args(checkpoint, "--data-path", hf_data))
    file.unlink()  # without a tokenizer in the checkpoint, data is compared with other data
    check(*null_tokenizer_args(checkpoint, "--data-path", hf_data))
    with pytest.raises(
        QADError, match=r"sp was made with the tokenizer tiny.model, and .*hf with chatml, whose ids mean"
    ):
        check(*null_tokenizer_args(checkpoint, "--data-path", hf_data, sp_data))


def test_sentencepiece_model_under_another_file_name_matches(
    null_tokenizer_args, checkpoint_with, sp_and_hf_data, sp_model
):
    sp_data, hf_data = sp_and_hf_data
    checkpoint = checkpoint_with(sp_model)
    check(*null_tokenizer_args(checkpoint, "--data-path", sp_data))
    with pytest.raises(QADError, match=r"tokenizer chatml.*ckpt/hf"):
        check(*null_tokenizer_args(checkpoint, "--data-path", hf_data))


def test_eod_mask_loss_uses_the_eod_of_the_data(
    null_tokenizer_args, checkpoint_with, write_jsonl, prepared, one_process, hf_dir, hf_tokenizer
):
    """The job's NullTokenizer has a different EOD: its last id."""
    texts, _ = prepared(write_jsonl([{"text": "plain text"}] * 40), hf_dir)
    args, checkpoint = null_tokenizer_args(checkpoint_with(hf_dir), "--data-path", texts, "--eod-mask-loss")
    provider = DatasetsProvider(args, DataOptions(calibration_samples=8, checkpoints=(checkpoint,)))
    train, _, _ = provider([12, 4, 0])
    assert train.config.tokenizer.eod != hf_tokenizer.eod
    after_eod = [s["loss_mask"][s["tokens"] == hf_tokenizer.eod] for s in (train[i] for i in range(12))]
    assert sum(map(len, after_eod)) > 0 and not torch.cat(after_eod).any()


def test_eod_mask_loss_with_unknown_eod_is_an_error(
    null_tokenizer_args, checkpoint_with, write_jsonl, prepared, hf_dir
):
    texts, _ = prepared(write_jsonl([{"text": "plain text"}] * 40), hf_dir)
    Path(f"{texts}.json").unlink()
    flags = ("--data-path", texts, "--eod-mask-loss")
    checkpoint = checkpoint_with(hf_dir)
    with pytest.raises(QADError, match=r"--eod-mask-loss needs the id of EOD, but .*out.json, .* does not exist"):
        check(*null_tokenizer_args(checkpoint, *flags))
    check(*null_tokenizer_args(checkpoint, *flags, "--null-tokenizer-eod-id", "2"))


@pytest.mark.parametrize("flag", ["--reset-position-ids", "--reset-attention-mask"])
def test_reset_flags_that_do_not_separate_documents_are_errors(args_for, chats, flag):
    with pytest.raises(QADError, match=f"{flag} does not separate .* --dataloader-inter-document-masking instead"):
        check(args_for("--data-path", chats, flag))


def test_tokenizer_that_cuts_text_differently_is_reported(
    null_tokenizer_args, checkpoint_with, write_jsonl, prepared, sp_model, capsys
):
    """A Hugging Face tokenizer with the pieces of a sentencepiece model, but without its white space rules."""
    import sentencepiece
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(sp_model))
    vocabulary = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    bpe = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.Whitespace(), decoders.Metaspace()
    directory = sp_model.parent / "as_hf"
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>", unk_token="<unk>").save_pretrained(directory)
    shutil.copyfile(sp_model, directory / "tokenizer.model")
    checkpoint = checkpoint_with(directory)
    texts = write_jsonl([{"text": "hello"}] * 3)
    by_pieces, by_hf = prepared(texts, sp_model, name="pieces")[0], prepared(texts, directory, name="hf")[0]
    warning = r"WARNING: .*pieces was made with the tokenizer tiny.model \(sentencepiece\), and the model's tokenizer"
    check(*null_tokenizer_args(checkpoint, "--data-path", by_pieces, by_hf))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "cuts text differently" in line]
    assert re.search(warning, line)
    metadata = Path(f"{by_pieces}.json")  # an older version recorded no ids of the probe text
    metadata.write_text(json.dumps(json.loads(metadata.read_text()) | {"probe_sha256": ""}))
    check(*null_tokenizer_args(checkpoint, "--data-path", by_pieces))
    assert "cuts text differently" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--split", "0,100,0"], "No training data was given. Give --train-data-path, a training share in --split, or"),
        (["--split", "2,-1,0"], "--split '2,-1,0': expected the shares"),
        (["--train-data-path", "CHATS"], "--data-path and --train-data-path both give data. Give one of them"),
        (
            ["--per-dataset-sequences-path", "FILE"],
            "counts.json: 'a' has the value 5. Expected its numbers of sequences",
        ),
    ],
)
def test_flags_that_give_no_usable_data(args_for, chats, tmp_path, flags, message):
    (tmp_path / "counts.json").write_text('{"a": 5}')
    names = {"CHATS": chats, "FILE": str(tmp_path / "counts.json")}
    given = ["--data-path", chats, "--split", "80,20,0", *(names.get(flag, flag) for flag in flags)]
    with pytest.raises(QADError, match=message):
        check(args_for(*given))


def test_validation_only_needs_no_training_data(args_for, chats):
    check(args_for("--data-path", chats, "--split", "0,100,0", "--skip-train"))


def test_repeated_data_is_reported(provider_for, chats, one_process, capsys):
    provider_for("--train-data-path", "0.6", chats, "0.4", chats, "--valid-data-path", chats)([1, 1, 0])
    lines = [line for line in capsys.readouterr().out.splitlines() if "is given" in line]
    assert [line.split(" is given ")[1].split(":")[0] for line in lines] == [
        "2 times in one blend",
        "for training and for validation",
    ]
