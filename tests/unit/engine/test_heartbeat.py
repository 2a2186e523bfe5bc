"""The heartbeat ends a process that hangs, but not one that loads or saves for long."""

import multiprocessing
import sys
import time

import pytest

from megatron_qad.engine.heartbeat import Heartbeat


@pytest.fixture
def after(tmp_path):
    """``after(beats)``: exit status and output of a process that executes ``beats`` and then does nothing for more than
    three times the limit of 0.4 s."""

    def run(beats: str) -> tuple[int, str]:
        process = multiprocessing.get_context("fork").Process(target=_beat, args=(beats, tmp_path / "output"))
        process.start()
        process.join(60)
        return process.exitcode, (tmp_path / "output").read_text()

    return run


def _beat(beats: str, output) -> None:
    sys.stdout = sys.stderr = open(output, "w", buffering=1)
    names = {"time": time, "num_passes": 0}
    names["heartbeat"] = heartbeat = Heartbeat(passes=lambda: names["num_passes"])
    heartbeat.start(None, 0, 1, 0.4)
    exec(beats, names)
    time.sleep(1.5)
    print("alive")


def test_start_and_loading_may_take_longer(after):
    assert after("time.sleep(1.5); heartbeat.beat('loading the teacher', is_long=True)") == (0, "alive\n")


def test_phase_after_a_long_one_has_the_short_limit(after):
    code, text = after("heartbeat.beat('save', is_long=True); time.sleep(1); heartbeat.beat('update', 3)")
    assert code == 1 and "error: no progress for" in text and "in step 3, update" in text


def test_stopped_heartbeat_does_not_watch(after):
    assert after("heartbeat.beat('teacher', 1); heartbeat.stop()") == (0, "alive\n")


def test_long_phase_has_a_limit(after):
    before = time.monotonic()
    code, text = after("heartbeat.beat('save', is_long=True); time.sleep(20)")
    assert code == 1 and "in step 0, save" in text and time.monotonic() - before > 4


def test_microbatches_count_as_progress(after):
    moving = "for num_passes in range(1, 16): time.sleep(0.1)"
    hanging = "time.sleep(1.5)"
    for activity, expected in ((moving, 0), (hanging, 1)):
        code, _ = after(f"heartbeat.beat('teacher', 1)\n{activity}\nheartbeat.beat('save', is_long=True)")
        assert code == expected
