"""Fixtures: the SLURM cluster, a tiny job, and an uninterrupted run of it that every other run must equal."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cluster import Cluster, Unavailable
from place import ROOT, TRAIN, Place, megatron

sys.path += [str(ROOT / "tests" / "dist")]

import tiny_job  # noqa: E402


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        cluster.up()
    except Unavailable as reason:
        pytest.skip(f"no SLURM here: {reason}")
    except BaseException:
        cluster.down()
        raise
    yield cluster
    cluster.down()


@pytest.fixture(scope="session")
def place(tmp_path_factory, cluster) -> Place:
    directory = tmp_path_factory.mktemp("jobs")
    with megatron():
        import torch

        from megatron_qad.checkpoint.import_hf import import_hf

        for role, noise in (("teacher", 0.0), ("student", 0.3)):
            hf = tiny_job.write_hf(directory / f"hf_{role}", tiny_job.LLAMA | {"dtype": "bfloat16"}, noise=noise)
            import_hf(hf, directory / role, torch.bfloat16)
    tiny_job.write_data(directory / "data", vocab_size=tiny_job.LLAMA["vocab_size"])
    (directory / "train.yaml").write_text(TRAIN)
    return Place(directory, cluster)


@pytest.fixture(scope="session")
def uninterrupted(place) -> tuple[Path, list[str]]:
    """The job started by torchrun.sh on both nodes, and the addresses on which its nodes listened."""
    import runs

    nodes, logs, listening = (place.cluster.n1, place.cluster.n2), [], set()
    processes = []
    for rank, node in enumerate(nodes):
        launch = {
            "NNODES": "2",
            "NODE_RANK": str(rank),
            "MASTER_ADDR": place.cluster.addresses[nodes[0]],
            "QAD_INTERFACE": "eth0",
        }
        logs.append(place.log(f"torchrun{rank}"))
        command = place.cluster.command(node, f"{ROOT}/launch/torchrun.sh", *place.arguments("uninterrupted"))
        with open(logs[-1], "w") as log:
            environment = {**os.environ, **place.environment(**launch)}
            process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
            processes.append(process)
    while any(process.poll() is None for process in processes):
        if runs.iteration(logs[1]):
            for node in nodes:
                sockets = place.cluster.run(node, "ss", "-Hltn").splitlines()
                listening |= {line.split()[3] for line in sockets} - {"0.0.0.0:6818"}  # slurmd's own
        time.sleep(0.5)
    codes = [process.returncode for process in processes]
    assert codes == [0, 0], "\n".join(log.read_text()[-5000:] for log in logs)
    return place.directory / "uninterrupted", sorted(listening)


@pytest.fixture
def assert_uninterrupted(uninterrupted):
    """Check that a run's history and last checkpoint equal those of the uninterrupted run, bit for bit."""

    import runs
    import torch

    def compare(run):
        expected = runs.history(uninterrupted[0])
        assert runs.history(run) == expected
        assert len(expected["kl loss"]) == 24
        tensors, expected_tensors = runs.tensors(run), runs.tensors(uninterrupted[0])
        assert tensors.keys() == expected_tensors.keys()
        assert {name.split(".")[0] for name in tensors} >= {"decoder", "optimizer"}, sorted(tensors)[:20]
        assert all(torch.equal(tensors[name], expected_tensors[name]) for name in tensors)

    return compare
