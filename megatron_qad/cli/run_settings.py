"""The flags of a job that ``megatron-qad run`` chooses where the user gives none.

Batch and length of training follow the amount of data, parallelism follows the planner. Everything is written to
settings.yaml in the run's directory, which can be read, changed, and passed to ``megatron-qad train --config``.
"""

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_qad.engine.errors import QADError
from megatron_qad.engine.text_files import read_json

MAX_SEQ_LENGTH = 8192
MAX_BATCH = 64
MIN_STEPS, MAX_STEPS = 100, 1500
"""The QAD report trains for a few hundred to a few thousand steps."""
LEARNING_RATE = 1e-5
"""The QAD report's for AceReason 7B and Nemotron 3 Nano; others took 1e-6 and 2e-6
(docs/howto/choose_a_learning_rate.md)."""
RESERVED = 0.15
"""Share of a GPU's memory that is left to temporary tensors, buffers and fragmentation; megatron-qad plan has the same
default."""
_PARALLELISM = frozenset(
    f"{name}-parallel-size" for name in ("tensor-model", "pipeline-model", "context", "expert-model", "expert-tensor")
)


@dataclass(frozen=True)
class Machine:
    """The ranks that the job will have."""

    num_ranks: int
    gpu_bytes: int | None
    """Memory of a GPU; None without a GPU."""


def find_machine(num_ranks: int | None) -> Machine:
    """Ask nvidia-smi for the GPUs of this machine.

    Args:
        num_ranks: number of ranks; None takes all GPUs, or 1 without a GPU.

    Raises:
        QADError: more ranks than GPUs.
    """
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return Machine(num_ranks or 1, None)
    mebibytes = [int(line) for line in answer.split() if line.isdigit()]
    if num_ranks is not None and num_ranks > len(mebibytes):
        raise QADError(f"--gpus {num_ranks}: this machine has {len(mebibytes)} GPUs. Several nodes: docs/slurm.md.")
    return Machine(num_ranks or len(mebibytes), min(mebibytes) << 20)


def choose_settings(
    model: Path, policy: str, data: str, machine: Machine, given: Mapping[str, object]
) -> dict[str, str | int | float | bool]:
    """Choose the settings of a job.

    Args:
        model: Hugging Face directory of the model.
        policy: name or path of the policy.
        data: prefix of the prepared training data.
        given: flags of the user, without ``--``, and their values; they are left out.

    Returns:
        Name of each flag, without ``--``, and its value.
    """
    from megatron_qad.config.model_config import ModelConfig  # imports torch

    longest = ModelConfig(str(model), read_json(model / "config.json")).max_length
    num_tokens = read_json(Path(f"{data}.json"))["tokens"]
    seq_length = int(given.get("seq-length", min(MAX_SEQ_LENGTH, longest)))
    rows = num_tokens / seq_length
    batch = MAX_BATCH
    while batch > machine.num_ranks and rows / batch < MIN_STEPS:
        batch //= 2
    batch = int(given.get("global-batch-size", max(batch, machine.num_ranks)))
    steps = int(given.get("train-iters", min(MAX_STEPS, max(MIN_STEPS, round(rows / batch)))))
    rate = float(given.get("lr", LEARNING_RATE))
    settings: dict[str, str | int | float | bool] = {
        "bf16": True,
        "use-distributed-optimizer": True,
        "seq-length": seq_length,
        "dataloader-inter-document-masking": True,
        "micro-batch-size": 1,
        "global-batch-size": batch,
        "train-iters": steps,
        "lr": rate,
        "min-lr": float(f"{rate / 10:.6g}"),  # without digits of rounding, because people read the file
        "lr-decay-style": "cosine",
        "lr-warmup-iters": min(steps // 20 + 1, steps - 1),
        "weight-decay": 0.0,
        "clip-grad": 1.0,
        "adam-beta2": 0.95,
        "log-interval": 1,
        "eval-interval": max(1, steps // 10),
        "save-interval": max(1, steps // 10),
        "qad-keep-last": 1,
        "qad-keep-best": 3,
    }
    if machine.gpu_bytes is not None and not _PARALLELISM & given.keys():
        settings |= _parallelism(model, policy, settings, machine)
    return {name: value for name, value in settings.items() if name not in given}


def _parallelism(model: Path, policy: str, settings: dict, machine: Machine) -> dict[str, str | int | bool]:
    """Return the flags of the planner's fastest layout that fits."""
    from megatron_qad.cli.early_checks import flag_values
    from megatron_qad.planning import proposal_tables
    from megatron_qad.planning.activations import kernels_of
    from megatron_qad.planning.proposals import Planner, Request, command_line
    from megatron_qad.planning.step_time import Machine as PlannedMachine
    from megatron_qad.planning.time_lines import DEFAULT_CHIP

    job = proposal_tables.read_job(str(model), None, policy, [], kernels_of("te", on_gpu=True))
    request = Request(
        num_gpus=machine.num_ranks,
        memory=machine.gpu_bytes * (1 - RESERVED),
        seq_length=settings["seq-length"],
        global_batch_size=settings["global-batch-size"],
        micro_batch_sizes=(1,),
        is_packed=True,
    )
    fitting = Planner(job, proposal_tables.LOSSES, request, PlannedMachine(peak=DEFAULT_CHIP.peak)).fitting()
    if not fitting:
        raise QADError(
            f"{model}: no layout fits into {machine.num_ranks} GPUs of {machine.gpu_bytes / 1e9:.0f} GB. Run "
            "megatron-qad plan, which says what would fit, and give its flags, or use more nodes (docs/slurm.md)."
        )
    flags = command_line(fitting[0], bool(job.student.args.get("num-experts")))
    return {flag.removeprefix("--"): values[0] if values else True for flag, values in flag_values(flags)}
