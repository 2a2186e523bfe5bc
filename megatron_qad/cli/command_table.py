"""The commands of ``megatron-qad``, in the order of the workflow."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """A command. Its code is ``cli/commands/NAME_command.py``."""

    summary: str
    """One line for ``megatron-qad --help``."""
    group: str
    """Heading under which the help lists it."""
    uses_all_gpus: bool = False
    """Whether it runs as one rank for each GPU."""
    takes_job_flags: bool = False
    """Whether it accepts the flags of ``megatron-qad train``."""


_JOB = {"uses_all_gpus": True, "takes_job_flags": True}

COMMANDS: dict[str, Command] = {
    "run": Command("all steps below in one command, from a model and chats to a checkpoint for vLLM", "Everything"),
    "import": Command("Hugging Face or Megatron checkpoint -> checkpoint of this project", "Models and data"),
    "prepare": Command("tokenize text or chats for training", "Models and data"),
    "generate": Command("sample training text from a model or a server", "Models and data"),
    "filter": Command("keep the correct answers of generated text", "Models and data"),
    "verify": Command("check prepared data completely", "Models and data"),
    "overlap": Command("count duplicates, and validation text in the training data", "Models and data"),
    "inspect": Command("which format a policy gives each layer", "Choices"),
    "plan": Command("parallelism that fits, its memory and time", "Choices"),
    "sensitivity": Command("which layers lose most in NVFP4; proposes a policy", "Choices", **_JOB),
    "smooth": Command("move activation outliers into weights", "Choices", **_JOB),
    "ptq": Command("post-training quantization: calibrate, save, validate", "Training", **_JOB),
    "train": Command("quantization-aware distillation (pretrain_qad.py)", "Training", **_JOB),
    "evaluate": Command("compare a model with its teacher, token by token", "Results", **_JOB),
    "compare": Command("table of evaluations, with intervals", "Results"),
    "noise-floor": Command("the KL below which differences are rounding noise", "Results", **_JOB),
    "select": Command("choose the best checkpoint of a run", "Results", takes_job_flags=True),
    "benchmark": Command("run benchmarks on a model or a server", "Results"),
    "compare-benchmarks": Command("table of benchmarks, with intervals", "Results"),
    "compare-answers": Command("length and repetition of sampled answers", "Results"),
    "export": Command("checkpoint -> Hugging Face directory in NVFP4", "Results"),
    "validate": Command("check an NVFP4 directory before it is served", "Results"),
    "report": Command("HTML report of several runs", "Results"),
}


def module_of(command: str) -> str:
    """Return the name of the module of a command.

    >>> module_of("noise-floor")
    'megatron_qad.cli.commands.noise_floor_command'
    """
    return f"megatron_qad.cli.commands.{command.replace('-', '_')}_command"
