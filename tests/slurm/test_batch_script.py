"""What launch/slurm.sbatch makes of signals, crashes and deaths, with a program that starts in no time."""

import time

import pytest


@pytest.fixture
def job(place, request):
    """A running job: its number, log, and a wait for its n-th start."""
    name = request.node.name
    crash = place.directory / f"{name}.crash"
    environment = {"NPROC_PER_NODE": "1", "QAD_MAX_CRASHES": "1"}
    number = place.submit(name, "launch/slurm.sbatch", "tests/slurm/stoppable.py", str(crash), **environment)
    log = place.log(name)

    def wait_for_start(n: int):
        is_there = lambda _: log.is_file() and log.read_text().count("running\n") == 2 * n  # noqa: E731
        assert place.cluster.wait(number, is_there, 300, log)["Restarts"] == str(n - 1)

    wait_for_start(1)
    yield number, log, wait_for_start, crash
    place.cluster.slurm("scancel", number)
    place.cluster.wait(number, lambda state: state["JobState"] in ("CANCELLED", "FAILED"), 60)


def test_a_job_comes_back_until_it_is_cancelled(place, job):
    """The ranks are signalled and not the script; then the node of the script dies; then the user has enough."""
    number, log, wait_for_start, _ = job
    for start, name in ((2, "TERM"), (3, "USR1")):
        place.cluster.slurm("scancel", f"--signal={name}", number)
        wait_for_start(start)
    place.cluster.kill(place.cluster.n1)
    wait_for_start(4)  # on the other two
    place.cluster.start_node(place.cluster.n1)
    place.cluster.slurm("scancel", number)
    place.cluster.wait(number, lambda state: state["JobState"] == "CANCELLED", 60, log)
    time.sleep(8)  # longer than a job that is queued again waits here (cred_expire)
    assert place.cluster.state(number)["JobState"] == "CANCELLED"


def test_crashes_are_counted(place, job):
    number, log, wait_for_start, crash = job
    crash.touch()
    place.cluster.wait(number, lambda state: state["JobState"] == "PENDING", 300, log)
    assert "crash 1, with status 1, after training had begun; job" in log.read_text()
    place.cluster.wait(number, lambda state: state["JobState"] == "FAILED", 300)
    assert "crash 2, more than QAD_MAX_CRASHES" in log.read_text()
