"""Optimizers whose parameters are their masters are refused; the names are those that Megatron's parser knows."""

import argparse

import pytest

from megatron_qad.runtime import QADError, prepare

prepare()

from megatron.training.arguments import add_megatron_arguments  # noqa: E402

from megatron_qad.training.arguments import check_masters  # noqa: E402

FLAGS = [
    "--use-precision-aware-optimizer",
    "--use-megatron-fsdp",
    "--use-torch-fsdp2",
    "--fp8-param-gather",
    "--fp4-param-gather",
]


@pytest.fixture(scope="module")
def parser():
    return add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))


@pytest.mark.parametrize("flag", FLAGS)
def test_an_optimizer_without_masters_is_refused(parser, flag):
    with pytest.raises(QADError, match=f"{flag} .*--use-distributed-optimizer"):
        check_masters(parser.parse_args([flag]))


def test_the_others_pass(parser):
    check_masters(parser.parse_args([]))
    check_masters(parser.parse_args(["--use-distributed-optimizer", "--overlap-param-gather", "--bf16"]))
