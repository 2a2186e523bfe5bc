"""Loggers report each kind of failure once and raise nothing."""

import argparse
import errno
import json
import os
import signal
import struct
import sys
import types

import pytest
import torch

from megatron_qad.engine import init_runtime

init_runtime()

from megatron.core.timers import Timers  # noqa: E402
from megatron.training import checkpointing, global_vars, wandb_utils  # noqa: E402
from megatron.training import training as megatron_loop  # noqa: E402
from wandb.proto import wandb_internal_pb2  # noqa: E402

from megatron_qad.engine import event_writer  # noqa: E402
from megatron_qad.engine.event_writer import FailureLog, JobWriter  # noqa: E402
from megatron_qad.engine.heartbeat import Heartbeat  # noqa: E402
from megatron_qad.engine.loggers import Loggers  # noqa: E402
from megatron_qad.engine.metric_writer import MetricsFile  # noqa: E402
from megatron_qad.engine.wandb_run import Guarded, WandbWriter, continue_wandb_run  # noqa: E402
from megatron_qad.report.event_files import read_events  # noqa: E402
from megatron_qad.report.scalars import read_scalars  # noqa: E402
from megatron_qad.training.callbacks.preemption import Preemption  # noqa: E402


@pytest.fixture
def disk(monkeypatch):
    """While disk["errno"] is set, every write to an event file writes half of its bytes and then raises that error."""
    failure, pwrite = {"errno": None}, os.pwrite

    def write(descriptor, data, offset):
        if failure["errno"] is None:
            return pwrite(descriptor, data, offset)
        pwrite(descriptor, data[: len(data) // 2], offset)
        raise OSError(failure["errno"], os.strerror(failure["errno"]))

    monkeypatch.setattr(os, "pwrite", write)
    return failure


def writer(directory, started_at=0):
    return JobWriter(str(directory), 1000, lambda: started_at)


def test_full_disk_is_reported_once_and_loses_nothing(tmp_path, disk, capfd):
    log = writer(tmp_path)
    for step in range(1, 41):
        disk["errno"] = errno.ENOSPC if 10 <= step < 20 or step > 30 else None
        log.add_scalar("kl loss", 1.0 / step, step)
        if step % 2 == 0:
            log.flush()
    out, err = capfd.readouterr()
    lines = [line for line in out.splitlines() if line]
    assert len(lines) == 3, lines
    full = f"megatron_qad: ERROR: TensorBoard in {tmp_path}: [Errno 28] No space left on device. The job continues."
    assert lines[0].startswith(full) and lines[2].startswith(full)
    assert "waiting events are written" in lines[1] and err == ""  # TensorBoard's thread would print a traceback
    disk["errno"] = None
    log.close()
    (file,) = tmp_path.iterdir()
    assert [step for step, _ in read_scalars(tmp_path)["kl loss"]] == list(range(1, 41))
    assert read_events([file], tmp_path).notes == []


def test_disk_is_full_at_start(tmp_path, disk, capfd):
    disk["errno"] = errno.EDQUOT
    log = writer(tmp_path / "tensorboard", started_at=7)
    log.add_text("seed", "1", global_step=0)
    log.add_scalar("kl loss", 0.5, 8)
    log.flush()
    disk["errno"] = errno.EIO
    log.flush()
    disk["errno"] = None
    log.add_scalar("kl loss", 0.25, 9)
    log.flush()
    assert capfd.readouterr().out.count("ERROR") == 2  # two kinds
    assert read_scalars(tmp_path / "tensorboard") == {"kl loss": [(8, 0.5), (9, 0.25)]}
    (events,) = read_events(list((tmp_path / "tensorboard").iterdir()), tmp_path).files
    assert events.start == (0, 7)


def test_directory_cannot_be_created(tmp_path, capfd):
    (tmp_path / "file").write_text("")
    log = writer(tmp_path / "file" / "tensorboard")
    log.add_scalar("kl loss", 0.5, 1)
    log.flush()
    log.add_scalar("kl loss", object(), 2)  # a value that TensorBoard's writer rejects
    log.close()
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 2 and all(line.startswith("megatron_qad: ERROR: TensorBoard in ") for line in lines)


def test_memory_of_waiting_events_is_bounded(tmp_path, disk, monkeypatch):
    monkeypatch.setattr(event_writer, "_MAX_WAITING_BYTES", 1000)
    disk["errno"] = errno.ENOSPC
    log = writer(tmp_path)
    for step in range(1, 101):
        log.add_scalar("kl loss", 1.0, step)
    log.flush()
    disk["errno"] = None
    log.close()
    steps = [step for step, _ in read_scalars(tmp_path)["kl loss"]]
    assert steps[-1] == 100 and 5 < len(steps) < 30


def test_removed_file_is_started_again(tmp_path, capfd):
    log = writer(tmp_path, started_at=3)
    log.add_scalar("kl loss", 1.0, 4)
    log.flush()
    next(tmp_path.iterdir()).unlink()
    log.add_scalar("kl loss", 2.0, 5)
    log.flush()
    log.flush()
    log.close()
    assert "No such file" in capfd.readouterr().out
    (events,) = read_events(list(tmp_path.iterdir()), tmp_path).files
    assert events.start == (0, 3) and events.scalars == {"kl loss": {5: 2.0}}


def test_each_start_has_a_number(tmp_path):
    for start in range(3):
        log = writer(tmp_path, started_at=10 * start)
        log.add_text("seed", "1")
        log.add_scalar("kl loss", 1.0, 10 * start + 1)
        log.close()
    files = read_events(list(tmp_path.iterdir()), tmp_path).files
    assert [events.start for events in files] == [(0, 0), (1, 10), (2, 20)]


def test_job_without_events_writes_no_file(tmp_path):
    writer(tmp_path / "tensorboard").close()
    assert not (tmp_path / "tensorboard").exists()


class Wandb(types.ModuleType):
    """A wandb module whose service has died."""

    def __init__(self):
        super().__init__("wandb")
        self.config = types.SimpleNamespace(update=self.log)
        self.run = types.SimpleNamespace(entity="us", log_artifact=self.log)
        self.Artifact = self.log

    def log(self, *args, **kwargs):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    def finish(self):
        raise RuntimeError("no\nservice")


def test_wandb_errors_are_not_raised(capfd, monkeypatch):
    module = Wandb()
    guarded = Guarded(module, FailureLog("wandb in here"))
    for _ in range(3):
        guarded.log({"kl loss": 1.0}, 1)
        guarded.config.update({"a": 1})
        guarded.run.log_artifact(guarded.Artifact("x", type="model"), aliases=[])
    guarded.finish()
    assert guarded.run.entity == "us" and guarded.nothing is None and bool(guarded)
    lines = capfd.readouterr().out.splitlines()
    assert lines[:2] == [
        "megatron_qad: ERROR: wandb in here: [Errno 32] Broken pipe. The job continues.",
        "megatron_qad: ERROR: wandb in here: no service. The job continues.",
    ]
    assert len(lines) == 3 and "nothing" in lines[2]
    # Megatron's timers check what kind of writer they have.
    monkeypatch.setattr("megatron.core.timers.wandb", module)
    logged = []
    module.log = lambda values, step: logged.append((values, step))
    timers = Timers(0, "max")
    monkeypatch.setattr(timers, "_get_global_min_max_time", lambda *args: {"forward": (0.5, 1.0)})
    timers.write(["forward"], guarded, 5)
    assert logged == [({"forward-time": 1.0}, 5)]
    writer = WandbWriter(module, FailureLog("wandb in here"), flush=lambda: None)
    timers.write(["forward"], writer, 5)  # MetricWriter has logged it
    writer.log_scalars(6, {"kl loss": 0.5})
    assert logged[1:] == [({"kl loss": 0.5}, 6)]


@pytest.fixture
def installed(monkeypatch):
    """``installed(save)``: install the loggers of a job with this ``--save``; undone at the end of the test."""
    for module, name in (
        (global_vars, "_set_tensorboard_writer"),
        (global_vars, "_set_wandb_writer"),
        (global_vars, "_GLOBAL_WANDB_WRITER"),
        (global_vars, "_GLOBAL_TENSORBOARD_WRITER"),
        (wandb_utils, "on_save_checkpoint_success"),
        (megatron_loop, "append_to_progress_log"),
        (checkpointing, "append_to_progress_log"),
    ):
        monkeypatch.setattr(module, name, getattr(module, name))

    def install(save: str):
        events = f"{save}/tensorboard"
        Loggers(save, events, save).install()
        wandb = {"wandb_project": "p", "wandb_exp_name": None, "wandb_save_dir": save, "wandb_entity": None}
        tensorboard = {"tensorboard_dir": events, "tensorboard_queue_size": 1000}
        return argparse.Namespace(save=save, **wandb, **tensorboard, rank=0, world_size=1)

    return install


def test_wandb_start_failure_is_reported(tmp_path, installed, monkeypatch, capfd):
    def init(**kwargs):
        raise RuntimeError("api_key not configured (no-tty)")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    args = installed(str(tmp_path))
    global_vars._set_wandb_writer(args)
    assert global_vars.get_wandb_writer() is None
    assert f"ERROR: wandb in {tmp_path}: api_key not configured" in capfd.readouterr().out


def test_all_trackers_get_the_same_scalars(tmp_path, installed, monkeypatch, capfd):
    """A real offline wandb run, a real event file and metrics.jsonl, over two starts of one job."""
    save = str(tmp_path / "run")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_RUN_ID", "5ca1ab1e")
    for first in (1, 3):
        args = installed(save)
        args.iteration = first - 1
        monkeypatch.setattr(global_vars, "_GLOBAL_TENSORBOARD_WRITER", None)
        monkeypatch.setattr(global_vars, "_GLOBAL_WANDB_WRITER", None)
        global_vars._set_tensorboard_writer(args)
        global_vars._set_wandb_writer(args)
        metrics, wandb = global_vars.get_tensorboard_writer(), global_vars.get_wandb_writer()
        for step in range(first, first + 3):
            metrics.add_scalar("kl loss", torch.tensor(1.0 / (first + step)), step)  # as Megatron logs a loss
            metrics.add_scalar("kl loss vs samples", 1.0, 64 * step)
            wandb.log({"samples vs steps": 64 * step}, step)
        metrics.add_scalar("grad-norm", float("inf"), step)
        wandb.finish()
    metrics.close()

    expected = [{"kl loss": 1 / (1 + step)} for step in (1, 2)] + [{"kl loss": 1 / (3 + step)} for step in (3, 4, 5)]
    assert read_scalars(save)["kl loss"] == [
        (i, pytest.approx(row["kl loss"], rel=1e-7))
        for i, row in enumerate(expected, 1)  # float32
    ]
    assert set(read_scalars(save)) == {"kl loss", "grad-norm"}
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 3, 4, 5] and all(row.pop("time") for row in rows)
    assert rows[-1] == {"step": 5, "kl loss": 0.125, "grad-norm": None}
    files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*-5ca1ab1e/*.wandb"))
    assert f"wandb sync {save}/wandb/offline-run-*-5ca1ab1e" in capfd.readouterr().out and len(files) == 2
    logged = [row for file in files for row in wandb_history(file)]
    assert [(row["_step"], {k: v for k, v in row.items() if k[0] != "_"}) for row in logged] == [
        (row["step"], {k: float("inf") if v is None else v for k, v in row.items() if k != "step"}) for row in rows
    ]


def wandb_history(file):
    """Yield the rows that an offline run will upload. The file is a LevelDB log: pieces of records in 32 KiB blocks."""
    data, place, record = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if (left := (1 << 15) - place % (1 << 15)) < 7:
            place += left
            continue
        size, kind = struct.unpack_from("<HB", data, place + 4)
        record += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (2, 3):  # the first piece or one in the middle
            continue
        parsed, record = wandb_internal_pb2.Record.FromString(record), b""
        if parsed.HasField("history"):
            yield {item.key or item.nested_key[0]: json.loads(item.value_json) for item in parsed.history.item}


def test_row_after_an_incomplete_one(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "kl lo')  # the job was killed while it wrote
    MetricsFile(file).append(1, {"kl loss": 0.5})
    assert json.loads(file.read_text().splitlines()[1])["kl loss"] == 0.5


def test_metrics_file_cannot_be_written(tmp_path, capfd):
    (tmp_path / "file").write_text("")
    metrics = MetricsFile(tmp_path / "file" / "metrics.jsonl")
    for step in (1, 2):
        metrics.append(step, {"kl loss": 0.5})
    assert capfd.readouterr().out.count("ERROR") == 1


def test_progress_log_errors_are_not_raised(tmp_path, installed, capfd):
    (tmp_path / "save").write_text("no directory")
    installed(f"{tmp_path}/save")
    for _ in range(2):
        megatron_loop.append_to_progress_log(f"{tmp_path}/save", "Starting job", barrier=False)
    assert capfd.readouterr().out.count("ERROR: the progress log in") == 1


def test_job_directory_cannot_be_written(tmp_path, capfd):
    (tmp_path / "file").write_text("")
    config = types.SimpleNamespace(job_dir=tmp_path / "file")
    args = types.SimpleNamespace(exit_signal_handler=True, exit_signal=signal.SIGTERM)
    preemption = Preemption(types.SimpleNamespace(config=config, args=args))
    for _ in range(2):
        preemption.step_ended(None)
    (said,) = [line for line in capfd.readouterr().out.splitlines() if "ERROR" in line]
    assert "Not a directory" in said and "treats a crash as one before the first step" in said
    # The batch script must see that the job is not done: by the file, or else by the status.
    assert Preemption.write_stopped(tmp_path / "file") == 75
    assert "has saved but is not done: status 75" in capfd.readouterr().out
    (tmp_path / "file").unlink()
    (tmp_path / "file").mkdir()
    assert Preemption.write_stopped(tmp_path / "file") is None
    assert (tmp_path / "file" / "stopped").exists()


def test_wandb_run_id_cannot_be_saved(tmp_path, monkeypatch, capfd):
    for name in ("RANK", "WORLD_SIZE", "WANDB_RUN_ID", "WANDB_RESUME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_RESUME", "allow")
    (tmp_path / "save").write_text("no directory")
    continue_wandb_run("p", f"{tmp_path}/save", os.environ)
    assert len(os.environ.pop("WANDB_RUN_ID")) == 8 and "a new wandb run" in capfd.readouterr().out
    (tmp_path / "wandb_run_id.txt").write_text("")  # as after a full disk
    continue_wandb_run("p", str(tmp_path), os.environ)
    assert os.environ.pop("WANDB_RUN_ID") == (tmp_path / "wandb_run_id.txt").read_text() != ""


def test_heartbeats_cannot_be_written(tmp_path, capfd):
    (tmp_path / "file").write_text("")
    Heartbeat().start(tmp_path / "file" / "heartbeats", 0, 1, 1e9)
    assert "ERROR: heartbeats in" in capfd.readouterr().out
