"""Jobs for test_checkpoints and test_numbers: pretrain_qad.py with an injected failure at some step."""

import os
import signal
import sys
import time
from pathlib import Path

import torch
import training_jobs


def train_on_a_full_disk(argv: list[str], record: str, disk: str, at: dict[str, int]) -> None:
    """``training_jobs.train``; before step ``i`` rank 0 fills ``disk`` except for ``at[i]`` bytes; -1 empties it.

    TensorBoard then gets a long text: a file system allocates whole pages, and a few scalars may not need a new one.
    """
    from megatron.training import get_tensorboard_writer

    from megatron_qad.engine.events import Callback

    ballast = Path(disk) / "ballast"

    class FillsDisk(Callback):
        def job_begins(self, job, resumes_at):
            self.loggers = job.loggers

        def step_begins(self, step, model):
            free = at.get(str(step))
            if free is not None and os.environ["RANK"] == "0":
                ballast.unlink(missing_ok=True)
                while free >= 0:
                    size = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - free
                    try:
                        with open(ballast, "wb") as file:
                            os.posix_fallocate(file.fileno(), 0, size)
                        break
                    except OSError:  # TensorBoard's thread of another rank has written in the meantime
                        ballast.unlink()
            if free is not None:
                torch.distributed.barrier()
            if free == 0 and (writer := get_tensorboard_writer()) is not None:
                writer.add_text("a text of three pages", "x" * 12_288, step - 1)

    callback = FillsDisk()
    training_jobs.train(argv, record=record, callbacks=[callback])
    callback.loggers.close()  # as at interpreter exit, which ranks of the fork server do not reach


def read_events(directory: str) -> None:
    """Print the steps of the loss in a run's event files, and the notes that the run report would contain on them."""
    from megatron_qad.report.scalars import read_scalars

    notes: list[str] = []
    scalars = read_scalars(directory, notes=notes)
    print("steps", [step for step, _ in scalars["kl loss"]], "validations", len(scalars["validation/kl_to_teacher"]))
    print("notes", notes)


def list_files(directory: str) -> None:
    """Print the contents of ``directory``, which may be visible to the server's processes only."""
    for path in sorted(Path(directory).rglob("*")):
        print("file", path.relative_to(directory))
    tracker = Path(directory) / "latest_checkpointed_iteration.txt"
    print("tracker", tracker.read_text() if tracker.is_file() else "none")
    sys.stdout.flush()


def digest(directory: str) -> None:
    """Print a hash of all tensors of one iteration: weights, master weights, optimizer moments."""
    import hashlib

    from megatron.core import dist_checkpointing

    from megatron_qad.engine.distributed import init_process_group

    init_process_group()
    sha256 = hashlib.sha256()
    tensors = dist_checkpointing.load_plain_tensors(directory)
    tensors = {name: tensor for name, tensor in tensors.items() if torch.is_tensor(tensor)}  # args contain directories
    for name in sorted(tensors):
        sha256.update(name.encode())
        sha256.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy().tobytes())
    print("digest", len(tensors), sha256.hexdigest())


def train_with_failure(argv: list[str], failure: dict, record: str | None = None) -> None:
    """``training_jobs.train`` with a failure on rank ``failure["rank"]`` at step ``failure["step"]``, and at all later
    steps if "from" is set. ``failure["kind"]`` is one of:

    "output": the output of module "name" is infinite; with "once", only the first time it runs
    "gradient": the gradient of parameter "name" is NaN
    "weights": the weights are multiplied by eight
    "slow": the rank takes 0.3 s longer
    "stopped": the rank's process is stopped, as if it hung, after a second in which its heartbeat writes its position
    """
    from megatron_qad.engine.events import Callback

    class InjectFailure(Callback):
        undo = None

        def step_begins(self, step, model):
            is_active = step == failure["step"] or failure.get("from") and step > failure["step"]
            if is_active and os.environ["RANK"] == str(failure["rank"]):
                self.undo = _FAILURES[failure["kind"]](failure, model)

        def step_ended(self, step):
            if self.undo is not None:
                self.undo.remove()
                self.undo = None

    training_jobs.train(argv, record=record, callbacks=[InjectFailure()])


def train_with_slow_disk(argv: list[str], seconds: float) -> None:
    """``training_jobs.train``; loading each model and saving each checkpoint takes ``seconds`` longer."""
    from megatron_qad.engine.events import Callback

    class SlowDisk(Callback):
        def phase(self, name, is_long):
            if name.startswith("loading"):
                time.sleep(seconds)

        def save_begins(self, save):
            time.sleep(seconds)

    training_jobs.train(argv, callbacks=[SlowDisk()])


def _named_modules(model) -> dict:
    from megatron_qad.quantization.names import named_modules_globally

    return {name: module for chunk in model for name, module in named_modules_globally(chunk)}


def _output(failure, model):
    calls = []

    def hook(module, args, output):
        calls.append(None)
        if failure.get("once") and len(calls) > 1:
            return None
        first = output[0] if isinstance(output, tuple) else output
        return (first * torch.inf, *output[1:]) if isinstance(output, tuple) else first * torch.inf

    return _named_modules(model)[failure["name"]].register_forward_hook(hook)


def _gradient(failure, model):
    module, kind = failure["name"].rsplit(".", 1)
    return getattr(_named_modules(model)[module], kind).register_hook(lambda grad: grad * torch.nan)


def _weights(failure, model):
    with torch.no_grad():
        for chunk in model:
            for parameter in chunk.parameters():
                parameter.mul_(8)


def _slow(failure, model):
    time.sleep(0.3)


def _stopped(failure, model):
    time.sleep(1)  # five intervals of the heartbeat's thread under --qad-hang-timeout 8
    os.kill(os.getpid(), signal.SIGSTOP)


_FAILURES = {"output": _output, "gradient": _gradient, "weights": _weights, "slow": _slow, "stopped": _stopped}
