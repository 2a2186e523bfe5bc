"""Flags that QAD rejects, read by Megatron's own parser."""

import pytest

from megatron_qad.engine import QADError, init_runtime

init_runtime()

from megatron_qad.config.megatron_flags import MegatronFlags  # noqa: E402
from megatron_qad.config.qad_options import QADOptions  # noqa: E402
from megatron_qad.config.refusals import (  # noqa: E402
    check_masters,
    check_ptq,
    check_skipped,
    check_step,
)
from megatron_qad.config.saving_checks import check_wandb, refuse_training_run  # noqa: E402
from megatron_qad.engine.megatron_args import make_parser  # noqa: E402

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
    megatron_parser = make_parser(QADOptions)
    return lambda argv: MegatronFlags.from_args(megatron_parser.parse_args(argv))


@pytest.mark.parametrize("flag", FLAGS)
def test_optimizer_without_masters_is_rejected(parser, flag):
    with pytest.raises(QADError, match=f"{flag} .*--use-distributed-optimizer"):
        check_masters(parser([flag]))


def test_optimizer_with_masters_passes(parser):
    check_masters(parser([]))
    check_masters(parser(["--use-distributed-optimizer", "--overlap-param-gather", "--bf16"]))


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
def test_unsupported_steps_are_rejected(parser, flags):
    check_step(parser([]))
    with pytest.raises(QADError, match=f"{flags[0]}.* is not supported"):
        check_step(parser(flags))


@pytest.mark.parametrize(
    "parallelism",
    [
        {"pipeline_model_parallel_size": 4},
        {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2},
        {"tensor_model_parallel_size": 2, "dataloader_inter_document_masking": True},
    ],
)
def test_steps_that_megatron_cannot_skip_are_rejected(parallelism):
    options = QADOptions(qad_calibration_samples=8)
    with pytest.raises(QADError, match="--iterations-to-skip: Megatron does not read"):
        check_skipped(MegatronFlags(iterations_to_skip=[9], load="a checkpoint", **parallelism), options)
    check_skipped(MegatronFlags(global_batch_size=8, **parallelism), options)


@pytest.mark.parametrize(
    "skipped, rejected", [([], None), ([1], None), ([7], None), ([3], 3), ([1, 7], 7), ([5, 9], 5)]
)
def test_skipping_steps_whose_data_calibration_reads_is_rejected(skipped, rejected):
    options = QADOptions(qad_calibration_samples=36)  # the data of five steps, rounded up to whole batches
    flags = {"iterations_to_skip": skipped, "global_batch_size": 8}
    if rejected is None:
        return check_skipped(MegatronFlags(**flags), options)
    with pytest.raises(QADError, match=rf"--iterations-to-skip {rejected}: "):
        check_skipped(MegatronFlags(**flags), options)
    check_skipped(MegatronFlags(**flags, load="a checkpoint with calibrated quantizers"), options)


def test_flags_with_which_wandb_cannot_start_are_rejected():
    with pytest.raises(QADError, match="--wandb-exp-name ''"):
        check_wandb(MegatronFlags(wandb_project="p", wandb_exp_name=""))
    with pytest.raises(QADError, match="--wandb-project needs a directory"):
        check_wandb(MegatronFlags(wandb_project="p"))


def test_ptq_neither_resumes_nor_skips():
    check_ptq(MegatronFlags(save="runs/ptq"))
    with pytest.raises(QADError, match="--load runs/qad: --qad-ptq does not resume.*--qad-student"):
        check_ptq(MegatronFlags(load="runs/qad"))
    with pytest.raises(QADError, match="--skip-train: --qad-ptq trains nothing"):
        check_ptq(MegatronFlags(skip_train=True))


def test_ptq_does_not_reset_a_training_run(tmp_path):
    refuse_training_run(None)
    refuse_training_run(str(tmp_path / "new"))
    (tmp_path / "iter_0000001").mkdir()  # an earlier PTQ job, which is repeated
    refuse_training_run(str(tmp_path))
    (tmp_path / "iter_0000001.0f3a.partial").mkdir()  # an earlier PTQ job that was killed
    refuse_training_run(str(tmp_path))
    (tmp_path / "iter_0000200").mkdir()
    with pytest.raises(QADError, match="holds a training run"):
        refuse_training_run(str(tmp_path))
