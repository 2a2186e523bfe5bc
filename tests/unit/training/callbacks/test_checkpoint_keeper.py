"""Failed saves, without a job. tests/dist/test_checkpoints.py tests them in jobs."""

import types

import pytest

from megatron_qad.engine import QADError, init_runtime

init_runtime()

from megatron_qad.config.qad_options import QADOptions  # noqa: E402
from megatron_qad.engine.distributed import init_process_group  # noqa: E402
from megatron_qad.engine.events import Save  # noqa: E402
from megatron_qad.engine.run_directory.atomic_checkpoint import AtomicCheckpoints, SaveFailed  # noqa: E402
from megatron_qad.training.callbacks.checkpoint_keeper import CheckpointKeeper  # noqa: E402


@pytest.fixture
def keeper(tmp_path):
    init_process_group()
    config = types.SimpleNamespace(options=QADOptions())
    args = types.SimpleNamespace(save=str(tmp_path), async_save=False)
    job = types.SimpleNamespace(config=config, args=args, saves=AtomicCheckpoints())
    return CheckpointKeeper(job, best=None)


def failed(iteration: int, is_last: bool = False) -> Save:
    return Save(iteration, is_last, error=SaveFailed("the disk is full"))


def test_failed_save_is_logged_and_raised_when_the_job_ends_early(keeper, capsys):
    """With --async-save, Megatron waits for pending saves before it exits, even if there are none."""
    save = failed(4)
    keeper.save_ended(save)
    assert save.is_survived and "the checkpoint of iteration 4 could not be saved" in capsys.readouterr().out
    keeper.save_ended(Save(None, is_last=True))
    with pytest.raises(QADError, match="The job ends here and its last steps are not saved"):
        keeper.job_ends(is_done=False)


def test_successful_save_clears_the_failure(keeper, capsys):
    keeper.save_ended(failed(4))
    keeper.save_ended(Save(8, is_last=False))
    keeper.job_ends(is_done=False)
    assert "megatron_qad: saved iteration 8 in " in capsys.readouterr().out


def test_failed_last_save_ends_the_job(keeper):
    with pytest.raises(QADError, match="Training has ended and its last steps are not saved"):
        keeper.save_ended(failed(8, is_last=True))
