"""Any file of a run's directory may be damaged: what reads it then stops with one error, or gives what the undamaged
directory gives. Never a traceback, never another result."""

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


class Shop:
    def __init__(self, directory: Path, server: ForkServer):
        self.directory, self.server = directory, server
        self.run, self.pristine = directory / "run", directory / "pristine"
        self.names = sorted(
            str(path.relative_to(self.pristine)) for path in self.pristine.rglob("*") if self._is_read(path)
        )

    def _is_read(self, path: Path) -> bool:
        """Of the checkpoints only the newest, as all are alike."""
        return path.is_file() and (path.parent.name == "iter_0000006" or not path.parent.name.startswith("iter_"))

    def argv(self) -> list[str]:
        d = self.directory
        models = ["--qad-teacher", f"{d}/teacher", "--qad-student", f"{d}/student"]
        data = ["--data-path", f"{d}/data", "--data-cache-path", f"{d}/cache", *tiny_job.READ_HERE]
        return [*models, *data, *FLAGS, "--save", str(self.run), "--tensorboard-dir", f"{self.run}/tensorboard"]

    def damaged(self, name: str, kind: str) -> None:
        """``run`` becomes the pristine directory with this damage."""
        shutil.rmtree(self.run, ignore_errors=True)
        shutil.copytree(self.pristine, self.run)
        choose = random.Random(f"{name} {kind}")
        other = choose.choice([n for n in self.names if n != name])
        damage(self.run / name, kind, self.run / other, f"{name} {kind}")


@pytest.fixture(scope="module")
def shop(tmp_path_factory, server):
    directory = tmp_path_factory.mktemp("damage")
    for who, noise in (("teacher", 0.0), ("student", 0.3)):
        tiny_job.write_hf(directory / f"hf_{who}", tiny_job.LLAMA | {"dtype": "bfloat16"}, noise=noise)
    tiny_job.write_data(directory / "data", vocab_size=tiny_job.LLAMA["vocab_size"])
    models = [(f"{directory}/hf_{who}", f"{directory}/{who}", "bfloat16") for who in ("teacher", "student")]
    server.run("training_jobs:import_checkpoints", 1, {"models": models})
    (directory / "pristine").mkdir()
    shop = Shop(directory, server)
    server.run("training_jobs:train", 1, {"argv": [*shop.argv(), "--exit-interval", "6"]})
    (shop.run / "qad.lock").unlink()  # ranks of the fork server end without Python's exit
    shop.run.rename(shop.pristine)
    return Shop(directory, server)


def test_the_list_of_files_is_whole(shop):
    """What a job writes beside what is listed here is damaged too, if it is added here."""
    fixed = {name for name in shop.names if "tfevents" not in name}
    of_checkpoint = (".metadata", "__0_0.distcp", "metadata.json", "integrity.json", "qad.json", "calibration.json")
    assert fixed == {
        *(f"iter_0000006/{name}" for name in (*of_checkpoint, "best_checkpoints.json", "event_files.json")),
        *("hf/config.json", "hf/integrity.json", "heartbeats/rank_00000.json", "latest_checkpointed_iteration.txt"),
        *("qad.json", "calibration.json", "best_checkpoints.json"),
    }
    assert len(shop.names) == len(fixed) + 1


def test_readers_stop_or_are_not_misled(shop):
    """Export of the newest and of the best, and the report."""
    cases = [[name, kind] for name in shop.names for kind in KINDS]
    arguments = {"directory": str(shop.directory), "cases": cases}
    output = shop.server.run("damage_jobs:read_all", 1, arguments, timeout=600)
    assert f"{3 * len(cases)} readings" in output and "Traceback" not in output
    wrong = [line for line in output.splitlines() if line.startswith("WRONG")]
    assert not wrong, "\n".join(wrong)


def resume(shop) -> tuple[str, str]:
    """The end of the run, and what an export of its best iteration is; or the error of the one that stopped."""
    output = shop.server.run("training_jobs:train", 1, {"argv": shop.argv()}, fails=None)
    assert "Traceback" not in output, output[-6000:]
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    if errors:
        return "error", errors[0]
    output = shop.server.run("surviving_jobs:digest", 1, {"directory": str(shop.run / "iter_0000008")})
    weights = next(line for line in output.splitlines() if line.startswith("digest"))
    outputs = {"modelopt": str(shop.directory / "best")}
    shutil.rmtree(shop.directory / "best", ignore_errors=True)
    arguments = {"checkpoint": str(shop.run), "outputs": outputs, "iteration": "best"}
    shop.server.run("training_jobs:export_checkpoint", 1, arguments)
    return weights, (shop.directory / "best" / "model.safetensors").read_bytes().hex()


def check_resumes(shop, cases) -> None:
    shutil.rmtree(shop.run, ignore_errors=True)
    shutil.copytree(shop.pristine, shop.run)
    expected = resume(shop)
    assert expected[0] != "error"
    stopped = 0
    for name, kind in cases:
        shop.damaged(name, kind)
        found = resume(shop)
        stopped += found[0] == "error"
        assert found == expected or found[0] == "error", (name, kind)
    assert 0 < stopped < len(cases)


def test_a_job_stops_or_goes_on_as_if_nothing_were(shop):
    cases = [(name, random.Random(name).choice(KINDS)) for name in shop.names]
    check_resumes(shop, cases)


@pytest.mark.all
def test_a_job_stops_or_goes_on_after_every_damage(shop):
    check_resumes(shop, [(name, kind) for name in shop.names for kind in KINDS])
