"""Every start with the same --save directory continues the same wandb run."""

import os

import pytest

from megatron_qad.engine import init_runtime

init_runtime()

from megatron_qad.engine.wandb_run import continue_wandb_run  # noqa: E402


def start(save, project: str = "p") -> dict[str, str]:
    """Return the WANDB_ variables after a start."""
    continue_wandb_run(project, str(save), os.environ)
    return {name: os.environ.pop(name) for name in ("WANDB_RUN_ID", "WANDB_RESUME") if name in os.environ}


@pytest.fixture(autouse=True)
def last_of_four_ranks(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    for name in ("WANDB_RUN_ID", "WANDB_RESUME"):
        monkeypatch.delenv(name, raising=False)


def test_second_start_continues_first_run(tmp_path):
    first = start(tmp_path / "run")
    assert first["WANDB_RESUME"] == "allow" and first["WANDB_RUN_ID"]
    assert start(tmp_path / "run") == first
    assert start(tmp_path / "other")["WANDB_RUN_ID"] != first["WANDB_RUN_ID"]


def test_user_run_id_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "user-run")
    assert start(tmp_path)["WANDB_RUN_ID"] == "user-run"
    assert start(tmp_path)["WANDB_RUN_ID"] == "user-run"  # popped above: this one comes from the file


def test_only_last_rank_with_a_project_sets_variables(tmp_path, monkeypatch):
    assert start(tmp_path, project="") == {}
    monkeypatch.setenv("RANK", "0")
    assert start(tmp_path) == {} and not list(tmp_path.iterdir())
