"""What the ranks of test_checkpoints and test_numbers run: pretrain_qad.py with something going wrong at a step."""

import os
import signal
import sys
import time
from pathlib import Path

import torch
import training_jobs


def train_on_a_full_disk(argv: list[str], record: str, disk: str, at: dict[str, int]) -> None:
    """``training_jobs.train``; before step ``i`` rank 0 fills ``disk`` but for ``at[i]`` bytes; -1 empties it.

    TensorBoard then gets a long text: a file system gives room by pages, of which a few scalars need no new one.
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
                    except OSError:  # TensorBoard's thread of another rank has written meanwhile
                        ballast.unlink()
            if free is not None:
                torch.distributed.barrier()
            if free == 0 and (writer := get_tensorboard_writer()) is not None:
                writer.add_text("a text of three pages", "x" * 12_288, step - 1)

    fills = FillsDisk()
    training_jobs.train(argv, record=record, callbacks=[fills])
    fills.loggers.close()  # as at the exit of the interpreter, to which ranks of the fork server do not come


def read_events(directory: str) -> None:
    """Print the steps of the loss in a run's event files, and what the report would say of the files."""
    from megatron_qad.report.scalars import read_scalars

    notes: list[str] = []
    scalars = read_scalars(directory, notes=notes)
    print("steps", [step for step, _ in scalars["kl loss"]], "validations", len(scalars["validation/kl_to_teacher"]))
    print("notes", notes)


def list_files(directory: str) -> None:
    """Print what is in ``directory``, which only the server's processes may see."""
    for path in sorted(Path(directory).rglob("*")):
        print("file", path.relative_to(directory))
    tracker = Path(directory) / "latest_checkpointed_iteration.txt"
    print("tracker", tracker.read_text() if tracker.is_file() else "none")
    sys.stdout.flush()


def digest(directory: str) -> None:
    """Print a hash of all tensors of one iteration: weights, masters, moments."""
    import hashlib

    from megatron.core import dist_checkpointing

    from megatron_qad.engine.distributed import init_process_group

    init_process_group()
    found = hashlib.sha256()
    tensors = dist_checkpointing.load_plain_tensors(directory)
    tensors = {name: tensor for name, tensor in tensors.items() if torch.is_tensor(tensor)}  # args name directories
    for name in sorted(tensors):
        found.update(name.encode())
        found.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy().tobytes())
    print("digest", len(tensors), found.hexdigest())


def train_with_fault(argv: list[str], fault: dict, record: str | None = None) -> None:
    """``training_jobs.train``; at step ``fault["step"]`` (and, if "from", all later ones) on rank ``fault["rank"]`` the
    "kind" of it:

    "output": the output of module "name" is infinite; with "once", only the first time it runs
    "gradient": the gradient of parameter "name" is NaN
    "weights": the weights are eight times as large
    "slow": the rank takes 0.3 s more
    "stopped": the rank's process is stopped, as one that hangs, a second later: its heartbeat has written where it is
    """
    from megatron_qad.engine.events import Callback

    class Faulty(Callback):
        undo = None

        def step_begins(self, step, model):
            now = step == fault["step"] or fault.get("from") and step > fault["step"]
            if now and os.environ["RANK"] == str(fault["rank"]):
                self.undo = _FAULTS[fault["kind"]](fault, model)

        def step_ended(self, step):
            if self.undo is not None:
                self.undo.remove()
                self.undo = None

    training_jobs.train(argv, record=record, callbacks=[Faulty()])


def train_with_slow_disk(argv: list[str], seconds: float) -> None:
    """``training_jobs.train``; each model that is loaded and each checkpoint that is saved takes ``seconds`` more."""
    from megatron_qad.engine.events import Callback

    class SlowDisk(Callback):
        def phase(self, name, is_long):
            if name.startswith("loading"):
                time.sleep(seconds)

        def save_begins(self, save):
            time.sleep(seconds)

    training_jobs.train(argv, callbacks=[SlowDisk()])


def _parts(model) -> dict:
    from megatron_qad.quantization.names import named_modules_globally

    return {name: module for chunk in model for name, module in named_modules_globally(chunk)}


def _output(fault, model):
    times = []

    def hook(module, args, output):
        times.append(None)
        if fault.get("once") and len(times) > 1:
            return None
        first = output[0] if isinstance(output, tuple) else output
        return (first * torch.inf, *output[1:]) if isinstance(output, tuple) else first * torch.inf

    return _parts(model)[fault["name"]].register_forward_hook(hook)


def _gradient(fault, model):
    module, kind = fault["name"].rsplit(".", 1)
    return getattr(_parts(model)[module], kind).register_hook(lambda grad: grad * torch.nan)


def _weights(fault, model):
    with torch.no_grad():
        for chunk in model:
            for parameter in chunk.parameters():
                parameter.mul_(8)


def _slow(fault, model):
    time.sleep(0.3)


def _stopped(fault, model):
    time.sleep(1)  # five times what the heartbeat's thread waits between two looks under --qad-hang-timeout 8
    os.kill(os.getpid(), signal.SIGSTOP)


_FAULTS = {"output": _output, "gradient": _gradient, "weights": _weights, "slow": _slow, "stopped": _stopped}
