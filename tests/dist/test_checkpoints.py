"""Checkpoints that cannot lie: a damaged one is refused by name, the newest whole one resumes the very same run, the
last and the best are kept, and a full disk costs a checkpoint and not the job."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import records
import tiny_job
import torch
from fork_server import ForkServer
from safetensors.torch import load_file

from megatron_qad.engine.run_directory import json_records

VOCAB = tiny_job.LLAMA["vocab_size"]
TRACKER = "latest_checkpointed_iteration.txt"
NUM_STEPS = 10


class Shop:
    def __init__(self, directory: Path, server: ForkServer):
        self.directory, self.server = directory, server
        self._number = 0

    def argv(self, *flags: str, num_steps: int = NUM_STEPS) -> list[str]:
        d = self.directory
        return [
            *("--qad-teacher", f"{d}/teacher", "--qad-student", f"{d}/student"),
            *("--data-path", f"{d}/data", "--data-cache-path", f"{d}/cache", "--split", "80,20,0"),
            *("--seq-length", "32", "--micro-batch-size", "2", "--global-batch-size", "8", "--bf16"),
            *("--train-iters", str(num_steps), "--lr", "1e-3", "--min-lr", "1e-4", "--lr-decay-style", "cosine"),
            *("--eval-interval", "2", "--eval-iters", "1", "--log-interval", "1", "--qad-calibration-samples", "8"),
            *("--save-interval", "2", "--use-distributed-optimizer", *flags),
        ]

    def train(self, argv: list[str], nproc: int = 1, function: str = "training_jobs:train", **arguments):
        """Run a job that must succeed; its steps and its output."""
        self._number += 1
        record = self.directory / f"record{self._number}"
        output = self.server.run(function, nproc, {"argv": argv, "record": str(record)} | arguments)
        return records.read(record, nproc, vocab_size=VOCAB, whole=nproc == 1), output

    def fail(self, function: str, nproc: int = 1, **arguments) -> str:
        output = self.server.run(function, nproc, arguments, fails=True)
        assert "Traceback" not in output, output
        return next(line for line in output.splitlines() if line.startswith("error: "))


def make_inputs(directory: Path, server: ForkServer) -> None:
    tiny_job.write_hf(directory / "hf_teacher", tiny_job.LLAMA | {"dtype": "bfloat16"})
    tiny_job.write_hf(directory / "hf_student", tiny_job.LLAMA | {"dtype": "bfloat16"}, noise=0.3)
    tiny_job.write_data(directory / "data", vocab_size=VOCAB)
    models = [(f"{directory}/hf_{who}", f"{directory}/{who}", "bfloat16") for who in ("teacher", "student")]
    server.run("training_jobs:import_checkpoints", 1, {"models": models})


@pytest.fixture(scope="module")
def shop(tmp_path_factory, server):
    directory = tmp_path_factory.mktemp("checkpoints")
    make_inputs(directory, server)
    return Shop(directory, server)


@pytest.fixture(scope="module")
def through(shop):
    """The undisturbed run of 10 steps, and its directory as it was after 8: with the checkpoints 2, 4, 6 and 8."""
    run = shop.directory / "run"
    steps, _ = shop.train(shop.argv("--save", str(run)))
    shutil.rmtree(run / "iter_0000010")
    (run / TRACKER).write_text("8")
    return steps, run


def same(found: list[dict], expected: list[dict]) -> None:
    """Losses, weights and masters, bit for bit."""
    assert len(found) == len(expected)
    for number, (a, b) in enumerate(zip(found, expected, strict=True), 1):
        assert a["loss"] == b["loss"], number
        for what in ("params", "masters"):
            assert a[what].keys() == b[what].keys()
            assert all(torch.equal(a[what][name], b[what][name]) for name in b[what]), (number, what)


def flip_a_byte(directory: Path) -> None:
    content = bytearray((directory / "__0_0.distcp").read_bytes())
    content[len(content) // 2] ^= 1
    (directory / "__0_0.distcp").write_bytes(content)


def cut_off(directory: Path) -> None:
    content = (directory / "__0_0.distcp").read_bytes()
    (directory / "__0_0.distcp").write_bytes(content[: len(content) // 2])


# name -> what is done to the newest checkpoint or the tracker, what the log says of it, where the run then resumes
DAMAGES = {
    "a flipped bit": (flip_a_byte, "iter_0000008/__0_0.distcp has another SHA-256", 6),
    "a short file": (cut_off, "iter_0000008/__0_0.distcp has", 6),
    "a missing file": (lambda d: (d / "__0_0.distcp").unlink(), "iter_0000008/__0_0.distcp is missing", 6),
    "never finished": (lambda d: (d / ".metadata").unlink(), "iter_0000008 has no .metadata: it was never finished", 6),
    "a manifest missing": (lambda d: (d / "integrity.json").unlink(), "iter_0000008 has no integrity.json", 6),
    "a file of nobody's": (lambda d: (d / "common.pt").touch(), "iter_0000008/common.pt is not listed", 6),
    "a tracker missing": (lambda d: (d.parent / TRACKER).unlink(), "is not there; resuming from iter_0000008", 8),
    "a manifest cut off": (lambda d: (d / "integrity.json").write_text("{"), "integrity.json is not readable", 6),
    "no directory": (shutil.rmtree, "iter_0000008, which latest_checkpointed_iteration.txt names, is not there", 6),
    "a tracker cut off": (lambda d: (d.parent / TRACKER).write_text(""), "says ''; resuming from iter_0000008", 8),
    "a tracker set back": (lambda d: (d.parent / TRACKER).write_text("4"), None, 4),
    "killed between two names": (lambda d: d.rename(d.with_name(d.name + ".replaced")), None, 8),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_the_newest_whole_checkpoint_resumes(shop, through, tmp_path, case):
    damage, said, resumes_at = DAMAGES[case]
    expected, saved = through
    run = tmp_path / "run"
    shutil.copytree(saved, run)
    damage(run / "iter_0000008")
    (run / "iter_0000009.0123abcd.partial").mkdir()
    of_the_user = ["thesis.removed", "download.partial", "x.replaced", "iter_old.removed", "iter_notes"]
    for name in of_the_user:
        (run / name).mkdir()
    found, output = shop.train(shop.argv("--save", str(run), "--load", str(run)))
    same(found, expected[resumes_at:])
    warnings = [line for line in output.splitlines() if "megatron_qad: WARNING" in line and "lost" not in line]
    if said is None:
        assert not warnings
    else:
        assert any(said in line for line in warnings), warnings
        assert "resuming from iter_" in warnings[-1]
    assert (run / TRACKER).read_text() == "10"
    assert all((run / name).is_dir() for name in of_the_user)
    found = {path.name for path in run.glob("iter_*")} - set(of_the_user)
    assert found == {f"iter_{i:07d}" for i in (2, 4, 6, 8, 10)}


def test_where_none_is_whole_the_job_stops(shop, through, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(through[1], run)
    for directory in run.glob("iter_*"):
        flip_a_byte(directory)
    error = shop.fail("training_jobs:train", argv=shop.argv("--load", str(run)))
    assert "no checkpoint is whole: iter_0000008 (iter_0000008/__0_0.distcp has another SHA-256" in error
    assert "iter_0000002" in error
    error = shop.fail("training_jobs:train", argv=shop.argv("--load", str(run), "--ckpt-step", "4"))
    assert "iter_0000004 is damaged" in error


def test_tools_refuse_a_damaged_checkpoint(shop, through, tmp_path):
    run, export = tmp_path / "run", "training_jobs:export_checkpoint"
    shutil.copytree(through[1], run)
    flip_a_byte(run / "iter_0000008")
    error = shop.fail(export, checkpoint=str(run), outputs={"modelopt": f"{tmp_path}/out"})
    assert "iter_0000008 is damaged: iter_0000008/__0_0.distcp has another SHA-256" in error
    assert not (tmp_path / "out").exists()
    shop.server.run(export, 1, {"checkpoint": str(run), "outputs": {"modelopt": f"{tmp_path}/out"}, "iteration": 6})
    assert (tmp_path / "out" / "model.safetensors").is_file()
    # As a teacher, too: its weights are read from the same kind of directory.
    teacher = tmp_path / "teacher"
    shutil.copytree(shop.directory / "teacher", teacher)
    cut_off(teacher / "release")
    assert "release/__0_0.distcp has" in shop.fail("training_jobs:train", argv=shop.argv("--qad-teacher", str(teacher)))


def test_an_export_in_bf16_is_on_the_grid(shop, through, tmp_path):
    """Also from a checkpoint saved after an optimizer step with no evaluation between: what the packed export decodes
    to, bit for bit."""
    from megatron_qad.engine.run_directory import manifest
    from megatron_qad.formats import nvfp4

    argv = shop.argv("--save", str(tmp_path / "run"), "--eval-interval", "1000", num_steps=2)
    steps, _ = shop.train(argv)
    outputs = {layout: str(tmp_path / layout) for layout in ("bf16", "modelopt")}
    shop.server.run("training_jobs:export_checkpoint", 1, {"checkpoint": str(tmp_path / "run"), "outputs": outputs})
    plain, packed = (load_file(tmp_path / layout / "model.safetensors") for layout in outputs)
    names = [name.removesuffix("_scale_2") for name in packed if name.endswith("weight_scale_2")]
    assert len(names) == 7 * tiny_job.LLAMA["num_hidden_layers"]
    saved = steps[-1]["params"]["decoder.layers.0.self_attention.linear_proj.weight"][0]
    name = "model.layers.0.self_attn.o_proj.weight"
    assert not torch.equal(plain[name], saved), "the checkpoint was saved on the grid: nothing is tested"
    for name in names:
        decoded = nvfp4.dequantize(packed[name], packed[f"{name}_scale"], packed[f"{name}_scale_2"], torch.bfloat16)
        assert torch.equal(decoded, plain[name]), name
    assert not manifest.find_problems(tmp_path / "run" / "iter_0000002")


@pytest.mark.parametrize("flags", [[], ["--async-save"]], ids=["at once", "async"])
def test_the_last_and_the_best_are_kept(shop, tmp_path, flags):
    """Ranked by the validation at their iteration, also over a resume."""
    run = tmp_path / "run"
    keep = ["--qad-keep-last", "1", "--qad-keep-best", "2", "--save", str(run), *flags]
    first, _ = shop.train(shop.argv(*keep, "--exit-interval", "6", num_steps=12), nproc=2)
    listed = json_records.read(run / "best_checkpoints.json")
    assert sorted(entry["iteration"] for entry in listed) == [2, 4, 6]
    kept = {path.name for path in run.glob("iter_*")}
    assert kept == {f"iter_{i:07d}" for i in {6} | {entry["iteration"] for entry in listed[:2]}}
    second, output = shop.train(shop.argv(*keep, "--load", str(run), num_steps=12), nproc=2)
    assert len(first) == 6 and len(second) == 6
    listed = json_records.read(run / "best_checkpoints.json")
    assert [entry["kl_to_teacher"] for entry in listed] == sorted(entry["kl_to_teacher"] for entry in listed)
    # A checkpoint that was removed before is not there to be the second best again.
    available = [e["iteration"] for e in listed if f"iter_{e['iteration']:07d}" in kept or e["iteration"] > 6]
    assert {path.name for path in run.glob("iter_*")} == {f"iter_{i:07d}" for i in {12, *available[:2]}}
    shop.server.run(
        "training_jobs:export_checkpoint",
        1,
        {"checkpoint": str(run), "outputs": {"bf16": f"{tmp_path}/best"}, "iteration": "best"},
    )
    assert not list(run.glob("*.partial"))
    for directory in run.glob("iter_*"):
        assert set(json.loads((directory / "integrity.json").read_text())["files"]) == {
            *("__0_0.distcp", "__1_0.distcp", ".metadata", "metadata.json"),
            *("qad.json", "calibration.json", "best_checkpoints.json"),
        }


def test_a_directory_that_a_model_is_read_from_is_refused(shop, tmp_path):
    """As it was: nothing of the job is left there."""
    for models, name in (("teacher", "the directory of --qad-teacher"), ("student", "the directory of --qad-student")):
        directory = shop.directory / models
        before = sorted(path.name for path in directory.iterdir())
        error = shop.fail("training_jobs:train", argv=shop.argv("--save", str(directory)))
        assert f"--save {directory}: is {name}" in error
        assert sorted(path.name for path in directory.iterdir()) == before
    (tmp_path / "link").symlink_to(shop.directory / "teacher")
    other = ["--qad-teacher", str(shop.directory / "student"), "--save", str(tmp_path / "link")]
    assert "holds an imported model (release/)" in shop.fail("training_jobs:train", argv=shop.argv(*other))


def test_flags_that_keep_nothing_are_refused(shop, tmp_path):
    for flags, said in {
        ("--qad-keep-last", "0"): "--qad-keep-last 0: expected a number of checkpoints",
        ("--qad-keep-best", "1", "--eval-interval", "3"): "--save-interval 2 is not a multiple of --eval-interval 3",
        ("--qad-keep-last", "1", "--save-retain-interval", "4"): "--save-retain-interval removes checkpoints, too",
        ("--qad-keep-best", "1", "--eval-iters", "0"): "--eval-iters 0 turns validation off",
        ("--qad-spike-factor", "3", "--no-save-optim"): "which --no-save-optim leaves out",
        ("--qad-keep-best", "1", "--qad-loss", "ce"): None,
    }.items():
        argv = shop.argv("--save", str(tmp_path / "refused"), *flags)
        if said is None:  # QAT has no teacher to be near to
            argv = [flag for i, flag in enumerate(argv) if "--qad-teacher" not in argv[max(i - 1, 0) : i + 1]]
            said = "--qad-keep-best ranks checkpoints by their KL to the teacher; this job has no --qad-teacher"
        assert said in shop.fail("training_jobs:train", argv=argv)
    # The stages of a pipeline share their flags.
    samples = ["--train-samples", "64", "--lr-decay-samples", "64", "--lr-warmup-samples", "8"]
    shop.train(shop.argv("--save", str(tmp_path / "ptq"), "--qad-ptq", "--qad-spike-factor", "3", *samples))


DISK = 64 << 20
_MOUNTS = 'mount -t tmpfs -o size={size} none {disk} && exec "$@"'


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory):
    """A server whose processes see a file system of 64 MiB of their own."""
    directory = tmp_path_factory.mktemp("full")
    disk = directory / "disk"
    disk.mkdir()
    prefix = ["unshare", "-rm", "sh", "-c", _MOUNTS.format(size=DISK, disk=disk), "sh"]
    tried = subprocess.run([*prefix, "true"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"no file system of our own can be mounted here: {tried.stderr.strip()}")
    with ForkServer(directory, prefix) as server:
        make_inputs(directory, server)
        yield Shop(directory, server), disk


def test_a_full_disk_costs_a_checkpoint(small_disk, through):
    """Full before the save begins (4) and while it writes (6): both are said, the run is the undisturbed one's, 2 stays
    whole, 8 is saved, as soon as there is room, and nothing of the two is left. TensorBoard's scalars wait for room."""
    shop, disk = small_disk
    used = sum(file.stat().st_size for file in (through[1] / "iter_0000002").iterdir())
    for name, flags, nproc in (("sync", [], 1), ("async", ["--async-save"], 1), ("ranks", [], 2)):
        run = disk / name
        at = {"3": 0, "5": (16 << 20) + used // 2, "7": -1}  # 16 MiB are reserved first, and then half is missing
        arguments = {"disk": str(disk), "at": at}
        argv = shop.argv("--save", str(run), "--tensorboard-dir", str(run / "tensorboard"), *flags)
        steps, output = shop.train(argv, nproc, "surviving_jobs:train_on_a_full_disk", **arguments)
        errors = [line for line in output.splitlines() if "megatron_qad: ERROR" in line and "saved" in line]
        assert len(errors) == 2, errors
        assert "iteration 4 could not be saved" in errors[0] and "free; the checkpoint before took" in errors[0]
        assert "could not be saved: rank 0: Worker failure" in errors[1], errors[1]
        assert float(errors[1].split("disk: ")[1].split()[0]) < used / 1e6, "it did not fail by want of room"
        assert all("The last good one is 2" in line and "The job continues" in line for line in errors)
        if nproc == 1:
            same(steps, through[0])
        listed = shop.server.run("surviving_jobs:list_files", 1, {"directory": str(run)})
        assert "tracker 10" in listed
        assert "iter_0000008/integrity.json" in listed and "iter_0000002/integrity.json" in listed
        assert not any(part in listed for part in ("iter_0000004", "iter_0000006", "partial"))
        said = [line for line in output.splitlines() if "megatron_qad: ERROR: TensorBoard in" in line]
        assert said and all("No space left on device. The job goes on" in line for line in said)
        assert "events that waited are written" in output
        assert "iter_0000008/event_files.json" in listed and "Traceback" not in output
        events = shop.server.run("surviving_jobs:read_events", 1, {"directory": str(run)})
        assert f"steps {list(range(1, NUM_STEPS + 1))} validations 5" in events and "notes []" in events


def test_keeping_the_best_removes_none_while_too_few_were_validated(shop, tmp_path):
    flags = ["--qad-keep-best", "2", "--start-eval-at-iter", "5"]
    shop.train(shop.argv("--save", str(tmp_path / "run"), *flags, num_steps=8))
    # 2 and 4 were never validated, 6 was, and only at 8 there are two to choose from.
    assert sorted(int(path.name[5:]) for path in (tmp_path / "run").glob("iter_*")) == [6, 8]
    shop.train(shop.argv("--save", str(tmp_path / "early"), *flags, num_steps=6))
    assert sorted(int(path.name[5:]) for path in (tmp_path / "early").glob("iter_*")) == [2, 4, 6]


def test_a_full_disk_on_the_way_out_is_no_success(small_disk):
    """A job that --exit-interval, or a signal, ends saves for the last time, though not at its last step."""
    shop, disk = small_disk
    arguments = {"disk": str(disk), "at": {"4": 0}, "record": f"{shop.directory}/none"}
    argv = shop.argv("--save", str(disk / "exit"), "--exit-interval", "4")
    error = shop.fail("surviving_jobs:train_on_a_full_disk", argv=argv, **arguments)
    assert "The last good one is 2" in error and "The job ends here and its last steps are not saved" in error
    shop.server.run("os:remove", arguments={"path": str(disk / "ballast")})


def test_a_full_disk_at_the_end_is_no_success(small_disk):
    shop, disk = small_disk
    arguments = {"disk": str(disk), "at": {"4": 0}, "record": f"{shop.directory}/none"}
    error = shop.fail(
        "surviving_jobs:train_on_a_full_disk", argv=shop.argv("--save", str(disk / "end"), num_steps=4), **arguments
    )
    assert "The last good one is 2" in error and "last steps are not saved" in error
