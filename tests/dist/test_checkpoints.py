"""Damaged checkpoints are refused, the newest valid one resumes, retention works, and jobs survive full disks."""

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


class Jobs:
    def __init__(self, directory: Path, server: ForkServer):
        self.directory, self.server = directory, server
        self._num_jobs = 0

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
        """Run a job that must succeed; return its steps and its output."""
        self._num_jobs += 1
        record = self.directory / f"record{self._num_jobs}"
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
    models = [(f"{directory}/hf_{role}", f"{directory}/{role}", "bfloat16") for role in ("teacher", "student")]
    server.run("training_jobs:import_checkpoints", 1, {"models": models})


@pytest.fixture(scope="module")
def jobs(tmp_path_factory, server):
    directory = tmp_path_factory.mktemp("checkpoints")
    make_inputs(directory, server)
    return Jobs(directory, server)


@pytest.fixture(scope="module")
def reference_run(jobs):
    """The steps of an uninterrupted run of 10, and its directory as after step 8, with checkpoints 2, 4, 6 and 8."""
    run = jobs.directory / "run"
    steps, _ = jobs.train(jobs.argv("--save", str(run)))
    shutil.rmtree(run / "iter_0000010")
    (run / TRACKER).write_text("8")
    return steps, run


def assert_same(actual: list[dict], expected: list[dict]) -> None:
    """Check that losses, weights and master weights are equal, bit for bit."""
    assert len(actual) == len(expected)
    for step, (a, b) in enumerate(zip(actual, expected, strict=True), 1):
        assert a["loss"] == b["loss"], step
        for key in ("params", "masters"):
            assert a[key].keys() == b[key].keys()
            assert all(torch.equal(a[key][name], b[key][name]) for name in b[key]), (step, key)


def flip_a_byte(directory: Path) -> None:
    content = bytearray((directory / "__0_0.distcp").read_bytes())
    content[len(content) // 2] ^= 1
    (directory / "__0_0.distcp").write_bytes(content)


def truncate(directory: Path) -> None:
    content = (directory / "__0_0.distcp").read_bytes()
    (directory / "__0_0.distcp").write_bytes(content[: len(content) // 2])


# name -> (damage to the newest checkpoint or the tracker, expected warning, iteration where the run then resumes)
DAMAGES = {
    "a flipped bit": (flip_a_byte, "iter_0000008/__0_0.distcp has a different SHA-256", 6),
    "a short file": (truncate, "iter_0000008/__0_0.distcp has", 6),
    "a missing file": (lambda d: (d / "__0_0.distcp").unlink(), "iter_0000008/__0_0.distcp is missing", 6),
    "unfinished": (lambda d: (d / ".metadata").unlink(), "iter_0000008 has no .metadata: the save never finished", 6),
    "a missing manifest": (lambda d: (d / "integrity.json").unlink(), "iter_0000008 has no integrity.json", 6),
    "an unlisted file": (lambda d: (d / "common.pt").touch(), "iter_0000008/common.pt is not listed", 6),
    "a missing tracker": (lambda d: (d.parent / TRACKER).unlink(), "is missing; resuming from iter_0000008", 8),
    "a truncated manifest": (lambda d: (d / "integrity.json").write_text("{"), "integrity.json is not readable", 6),
    "no directory": (shutil.rmtree, "iter_0000008, which latest_checkpointed_iteration.txt names, does not exist", 6),
    "a truncated tracker": (
        lambda d: (d.parent / TRACKER).write_text(""),
        "contains ''; resuming from iter_0000008",
        8,
    ),
    "a tracker set back": (lambda d: (d.parent / TRACKER).write_text("4"), None, 4),
    "killed between two renames": (lambda d: d.rename(d.with_name(d.name + ".replaced")), None, 8),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_newest_valid_checkpoint_resumes(jobs, reference_run, tmp_path, case):
    damage, message, resumes_at = DAMAGES[case]
    expected, saved = reference_run
    run = tmp_path / "run"
    shutil.copytree(saved, run)
    damage(run / "iter_0000008")
    (run / "iter_0000009.0123abcd.partial").mkdir()
    user_files = ["thesis.removed", "download.partial", "x.replaced", "iter_old.removed", "iter_notes"]
    for name in user_files:
        (run / name).mkdir()
    steps, output = jobs.train(jobs.argv("--save", str(run), "--load", str(run)))
    assert_same(steps, expected[resumes_at:])
    warnings = [line for line in output.splitlines() if "megatron_qad: WARNING" in line and "lost" not in line]
    if message is None:
        assert not warnings
    else:
        assert any(message in line for line in warnings), warnings
        assert "resuming from iter_" in warnings[-1]
    assert (run / TRACKER).read_text() == "10"
    assert all((run / name).is_dir() for name in user_files)
    iterations = {path.name for path in run.glob("iter_*")} - set(user_files)
    assert iterations == {f"iter_{i:07d}" for i in (2, 4, 6, 8, 10)}


def test_job_stops_without_a_valid_checkpoint(jobs, reference_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(reference_run[1], run)
    for directory in run.glob("iter_*"):
        flip_a_byte(directory)
    error = jobs.fail("training_jobs:train", argv=jobs.argv("--load", str(run)))
    assert "no valid checkpoint was found: iter_0000008 (iter_0000008/__0_0.distcp has a different SHA-256" in error
    assert "iter_0000002" in error
    error = jobs.fail("training_jobs:train", argv=jobs.argv("--load", str(run), "--ckpt-step", "4"))
    assert "iter_0000004 is damaged" in error


def test_tools_refuse_a_damaged_checkpoint(jobs, reference_run, tmp_path):
    run, export = tmp_path / "run", "training_jobs:export_checkpoint"
    shutil.copytree(reference_run[1], run)
    flip_a_byte(run / "iter_0000008")
    error = jobs.fail(export, checkpoint=str(run), outputs={"modelopt": f"{tmp_path}/out"})
    assert "iter_0000008 is damaged: iter_0000008/__0_0.distcp has a different SHA-256" in error
    assert not (tmp_path / "out").exists()
    jobs.server.run(export, 1, {"checkpoint": str(run), "outputs": {"modelopt": f"{tmp_path}/out"}, "iteration": 6})
    assert (tmp_path / "out" / "model.safetensors").is_file()
    # A damaged teacher is refused, too.
    teacher = tmp_path / "teacher"
    shutil.copytree(jobs.directory / "teacher", teacher)
    truncate(teacher / "release")
    assert "release/__0_0.distcp has" in jobs.fail("training_jobs:train", argv=jobs.argv("--qad-teacher", str(teacher)))


def test_bf16_export_equals_decoded_nvfp4_export(jobs, reference_run, tmp_path):
    """Bit for bit, also from a checkpoint saved after an optimizer step without an evaluation in between."""
    from megatron_qad.engine.run_directory import manifest
    from megatron_qad.formats import nvfp4

    argv = jobs.argv("--save", str(tmp_path / "run"), "--eval-interval", "1000", num_steps=2)
    steps, _ = jobs.train(argv)
    outputs = {layout: str(tmp_path / layout) for layout in ("bf16", "modelopt")}
    jobs.server.run("training_jobs:export_checkpoint", 1, {"checkpoint": str(tmp_path / "run"), "outputs": outputs})
    plain, packed = (load_file(tmp_path / layout / "model.safetensors") for layout in outputs)
    names = [name.removesuffix("_scale_2") for name in packed if name.endswith("weight_scale_2")]
    assert len(names) == 7 * tiny_job.LLAMA["num_hidden_layers"]
    saved = steps[-1]["params"]["decoder.layers.0.self_attention.linear_proj.weight"][0]
    name = "model.layers.0.self_attn.o_proj.weight"
    assert not torch.equal(plain[name], saved), "the checkpoint has quantized weights, so this test shows nothing"
    for name in names:
        decoded = nvfp4.dequantize(packed[name], packed[f"{name}_scale"], packed[f"{name}_scale_2"], torch.bfloat16)
        assert torch.equal(decoded, plain[name]), name
    assert not manifest.find_problems(tmp_path / "run" / "iter_0000002")


@pytest.mark.parametrize("flags", [[], ["--async-save"]], ids=["at once", "async"])
def test_last_and_best_checkpoints_are_kept(jobs, tmp_path, flags):
    """The best are ranked by the validation at their iteration, also after a resume."""
    run = tmp_path / "run"
    keep = ["--qad-keep-last", "1", "--qad-keep-best", "2", "--save", str(run), *flags]
    first, _ = jobs.train(jobs.argv(*keep, "--exit-interval", "6", num_steps=12), nproc=2)
    listed = json_records.read(run / "best_checkpoints.json")
    assert sorted(entry["iteration"] for entry in listed) == [2, 4, 6]
    kept = {path.name for path in run.glob("iter_*")}
    assert kept == {f"iter_{i:07d}" for i in {6} | {entry["iteration"] for entry in listed[:2]}}
    second, output = jobs.train(jobs.argv(*keep, "--load", str(run), num_steps=12), nproc=2)
    assert len(first) == 6 and len(second) == 6
    listed = json_records.read(run / "best_checkpoints.json")
    assert [entry["kl_to_teacher"] for entry in listed] == sorted(entry["kl_to_teacher"] for entry in listed)
    # A checkpoint that was removed before cannot become the second best.
    available = [e["iteration"] for e in listed if f"iter_{e['iteration']:07d}" in kept or e["iteration"] > 6]
    assert {path.name for path in run.glob("iter_*")} == {f"iter_{i:07d}" for i in {12, *available[:2]}}
    jobs.server.run(
        "training_jobs:export_checkpoint",
        1,
        {"checkpoint": str(run), "outputs": {"bf16": f"{tmp_path}/best"}, "iteration": "best"},
    )
    assert not list(run.glob("*.partial"))
    for directory in run.glob("iter_*"):
        assert set(json.loads((directory / "integrity.json").read_text())["files"]) == {
            *("__0_0.distcp", "__1_0.distcp", ".metadata", "metadata.json"),
            *("qad.json", "calibration.json", "best_checkpoints.json", "event_files.json"),
        }


def test_save_to_model_directory_is_refused(jobs, tmp_path):
    """The job leaves no files in the directory."""
    for models, name in (("teacher", "the directory of --qad-teacher"), ("student", "the directory of --qad-student")):
        directory = jobs.directory / models
        before = sorted(path.name for path in directory.iterdir())
        error = jobs.fail("training_jobs:train", argv=jobs.argv("--save", str(directory)))
        assert f"--save {directory}: is {name}" in error
        assert sorted(path.name for path in directory.iterdir()) == before
    (tmp_path / "link").symlink_to(jobs.directory / "teacher")
    other = ["--qad-teacher", str(jobs.directory / "student"), "--save", str(tmp_path / "link")]
    assert "holds an imported model (release/)" in jobs.fail("training_jobs:train", argv=jobs.argv(*other))


def test_conflicting_retention_flags_are_refused(jobs, tmp_path):
    for flags, message in {
        ("--qad-keep-last", "0"): "--qad-keep-last 0: expected a number of 1 or more",
        ("--qad-keep-best", "1", "--eval-interval", "3"): "--save-interval 2 is not a multiple of --eval-interval 3",
        ("--qad-keep-last", "1", "--save-retain-interval", "4"): "--save-retain-interval removes checkpoints, too",
        ("--qad-keep-best", "1", "--eval-iters", "0"): "--eval-iters 0 turns validation off",
        ("--qad-spike-factor", "3", "--no-save-optim"): "which --no-save-optim leaves out",
        ("--qad-keep-best", "1", "--qad-loss", "ce"): None,
    }.items():
        argv = jobs.argv("--save", str(tmp_path / "refused"), *flags)
        if message is None:  # QAT has no teacher
            argv = [flag for i, flag in enumerate(argv) if "--qad-teacher" not in argv[max(i - 1, 0) : i + 1]]
            message = "--qad-keep-best ranks checkpoints by their KL to the teacher; this job has no --qad-teacher"
        assert message in jobs.fail("training_jobs:train", argv=argv)
    # PTQ accepts the flags, because the stages of a pipeline share them.
    samples = ["--train-samples", "64", "--lr-decay-samples", "64", "--lr-warmup-samples", "8"]
    jobs.train(jobs.argv("--save", str(tmp_path / "ptq"), "--qad-ptq", "--qad-spike-factor", "3", *samples))


DISK = 64 << 20
_MOUNTS = 'mount -t tmpfs -o size={size} none {disk} && exec "$@"'


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory):
    """A server whose processes have their own file system of 64 MiB."""
    directory = tmp_path_factory.mktemp("full")
    disk = directory / "disk"
    disk.mkdir()
    prefix = ["unshare", "-rm", "sh", "-c", _MOUNTS.format(size=DISK, disk=disk), "sh"]
    trial = subprocess.run([*prefix, "true"], capture_output=True, text=True)
    if trial.returncode:
        pytest.skip(f"a file system cannot be mounted here: {trial.stderr.strip()}")
    with ForkServer(directory, prefix) as server:
        make_inputs(directory, server)
        yield Jobs(directory, server), disk


def test_job_survives_full_disk(small_disk, reference_run):
    """The disk is full before save 4 and during save 6: both are reported and leave no files, training equals the
    reference run, 2 stays valid, and 8 is saved when there is space. TensorBoard's scalars wait for space."""
    jobs, disk = small_disk
    used = sum(file.stat().st_size for file in (reference_run[1] / "iter_0000002").iterdir())
    for name, flags, nproc in (("sync", [], 1), ("async", ["--async-save"], 1), ("ranks", [], 2)):
        run = disk / name
        at = {"3": 0, "5": (16 << 20) + used // 2, "7": -1}  # 16 MiB are reserved first, and then half is missing
        arguments = {"disk": str(disk), "at": at}
        argv = jobs.argv("--save", str(run), "--tensorboard-dir", str(run / "tensorboard"), *flags)
        steps, output = jobs.train(argv, nproc, "surviving_jobs:train_on_a_full_disk", **arguments)
        errors = [line for line in output.splitlines() if "megatron_qad: ERROR" in line and "saved" in line]
        assert len(errors) == 2, errors
        assert "iteration 4 could not be saved" in errors[0] and "free; the checkpoint before took" in errors[0]
        assert "could not be saved: rank 0: Worker failure" in errors[1], errors[1]
        assert float(errors[1].split("disk: ")[1].split()[0]) < used / 1e6, "it did not fail by want of room"
        assert all("The last good one is 2" in line and "The job continues" in line for line in errors)
        if nproc == 1:
            assert_same(steps, reference_run[0])
        listed = jobs.server.run("surviving_jobs:list_files", 1, {"directory": str(run)})
        assert "tracker 10" in listed
        assert "iter_0000008/integrity.json" in listed and "iter_0000002/integrity.json" in listed
        assert not any(part in listed for part in ("iter_0000004", "iter_0000006", "partial"))
        reported = [line for line in output.splitlines() if "megatron_qad: ERROR: TensorBoard in" in line]
        assert reported and all("No space left on device. The job continues." in line for line in reported)
        assert "waiting events are written" in output
        assert "iter_0000008/event_files.json" in listed and "Traceback" not in output
        events = jobs.server.run("surviving_jobs:read_events", 1, {"directory": str(run)})
        assert f"steps {list(range(1, NUM_STEPS + 1))} validations 5" in events and "notes []" in events


def test_keep_best_removes_nothing_before_enough_validations(jobs, tmp_path):
    flags = ["--qad-keep-best", "2", "--start-eval-at-iter", "5"]
    jobs.train(jobs.argv("--save", str(tmp_path / "run"), *flags, num_steps=8))
    # 2 and 4 were never validated; only at 8 there are two validated checkpoints to keep.
    assert sorted(int(path.name[5:]) for path in (tmp_path / "run").glob("iter_*")) == [6, 8]
    jobs.train(jobs.argv("--save", str(tmp_path / "early"), *flags, num_steps=6))
    assert sorted(int(path.name[5:]) for path in (tmp_path / "early").glob("iter_*")) == [2, 4, 6]


def test_full_disk_at_early_exit_is_an_error(small_disk):
    """A job that --exit-interval or a signal ends saves for the last time before its last step."""
    jobs, disk = small_disk
    arguments = {"disk": str(disk), "at": {"4": 0}, "record": f"{jobs.directory}/none"}
    argv = jobs.argv("--save", str(disk / "exit"), "--exit-interval", "4")
    error = jobs.fail("surviving_jobs:train_on_a_full_disk", argv=argv, **arguments)
    assert "The last good one is 2" in error and "The job ends here and its last steps are not saved" in error
    jobs.server.run("os:remove", arguments={"path": str(disk / "ballast")})


def test_full_disk_at_last_step_is_an_error(small_disk):
    jobs, disk = small_disk
    arguments = {"disk": str(disk), "at": {"4": 0}, "record": f"{jobs.directory}/none"}
    error = jobs.fail(
        "surviving_jobs:train_on_a_full_disk", argv=jobs.argv("--save", str(disk / "end"), num_steps=4), **arguments
    )
    assert "The last good one is 2" in error and "last steps are not saved" in error
