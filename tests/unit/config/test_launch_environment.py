"""The variables of a launcher: a missing or wrong one ends in one error, before a rank waits for the others."""

import socket

import pytest

from megatron_qad.config.launch_environment import check_ranks, world_size
from megatron_qad.config.megatron_flags import MegatronFlags
from megatron_qad.config.qad_options import QADOptions
from megatron_qad.engine import QADError
from megatron_qad.engine.distributed import check_port_is_free

ONE = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
TWO = ONE | {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}


def test_complete_variables_pass():
    check_ranks(ONE)
    check_ranks(TWO)


@pytest.mark.parametrize(
    "environ, message",
    [
        ({}, "the job was started without a launcher. Start it with launch/torchrun.sh"),
        ({"RANK": "0"}, "WORLD_SIZE and MASTER_ADDR and MASTER_PORT: not set, although RANK=0 is."),
        ({"WORLD_SIZE": "8"}, "RANK and MASTER_ADDR and MASTER_PORT: not set, although WORLD_SIZE=8 is."),
        (ONE | {"MASTER_ADDR": ""}, "MASTER_ADDR: not set, although RANK=0, WORLD_SIZE=1, MASTER_PORT=29500 is."),
        (ONE | {"WORLD_SIZE": "eight"}, "WORLD_SIZE=eight: expected a number of 1 or more."),
        (ONE | {"WORLD_SIZE": "0"}, "WORLD_SIZE=0: expected a number of 1 or more."),
        (ONE | {"RANK": "-1"}, "RANK=-1: expected a number of 0 or more."),
        (ONE | {"RANK": "1"}, "RANK=1: expected a rank below WORLD_SIZE=1."),
        (ONE | {"MASTER_PORT": "http"}, "MASTER_PORT=http: expected a number of 1 or more."),
        (TWO | {"LOCAL_RANK": "2"}, "LOCAL_RANK=2: expected a rank below LOCAL_WORLD_SIZE=2."),
        ({k: v for k, v in TWO.items() if k != "LOCAL_RANK"}, "LOCAL_RANK: not set, so that all 2 ranks would use"),
    ],
)
def test_wrong_variables_are_rejected(environ, message):
    with pytest.raises(QADError) as error:
        check_ranks(environ)
    assert str(error.value).startswith(message)


def test_dry_run_plans_for_one_model_parallel_group():
    flags = MegatronFlags(tensor_model_parallel_size=2, pipeline_model_parallel_size=3)
    assert world_size(flags, QADOptions(qad_dry_run=True), {}) == 6
    assert world_size(flags, QADOptions(qad_dry_run=True), {"WORLD_SIZE": "12"}) == 12
    assert world_size(flags, QADOptions(), {}) == 1
    with pytest.raises(QADError, match="WORLD_SIZE=1.5"):
        world_size(flags, QADOptions(), {"WORLD_SIZE": "1.5"})


def test_task_of_srun_without_rank_is_rejected():
    """Each task would be a job of its own. A batch script and a rank of torchrun have SLURM's variables, too."""
    task = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "16"}
    with pytest.raises(
        QADError, match="srun started 16 tasks, and without RANK each of them would be a job of its own"
    ):
        world_size(MegatronFlags(), QADOptions(), task)
    for environ in (task | TWO, task | {"SLURM_STEP_NUM_TASKS": "1"}, {"SLURM_NTASKS": "16", "SLURM_PROCID": "0"}):
        world_size(MegatronFlags(), QADOptions(), environ)
    world_size(MegatronFlags(), QADOptions(qad_dry_run=True), task)


def test_port_in_use_is_rejected_on_the_first_rank():
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        environ = ONE | {"MASTER_PORT": str(other.getsockname()[1])}
        with pytest.raises(QADError, match="is in use by another process. Choose another port"):
            check_port_is_free(environ)
        check_port_is_free(environ | {"RANK": "1"})  # a client of the first rank
        check_port_is_free(environ | {"TORCHELASTIC_USE_AGENT_STORE": "True"})  # the agent's port
    check_port_is_free(environ)
    with pytest.raises(QADError, match="MASTER_PORT=70000: expected a number up to 65535"):
        check_port_is_free(ONE | {"MASTER_PORT": "70000"})
