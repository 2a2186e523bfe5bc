"""One task of srun for each rank, without torchrun: numbers, stops, crashes and GPUs as with one agent on each node."""

import psutil
import pytest
import runs
from place import ROOT

TASKS = ("--ntasks-per-node=2", "--cpus-per-task=1")


def listening(cluster) -> list[str]:
    """Return the addresses on which the nodes listen, without those of SLURM."""
    sockets = [line for node in (cluster.n1, cluster.n2) for line in cluster.run(node, "ss", "-Hltnp").splitlines()]
    return [line.split()[3] for line in sockets if '"slurm' not in line and '"srun' not in line]


def test_preempted_tasks_equal_torchruns_ranks(place, assert_uninterrupted):
    """The tasks get SIGTERM and the batch script SIGUSR1; the resumed job ends with the numbers of torchrun's job."""
    log, cluster = place.log("srun"), place.cluster
    command = ("launch/slurm.sbatch", *place.arguments("srun"))
    job = place.submit("srun", *command, options=TASKS, QAD_INTERFACE="eth0")
    cluster.wait(job, lambda _: log.is_file() and runs.iteration(log) >= 1, 300, log)
    addresses = listening(cluster)
    urgent = place.submit("urgent_srun", "--wrap=true", options=("--partition=urgent", "--nodes=3", "--exclusive"))
    cluster.wait(urgent, lambda state: state["JobState"] == "COMPLETED", 300, log)
    assert 1 <= runs.iteration(log) < 24, "the job was not stopped during training"
    state = cluster.wait(job, lambda state: state["JobState"] == "COMPLETED", 300, log)
    text = log.read_text()
    assert state["Restarts"] == "1" and "slurm.sbatch: stop requested" in text and "saved before the job" in text
    assert_uninterrupted(place.directory / "srun")
    # The store, and gloo's pairs of ranks.
    exposed = [address for address in addresses if not address.startswith(("10.231.77.", "127."))]
    assert len(addresses) >= 2 and not exposed, f"open to every network: {exposed} of {addresses}"


@pytest.fixture
def tasks(place, request):
    """A running job of four tasks: its ID, its log and its processes by rank."""
    name = request.node.name
    command = ("launch/slurm.sbatch", "tests/slurm/stoppable.py", f"/no/{name}")
    job, log = place.submit(name, *command, options=TASKS, QAD_MAX_CRASHES="0"), place.log(name)
    place.cluster.wait(job, lambda _: log.is_file() and log.read_text().count("running\n") == 4, 60, log)
    processes = [p for p in psutil.process_iter(["cmdline"]) if (p.info["cmdline"] or [])[1:] == list(command[1:])]
    yield job, log, {int(process.environ()["RANK"]): process for process in processes}
    place.cluster.slurm("scancel", job)


def test_killed_task_ends_the_job(place, tasks):
    job, log, processes = tasks
    assert sorted(processes) == [0, 1, 2, 3]
    assert "on 1 cores" not in log.read_text()  # each task may use the cores of all tasks on its node
    processes[3].kill()
    place.cluster.wait(job, lambda state: state["JobState"] == "FAILED", 20, log)  # measured: 2 s
    assert "task 3: Killed" in log.read_text() and "ended with status 137" in log.read_text()
    assert not any(process.is_running() for process in processes.values())


def test_tasks_end_with_slurmstepd(tasks):
    """Otherwise they would keep their GPUs although SLURM no longer knows them."""
    _, _, processes = tasks
    processes[3].parent().kill()
    _, alive = psutil.wait_procs([processes[2], processes[3]], timeout=10)
    assert not alive


def srun(place, *options: str, nodelist: str | None = None) -> str:
    """Run two tasks on each of two nodes, and return what they print, in the order of the ranks."""
    nodes = ("--nodes=2", "--ntasks-per-node=2", f"--chdir={ROOT}", f"--nodelist={place.cluster.n1},{place.cluster.n2}")
    renamed = ("env", f"SLURM_STEP_NODELIST={nodelist}") if nodelist else ()
    command = (*nodes, *options, *renamed, "launch/srun.sh", "tests/slurm/task_variables.py")
    # SLURM sets CUDA_VISIBLE_DEVICES for tasks with GPUs.
    environment = {"PATH": place.environment()["PATH"], "CUDA_VISIBLE_DEVICES": ""}
    lines = place.cluster.slurm("srun", *command, environment=environment)
    return "\n".join(sorted(lines.splitlines())).replace(place.cluster.n1, "n1")


@pytest.mark.parametrize(
    "options, gpus",
    [
        ((), ("0 of none", "1 of none")),
        (("--gpus-per-node=2",), ("0 of 0,1", "1 of 0,1")),
        (("--gpus-per-task=1",), ("0 of 0", "0 of 1")),
    ],
    ids=["none", "all", "one"],
)
def test_each_task_has_its_gpu(place, options, gpus):
    """The GPUs are device files that SLURM gives to tasks."""
    local = [gpu.split(" of ") for gpu in gpus]
    expected = [
        f"n{node + 1} {2 * node + task} 4 {local[task][0]} 2 n1 of {local[task][1]}"
        for node in (0, 1)
        for task in (0, 1)
    ]
    assert srun(place, *options).splitlines() == expected


def test_first_node_of_a_list_in_brackets(place):
    """SLURM does not shorten the list of this cluster's nodes, whose names end in the same number."""
    lines = srun(place, nodelist="10.231.77.[11-12]").splitlines()
    assert len(lines) == 4 and all(" 10.231.77.11 " in line for line in lines), lines


@pytest.mark.parametrize(
    "options, message",
    [
        (("--gpus-per-node=1",), "2 tasks on this node, but it has 1 GPUs for them, and this task sees 1."),
        (("--distribution=cyclic",), "SLURM_PROCID=1: expected 2 for task 0 of node 1, because tensor parallelism"),
        (("--ntasks=3",), "SLURM_STEP_TASKS_PER_NODE=2,1: expected equally many tasks on each node."),
    ],
    ids=["one GPU", "cyclic", "uneven"],
)
def test_tasks_that_cannot_be_ranks_are_refused(place, options, message):
    with pytest.raises(AssertionError) as error:
        srun(place, "--kill-on-bad-exit=1", *options)
    assert f"error: {message}" in str(error.value)
