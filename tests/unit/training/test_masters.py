"""Optimizers whose parameters are their masters are refused; the names are those that Megatron's parser knows."""

import argparse

import pytest

from megatron_qad.engine import QADError, prepare

prepare()

from megatron.training.arguments import add_megatron_arguments  # noqa: E402

from megatron_qad.training.arguments import check_masters, check_step  # noqa: E402

FLAGS = [
    "--fp16",
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


@pytest.mark.parametrize(
    "flags",
    [
        ["--ckpt-format", "torch"],
        ["--cuda-graph-impl", "local"],
        ["--overlap-moe-expert-parallel-comm"],
        ["--tensor-parallel-num-weight-shards", "4"],
        ["--hybrid-context-parallel"],
    ],
    ids=lambda flags: flags[0],
)
def test_a_step_of_another_kind_is_refused(parser, flags):
    def parsed(argv):
        args = parser.parse_args(argv)
        # As Megatron's validation derives it, at tensor parallelism 1.
        args.gtp_weight_remat_size = args.tensor_parallel_num_weight_shards or 1
        args.expert_gtp_weight_remat_size = 1
        return args

    check_step(parsed([]))
    with pytest.raises(QADError, match=f"{flags[0]}.* is not supported"):
        check_step(parsed(flags))
