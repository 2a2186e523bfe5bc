"""Every start of one --save directory continues one wandb run."""

import os

import pytest

from megatron_qad.engine import init_runtime

init_runtime()

from megatron_qad.engine.loggers import continue_wandb_run  # noqa: E402


def start(save, project: str = "p") -> dict[str, str]:
    """The WANDB_ variables after a start."""
    continue_wandb_run(project, str(save), os.environ)
    return {name: os.environ.pop(name) for name in ("WANDB_RUN_ID", "WANDB_RESUME") if name in os.environ}


@pytest.fixture(autouse=True)
def last_of_four_ranks(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    for name in ("WANDB_RUN_ID", "WANDB_RESUME"):
        monkeypatch.delenv(name, raising=False)


def test_a_second_start_continues_the_first_ones_run(tmp_path):
    first = start(tmp_path / "run")
    assert first["WANDB_RESUME"] == "allow" and first["WANDB_RUN_ID"]
    assert start(tmp_path / "run") == first
    assert start(tmp_path / "other")["WANDB_RUN_ID"] != first["WANDB_RUN_ID"]


def test_a_run_that_the_user_names_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    assert start(tmp_path)["WANDB_RUN_ID"] == "mine"
    assert start(tmp_path)["WANDB_RUN_ID"] == "mine"  # popped above: this one comes from the file


def test_only_the_rank_that_writes_to_wandb_and_only_if_asked(tmp_path, monkeypatch):
    assert start(tmp_path, project="") == {}
    monkeypatch.setenv("RANK", "0")
    assert start(tmp_path) == {} and not list(tmp_path.iterdir())
