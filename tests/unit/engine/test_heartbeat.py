"""What a rank may take its time for: a hang ends its process, a long load or save does not."""

import subprocess
import sys
import time

CODE = """
import sys, time
from megatron_qad.engine.heartbeat import Heartbeat

num_passes = 0
heartbeat = Heartbeat(passes=lambda: num_passes)
heartbeat.start(None, 0, 1, 0.4)
exec(sys.argv[1])
time.sleep(1.5)
print("alive")
"""


def after(beats: str) -> tuple[int, str]:
    """A process that does ``beats`` and then nothing for more than three times the limit of 0.4 s."""
    done = subprocess.run([sys.executable, "-c", CODE, beats], capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout + done.stderr


def test_the_start_and_loading_may_take_longer():
    assert after("time.sleep(1.5); heartbeat.beat('loading the teacher', is_long=True)") == (0, "alive\n")


def test_what_follows_a_long_phase_may_not():
    code, text = after("heartbeat.beat('save', is_long=True); time.sleep(1); heartbeat.beat('update', 3)")
    assert code == 1 and "error: no progress for" in text and "in step 3, update" in text


def test_a_job_that_is_over_is_not_watched():
    assert after("heartbeat.beat('teacher', 1); heartbeat.stop()") == (0, "alive\n")


def test_a_long_phase_has_an_end():
    before = time.monotonic()
    code, text = after("heartbeat.beat('save', is_long=True); time.sleep(20)")
    assert code == 1 and "in step 0, save" in text and time.monotonic() - before > 4


def test_microbatches_are_progress():
    moving = "for num_passes in range(1, 16): time.sleep(0.1)"
    still = "time.sleep(1.5)"
    for meanwhile, code in ((moving, 0), (still, 1)):
        found, _ = after(f"heartbeat.beat('teacher', 1)\n{meanwhile}\nheartbeat.beat('save', is_long=True)")
        assert found == code
