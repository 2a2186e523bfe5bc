"""Functions that the ranks of test_hf_training run: QADTrainer on a tiny model, without Megatron's CPU backend."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, TrainerCallback, TrainingArguments  # noqa: F401

from megatron_qad import api
from megatron_qad.checkpoint import export_hf, validate  # noqa: F401  imported before the server forks
from megatron_qad.hf_training.qad_trainer import QADTrainer
from megatron_qad.hf_training.quantize_model import quantize_model


def train(
    student: str,
    teacher: str,
    rows: str,
    output: str,
    *,
    overrides: Sequence[str] = (),
    scales: str = "mse:frozen",
    record: str | None = None,
    resume: str | None = None,
    export: bool = False,
    samples: int = 16,
    **arguments,
) -> None:
    """Train the model in ``student`` and save it in ``output``; print what ``evaluate`` returns.

    Args:
        rows: file with {"train": rows, "eval": rows or None} from torch.save.
        record: file for the loss, gradient norm and masters of each step.
        resume: checkpoint from which training continues.
        overrides: rules after those of nvfp4-all-linear.
        export: export both layouts to ``output``-LAYOUT afterwards, and raise unless they are valid.
        arguments: of ``TrainingArguments``.
    """
    is_alone = os.environ["WORLD_SIZE"] == "1"
    if is_alone:
        _leave_launcher()
    data = torch.load(rows)
    settings = {"logging_steps": 1, "save_strategy": "no", "lr_scheduler_type": "constant", "learning_rate": 1e-3}
    settings |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 3}
    settings |= {"weight_decay": 0.01, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    settings |= {"ddp_backend": None if is_alone else "gloo", "train_sampling_strategy": "sequential"}
    trainer = QADTrainer(
        quantize_model(_load(student), api.Policy.load("nvfp4-all-linear", overrides), scales=scales),
        _load(teacher),
        TrainingArguments(output_dir=output, **(settings | arguments)),
        train_dataset=data["train"],
        eval_dataset=data["eval"],
        calibration_samples=samples,
    )
    steps = _Steps(trainer)
    trainer.add_callback(steps)
    trainer.train(resume_from_checkpoint=resume)
    metrics = trainer.evaluate() if data["eval"] is not None else {}
    trainer.save_model(f"{output}/final")
    if trainer.is_world_process_zero():
        for log, step in zip(
            [log for log in trainer.state.log_history if "grad_norm" in log], steps.steps, strict=False
        ):
            step |= {name: log[name] for name in ("loss", "grad_norm")}
        torch.save({"steps": steps.steps, "metrics": metrics, "log": trainer.state.log_history}, record or os.devnull)
    if export:
        for layout in ("modelopt", "compressed-tensors"):
            api.export_hf(f"{output}/final", f"{output}-{layout}", layout)
            result = api.validate(f"{output}-{layout}", against=student)
            assert not result.issues, result.issues


class _Steps(TrainerCallback):
    """Keeps the masters, and the amaxes of inputs, after each step."""

    def __init__(self, trainer: QADTrainer):
        self._trainer, self.steps = trainer, []

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.steps.append({"state": {name: x.clone() for name, x in self._trainer.model.state_dict().items()}})


def _leave_launcher() -> None:
    """Make this process one that no launcher has started."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]


def _load(directory: str):
    assert Path(directory).is_dir()
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def run_example(page: str, directory: str, replacements: dict[str, str]) -> None:
    """Run the Python block of a page in ``directory``, after replacing parts of it, each of which it must have."""
    (code,) = re.findall(r"^```python\n(.*?)^```$", Path(page).read_text(), re.DOTALL | re.MULTILINE)
    for old, new in replacements.items():
        assert old in code, old
        code = code.replace(old, new)
    _leave_launcher()
    os.chdir(directory)
    exec(compile(code, page, "exec"), {"__name__": "example"})
