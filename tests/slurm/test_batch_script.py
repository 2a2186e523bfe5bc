"""launch/slurm.sbatch handles signals, crashes and node failures, tested with a program that starts fast."""

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
    """A running job: its ID, its log, a function that waits for its n-th start, and the file that makes it crash."""
    name = request.node.name
    crash = place.directory / f"{name}.crash"
    environment = {"NPROC_PER_NODE": "1", "QAD_MAX_CRASHES": "1"}
    job_id = place.submit(name, "launch/slurm.sbatch", "tests/slurm/stoppable.py", str(crash), **environment)
    log = place.log(name)

    def wait_for_start(n: int):
        is_there = lambda _: log.is_file() and log.read_text().count("running\n") == 2 * n  # noqa: E731
        assert place.cluster.wait(job_id, is_there, 300, log)["Restarts"] == str(n - 1)

    wait_for_start(1)
    yield job_id, log, wait_for_start, crash
    place.cluster.slurm("scancel", job_id)
    place.cluster.wait(job_id, lambda state: state["JobState"] in ("CANCELLED", "FAILED"), 60)


def test_job_restarts_until_it_is_cancelled(place, job):
    """First the ranks get signals and the script does not, then the script's node fails, then the user cancels."""
    job_id, log, wait_for_start, _ = job
    for start, name in ((2, "TERM"), (3, "USR1")):
        place.cluster.slurm("scancel", f"--signal={name}", job_id)
        wait_for_start(start)
    place.cluster.kill(place.cluster.n1)
    wait_for_start(4)  # on the other two
    place.cluster.start_node(place.cluster.n1)
    place.cluster.slurm("scancel", job_id)
    place.cluster.wait(job_id, lambda state: state["JobState"] == "CANCELLED", 60, log)
    time.sleep(8)  # longer than the delay of a requeued job on this cluster (cred_expire)
    assert place.cluster.state(job_id)["JobState"] == "CANCELLED"


def test_crashes_are_counted(place, job):
    job_id, log, wait_for_start, crash = job
    text = log.read_text()
    # Two were requested; by default this cluster binds a task to one.
    assert text.count(" cores\n") == 2 and "on 1 cores" not in text, text
    crash.touch()
    place.cluster.wait(job_id, lambda state: state["JobState"] == "PENDING", 300, log)
    # srun's status is the highest of its tasks: 1 from the crash, or 255 if the other node's torchrun was killed first.
    assert re.search("crash 1, with status (1|255), after training had begun; job", log.read_text())
    place.cluster.wait(job_id, lambda state: state["JobState"] == "FAILED", 300)
    assert "crash 2, more than QAD_MAX_CRASHES" in log.read_text()


@pytest.fixture
def stop(place, request, tmp_path):
    """Run a job under a controller that fails the first ``num_failures`` queries, request a stop, and wait for
    ``state``. Returns the job's state and log."""

    def run(num_failures: int, state: str):
        name = request.node.name
        (tmp_path / "squeue").write_text(SQUEUE.format(tmp_path / "asked", num_failures, shutil.which("squeue")))
        (tmp_path / "squeue").chmod(0o755)
        environment = {"NPROC_PER_NODE": "1", "PATH": f"{tmp_path}:{place.environment()['PATH']}"}
        command = ("launch/slurm.sbatch", "tests/slurm/stoppable.py", "/no/crash")
        job_id, log = place.submit(name, *command, **environment), place.log(name)

        def cancel():
            place.cluster.slurm("scancel", job_id)
            # If the job is cancelled in the queue, no script runs that would remove the small files.
            shutil.rmtree(place.directory / f".qad-job-{job_id}", ignore_errors=True)

        request.addfinalizer(cancel)
        place.cluster.wait(job_id, lambda _: log.is_file() and log.read_text().count("running\n") == 2, 300, log)
        place.cluster.slurm("scancel", "--signal=TERM", job_id)
        return place.cluster.wait(job_id, lambda current: current["JobState"] == state, 60, log), log.read_text()

    return run


def test_failed_controller_query_is_repeated(stop):
    _, text = stop(num_failures=2, state="PENDING")
    assert "saved before the job was done; job" in text and "is queued again" in text


def test_unfinished_job_fails_if_it_cannot_be_requeued(stop):
    """Otherwise a dependent export would use a half-trained model."""
    state, text = stop(num_failures=99, state="FAILED")
    assert state["ExitCode"] == "75:0" and "SLURM says that job" in text and "is gone" in text
    assert "the job is not done: status 75; submit it again" in text


def test_more_processes_than_cores_are_refused(place):
    """As on shared nodes, where a job gets one core by default."""
    job_id = place.submit("cores", "launch/slurm.sbatch", "tests/slurm/stoppable.py", "/no/crash", NPROC_PER_NODE="3")
    state = place.cluster.wait(job_id, lambda state: state["JobState"] == "FAILED", 60, place.log("cores"))
    text = place.log("cores").read_text()
    assert state["ExitCode"] == "2:0" and "error: 3 processes on each node, but this job has 2 cores on it" in text


def test_only_the_stopped_array_task_restarts(place):
    """Tests the last task, whose SLURM_JOB_ID is the ID of the array."""
    name = "array"
    options = ("--array=0-1", f"--output={place.directory}/{name}-%a.log")
    command = ("launch/slurm.sbatch", "tests/slurm/stoppable.py", "/no/crash")
    job_id = place.submit(name, *command, options=options, NPROC_PER_NODE="1")
    logs = [place.log(f"{name}-{task}") for task in (0, 1)]

    def wait_for_starts(task: int, n: int):
        is_there = lambda _: logs[task].is_file() and logs[task].read_text().count("running\n") == 2 * n  # noqa: E731
        return place.cluster.wait(f"{job_id}_{task}", is_there, 120, logs[task])

    try:
        states = [wait_for_starts(task, 1) for task in (0, 1)]
        assert states[1]["JobId"] == job_id, "this is not the task whose ID is the array's"
        place.cluster.slurm("scancel", "--signal=TERM", f"{job_id}_1")
        assert wait_for_starts(1, 2)["Restarts"] == "1"
        assert f"job {job_id}_1 is queued again" in logs[1].read_text()
        assert wait_for_starts(0, 1)["Restarts"] == "0"
    finally:
        place.cluster.slurm("scancel", job_id)
        # On a busy machine SLURM kills the scripts before they remove the small files. The tasks have two job IDs.
        for job in (int(job_id), int(job_id) + 1):
            shutil.rmtree(place.directory / f".qad-job-{job}", ignore_errors=True)
