"""Checks of the command line: help, pipeline stages, tokenizers and the vocabularies of the two models."""

import argparse
import json

import pytest

from megatron_qad.engine import QADError, init_runtime

init_runtime()

from megatron_qad.config.parallelism import split_into_stages  # noqa: E402
from megatron_qad.config.qad_options import QADOptions  # noqa: E402
from megatron_qad.config.vocabulary import check_same_vocabulary  # noqa: E402
from megatron_qad.config.yaml_file import expand  # noqa: E402
from megatron_qad.engine.megatron_args import add_options, make_parser  # noqa: E402
from megatron_qad.models.checkpoint_config import read_config  # noqa: E402
from megatron_qad.training.start import read_command_line  # noqa: E402


def test_help(capsys):
    """--help prints all flags, although the help of one of Megatron's has a bare %, on which argparse fails."""
    parser = make_parser(QADOptions)
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert "--qad-teacher" in printed and "1.10 = 10%)" in printed and "in %, of an" in " ".join(printed.split())


@pytest.mark.parametrize(
    "pattern, stages, expected",
    [
        ("*-*-", 1, "*-*-"),
        ("*-*-", 2, "*-|*-"),
        ("*-*-*-", 2, "*-*|-*-"),
        ("*-*-", 4, "*|-|*|-"),
        ("*-*-*-*-*-", 4, "*-|*-*|-*-|*-"),
    ],
)
def test_layer_pattern_is_split_evenly(pattern, stages, expected):
    split = split_into_stages(pattern, stages)
    assert split == expected
    assert split.replace("|", "") == pattern
    sizes = [len(part) for part in split.split("|")]
    assert len(sizes) == stages and max(sizes) - min(sizes) <= 1


def test_more_stages_than_layers_are_rejected():
    message = r"5 pipeline stages for 4 layers \(\*-\*-\): expected at most one stage per layer"
    with pytest.raises(QADError, match=message):
        split_into_stages("*-*-", 5)


def test_checkpoint_without_config_is_rejected(tmp_path):
    with pytest.raises(QADError, match=r"no hf/config\.json. Expected a checkpoint directory"):
        read_config(tmp_path)


@pytest.fixture
def checkpoint(tmp_path):
    def make(name: str, vocab: dict[str, int] | None, indent: int | None = None) -> str:
        hf = tmp_path / name / "hf"
        hf.mkdir(parents=True)
        if vocab is not None:
            model = {"type": "WordLevel", "vocab": vocab, "unk_token": "a"}
            content = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None}
            content |= {
                "pre_tokenizer": {"type": "Whitespace"},
                "post_processor": None,
                "decoder": None,
                "model": model,
            }
            (hf / "tokenizer.json").write_text(json.dumps(content, indent=indent))
            settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "a", "eos_token": "b"}
            (hf / "tokenizer_config.json").write_text(json.dumps(settings))
        return str(tmp_path / name)

    return make


SIZE = {"vocab_size": 3}


def test_vocabularies_of_different_sizes_are_rejected(checkpoint):
    student, teacher = checkpoint("student", None), checkpoint("teacher", None)
    with pytest.raises(QADError, match=r"vocab_size is 4 in the teacher .*teacher and 3 in the student .*student;"):
        check_same_vocabulary(student, SIZE, teacher, {"vocab_size": 4})


def test_tokenizers_with_different_pieces_are_rejected(checkpoint):
    student, teacher = checkpoint("student", {"a": 0, "b": 1, "c": 2}), checkpoint("teacher", {"a": 0, "b": 2, "c": 1})
    with pytest.raises(QADError) as error:
        check_same_vocabulary(student, SIZE, teacher, SIZE)
    assert "tokenizer.json" in str(error.value)
    assert "the piece 'c' has id 2 in the student and 1 in the teacher" in str(error.value)


def test_tokenizers_with_equal_pieces_pass(checkpoint):
    pieces = {"a": 0, "b": 1, "c": 2}
    student, same = checkpoint("student", pieces), checkpoint("same", pieces)
    rewritten, without_tokenizer = checkpoint("rewritten", pieces, indent=1), checkpoint("without", None)
    for teacher in (student, same, rewritten, without_tokenizer):
        check_same_vocabulary(student, SIZE, teacher, SIZE)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--trust-remote-code"], "--trust-remote-code would run code that came with a tokenizer"),
        (["--tokenizer-model", "org/model"], "--tokenizer-model org/model: does not exist. Expected a local directory"),
        ([], "--tokenizer-model None: does not exist"),
        (["--tokenizer-type", "GPT2BPETokenizer"], "--tokenizer-type GPT2BPETokenizer: expected NullTokenizer"),
    ],
)
def test_tokenizers_with_code_or_from_the_hub_are_rejected(flags, message):
    with pytest.raises(QADError) as error:
        read_command_line(["--tokenizer-type", "HuggingFaceTokenizer", *flags])
    assert message in str(error.value)


def test_remote_code_in_a_yaml_file_is_rejected(tmp_path):
    (tmp_path / "job.yaml").write_text("trust_remote_code: true\n")
    with pytest.raises(QADError, match="--trust-remote-code would run code"):
        read_command_line(["--config", str(tmp_path / "job.yaml")])


def test_local_tokenizer_passes(checkpoint, tmp_path):
    """The next check fails instead: no checkpoint is given."""
    local = checkpoint("teacher", {"a": 0, "b": 1})
    with pytest.raises(QADError, match="needs --qad-teacher"):
        read_command_line(["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", f"{local}/hf"])


def test_policy_overrides_of_file_and_flags_add_up(tmp_path):
    (tmp_path / "job.yaml").write_text("qad-policy-override: [head=nvfp4, attention=fp8]\n")
    flags = [
        "--qad-policy-override",
        "mlp=fp8",
        "--config",
        f"{tmp_path}/job.yaml",
        "--qad-policy-override",
        "head=bf16",
    ]
    parser = add_options(QADOptions, argparse.ArgumentParser())
    rules = parser.parse_args(expand(flags, parser)).qad_policy_override
    assert rules == ["head=nvfp4", "attention=fp8", "mlp=fp8", "head=bf16"]
    assert parser.parse_args([]).qad_policy_override == []
