"""The provider with Megatron's own arguments, in one process."""

import sys

import pytest
import torch
from megatron.core import parallel_state
from megatron.training.arguments import parse_args
from megatron.training.global_vars import destroy_global_vars, set_args

from megatron_qad.config.options import QADOptions
from megatron_qad.data.provider import check_data, dataset_config, datasets_provider
from megatron_qad.runtime.errors import QADError


@pytest.fixture
def args_for(monkeypatch, hf_dir):
    """``args_for("--data-path", prefix)``: Megatron's arguments as its parser leaves them."""

    def make(*flags):
        split = [] if "--train-data-path" in flags else ["--split", "80,20,0"]
        common = ["--seq-length", "16", *split, "--no-create-attention-mask-in-dataloader"]
        tokenizer = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(hf_dir)]
        monkeypatch.setattr(sys, "argv", ["test", *common, *tokenizer, *flags])
        args = parse_args()
        # What validate_args derives; it would also demand a whole model here.
        args.data_parallel_size, args.padded_vocab_size, args.tensor_model_parallel_size = 1, 512, 1
        args.micro_batch_size, args.qad = 2, QADOptions(qad_calibration_samples=8)
        return args

    return make


@pytest.fixture
def chats(write_jsonl, prepared, hf_dir):
    chat = {"messages": [{"role": "user", "content": "ABC"}, {"role": "assistant", "content": "123"}]}
    return prepared(write_jsonl([chat] * 20), hf_dir)[0]


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
    destroy_global_vars()


def test_the_provider_builds_all_splits(args_for, chats, one_process, hf_tokenizer):
    set_args(args_for("--data-path", chats))
    assert datasets_provider.is_distributed
    train, valid, test = datasets_provider([12, 4, 0])
    assert len(train) >= 12 and len(valid) >= 4 and test is None
    counted = "".join(hf_tokenizer.hf.decode(s["labels"][s["loss_mask"] == 1]) for s in (train[i] for i in range(12)))
    assert set(counted.replace("<|im_end|>", "")) == set("123")


def test_a_blend_holds_what_calibration_reads_ahead(args_for, chats, one_process, hf_tokenizer):
    """A job of one step (PTQ) asks for few samples, and a blend has no more than it was asked for."""
    set_args(args_for("--train-data-path", "0.6", chats, "0.4", chats, "--valid-data-path", chats))
    train, _, _ = datasets_provider([1, 1, 0])
    assert len(train) >= 8
    train[7]


def check(args):
    check_data(args, dataset_config(args))


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
