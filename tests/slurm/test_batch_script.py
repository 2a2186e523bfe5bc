"""What launch/slurm.sbatch makes of signals, crashes and deaths, with a program that starts in no time."""

import re
import shutil
import time

import pytest

SQUEUE = """#!/bin/sh
echo asked >>{0}
[ "$(wc -l <{0})" -gt {1} ] && exec {2} "$@"
echo "slurm_load_jobs error: Unable to contact slurm controller" >&2
exit 1
"""


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
    text = log.read_text()
    # Two were asked for; this cluster binds a task to one by itself.
    assert text.count(" cores\n") == 2 and "on 1 cores" not in text, text
    crash.touch()
    place.cluster.wait(number, lambda state: state["JobState"] == "PENDING", 300, log)
    # srun's status is its tasks' highest: the crash's 1, or 255 where the other node's torchrun was killed in time.
    assert re.search("crash 1, with status (1|255), after training had begun; job", log.read_text())
    place.cluster.wait(number, lambda state: state["JobState"] == "FAILED", 300)
    assert "crash 2, more than QAD_MAX_CRASHES" in log.read_text()


@pytest.fixture
def stop(place, request, tmp_path):
    """Run a job under a controller that does not answer its first ``num_failures`` questions, ask it to stop, and wait
    for ``state``; its number and log."""

    def run(num_failures: int, state: str):
        name = request.node.name
        (tmp_path / "squeue").write_text(SQUEUE.format(tmp_path / "asked", num_failures, shutil.which("squeue")))
        (tmp_path / "squeue").chmod(0o755)
        environment = {"NPROC_PER_NODE": "1", "PATH": f"{tmp_path}:{place.environment()['PATH']}"}
        command = ("launch/slurm.sbatch", "tests/slurm/stoppable.py", "/no/crash")
        number, log = place.submit(name, *command, **environment), place.log(name)

        def cancel():
            place.cluster.slurm("scancel", number)
            # Of a job that is cancelled in the queue no script is there to remove the small files.
            shutil.rmtree(place.directory / f".qad-job-{number}", ignore_errors=True)

        request.addfinalizer(cancel)
        place.cluster.wait(number, lambda _: log.is_file() and log.read_text().count("running\n") == 2, 300, log)
        place.cluster.slurm("scancel", "--signal=TERM", number)
        return place.cluster.wait(number, lambda found: found["JobState"] == state, 60, log), log.read_text()

    return run


def test_a_controller_that_answers_late_is_asked_again(stop):
    _, text = stop(num_failures=2, state="PENDING")
    assert "saved before the job was done; job" in text and "is queued again" in text


def test_an_unfinished_job_that_is_not_queued_again_does_not_end_well(stop):
    """Or the export that waits for it would take a half-trained model."""
    state, text = stop(num_failures=99, state="FAILED")
    assert state["ExitCode"] == "75:0" and "SLURM says that job" in text and "is gone" in text
    assert "the job is not done: status 75; submit it again" in text


def test_more_processes_than_cores_are_refused(place):
    """As on shared nodes, where a job that asks for nothing gets one core."""
    number = place.submit("cores", "launch/slurm.sbatch", "tests/slurm/stoppable.py", "/no/crash", NPROC_PER_NODE="3")
    state = place.cluster.wait(number, lambda state: state["JobState"] == "FAILED", 60, place.log("cores"))
    text = place.log("cores").read_text()
    assert state["ExitCode"] == "2:0" and "error: 3 processes on each node, which gave this job 2 of its cores" in text


def test_a_task_of_an_array_comes_back_alone(place):
    """The last task, whose SLURM_JOB_ID is the array's."""
    name = "array"
    options = ("--array=0-1", f"--output={place.directory}/{name}-%a.log")
    command = ("launch/slurm.sbatch", "tests/slurm/stoppable.py", "/no/crash")
    number = place.submit(name, *command, options=options, NPROC_PER_NODE="1")
    logs = [place.log(f"{name}-{task}") for task in (0, 1)]

    def wait_for_starts(task: int, n: int):
        there = lambda _: logs[task].is_file() and logs[task].read_text().count("running\n") == 2 * n  # noqa: E731
        return place.cluster.wait(f"{number}_{task}", there, 120, logs[task])

    try:
        states = [wait_for_starts(task, 1) for task in (0, 1)]
        assert states[1]["JobId"] == number, "the task that this test is about is another one"
        place.cluster.slurm("scancel", "--signal=TERM", f"{number}_1")
        assert wait_for_starts(1, 2)["Restarts"] == "1"
        assert f"job {number}_1 is queued again" in logs[1].read_text()
        assert wait_for_starts(0, 1)["Restarts"] == "0"
    finally:
        place.cluster.slurm("scancel", number)
        # A busy machine's SLURM kills the scripts before they have removed the small files. The tasks have two job IDs.
        for job in (int(number), int(number) + 1):
            shutil.rmtree(place.directory / f".qad-job-{job}", ignore_errors=True)
