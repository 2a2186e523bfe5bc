"""Readers of a run directory with a damaged file stop with one error or give the result of the undamaged directory."""

import random
import shutil
from pathlib import Path

import pytest
import tiny_job
from fork_server import ForkServer

FLAGS = (
    "--seq-length 32 --micro-batch-size 2 --global-batch-size 8 --train-iters 8 --lr 1e-3 --min-lr "
    "1e-4 --split 80,20,0 --eval-interval 2 --eval-iters 1 --log-interval 1 --qad-calibration-samples 8 --bf16 "
    "--save-interval 2 --use-distributed-optimizer --tensorboard-log-interval 1"
).split()
KINDS = ("one bit", "truncate", "zero", "delete", "swap")


def damage(file: Path, kind: str, other: Path, seed: str) -> None:
    content = bytearray(file.read_bytes())
    choose = random.Random(seed)
    if kind == "delete":
        file.unlink()
    elif kind == "swap":
        file.write_bytes(other.read_bytes())
        other.write_bytes(content)
    elif kind == "truncate":
        file.write_bytes(content[: choose.randrange(len(content))] if content else content)
    elif kind == "zero":
        file.write_bytes(bytes(len(content)))
    else:
        content[choose.randrange(len(content))] ^= 1 << choose.randrange(8)
        file.write_bytes(content)


class Workspace:
    def __init__(self, directory: Path, server: ForkServer):
        self.directory, self.server = directory, server
        self.run, self.pristine = directory / "run", directory / "pristine"
        self.names = sorted(
            str(path.relative_to(self.pristine)) for path in self.pristine.rglob("*") if self._is_read(path)
        )

    def _is_read(self, path: Path) -> bool:
        """Whether to damage a file: of the checkpoints only the newest, because all are alike."""
        return path.is_file() and (path.parent.name == "iter_0000006" or not path.parent.name.startswith("iter_"))

    def argv(self) -> list[str]:
        d = self.directory
        models = ["--qad-teacher", f"{d}/teacher", "--qad-student", f"{d}/student"]
        data = ["--data-path", f"{d}/data", "--data-cache-path", f"{d}/cache", *tiny_job.READ_HERE]
        return [*models, *data, *FLAGS, "--save", str(self.run), "--tensorboard-dir", f"{self.run}/tensorboard"]

    def make_damaged_run(self, name: str, kind: str) -> None:
        """Make ``run`` a copy of the pristine directory with this damage."""
        shutil.rmtree(self.run, ignore_errors=True)
        shutil.copytree(self.pristine, self.run)
        choose = random.Random(f"{name} {kind}")
        other = choose.choice([n for n in self.names if n != name])
        damage(self.run / name, kind, self.run / other, f"{name} {kind}")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, server):
    directory = tmp_path_factory.mktemp("damage")
    for role, noise in (("teacher", 0.0), ("student", 0.3)):
        tiny_job.write_hf(directory / f"hf_{role}", tiny_job.LLAMA | {"dtype": "bfloat16"}, noise=noise)
    tiny_job.write_data(directory / "data", vocab_size=tiny_job.LLAMA["vocab_size"])
    models = [(f"{directory}/hf_{role}", f"{directory}/{role}", "bfloat16") for role in ("teacher", "student")]
    server.run("training_jobs:import_checkpoints", 1, {"models": models})
    (directory / "pristine").mkdir()
    workspace = Workspace(directory, server)
    server.run("training_jobs:train", 1, {"argv": [*workspace.argv(), "--exit-interval", "6"]})
    (workspace.run / "qad.lock").unlink()  # ranks of the fork server end without Python's exit
    workspace.run.rename(workspace.pristine)
    return Workspace(directory, server)


def test_list_of_files_is_complete(workspace):
    """Fails if a job writes a new file: add it here, and the other tests will damage it, too."""
    names = {name for name in workspace.names if "tfevents" not in name}
    in_checkpoint = (".metadata", "__0_0.distcp", "metadata.json", "integrity.json", "qad.json")
    assert names == {
        *(f"iter_0000006/{name}" for name in (*in_checkpoint, "best_checkpoints.json", "event_files.json")),
        *("hf/config.json", "hf/integrity.json", "heartbeats/rank_00000.json", "latest_checkpointed_iteration.txt"),
        *("qad.json", "best_checkpoints.json", "megatron.log", "metrics.jsonl"),
    }
    assert len(workspace.names) == len(names) + 1


def test_readers_stop_or_give_right_results(workspace):
    """The readers are exports of the newest and of the best checkpoint, and the run report."""
    cases = [[name, kind] for name in workspace.names for kind in KINDS]
    arguments = {"directory": str(workspace.directory), "cases": cases}
    output = workspace.server.run("damage_jobs:read_all", 1, arguments, timeout=600)
    assert f"{3 * len(cases)} readings" in output and "Traceback" not in output
    wrong = [line for line in output.splitlines() if line.startswith("WRONG")]
    assert not wrong, "\n".join(wrong)


def resume(workspace) -> tuple[str, str]:
    """Resume the run; return the digest of its end and the export of its best iteration, or ("error", message)."""
    output = workspace.server.run("training_jobs:train", 1, {"argv": workspace.argv()}, fails=None)
    assert "Traceback" not in output, output[-6000:]
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    if errors:
        return "error", errors[0]
    output = workspace.server.run("surviving_jobs:digest", 1, {"directory": str(workspace.run / "iter_0000008")})
    weights = next(line for line in output.splitlines() if line.startswith("digest"))
    outputs = {"modelopt": str(workspace.directory / "best")}
    shutil.rmtree(workspace.directory / "best", ignore_errors=True)
    arguments = {"checkpoint": str(workspace.run), "outputs": outputs, "iteration": "best"}
    workspace.server.run("training_jobs:export_checkpoint", 1, arguments)
    return weights, (workspace.directory / "best" / "model.safetensors").read_bytes().hex()


def check_resumes(workspace, cases) -> None:
    shutil.rmtree(workspace.run, ignore_errors=True)
    shutil.copytree(workspace.pristine, workspace.run)
    expected = resume(workspace)
    assert expected[0] != "error"
    num_stopped = 0
    for name, kind in cases:
        workspace.make_damaged_run(name, kind)
        outcome = resume(workspace)
        num_stopped += outcome[0] == "error"
        assert outcome == expected or outcome[0] == "error", (name, kind)
    assert 0 < num_stopped < len(cases)


def test_job_stops_or_resumes_correctly(workspace):
    cases = [(name, random.Random(name).choice(KINDS)) for name in workspace.names]
    check_resumes(workspace, cases)


@pytest.mark.all
def test_job_stops_or_resumes_correctly_after_every_damage(workspace):
    check_resumes(workspace, [(name, kind) for name in workspace.names for kind in KINDS])
