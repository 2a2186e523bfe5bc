"""QAD with transformers' Trainer: train, export in both layouts, validate.

python examples/transformers_trainer/train.py --hf_model MODEL --data DATA --valid_data DATA_valid --output_dir RUN

MODEL is a directory, DATA the output of megatron-qad prepare. All options of TrainingArguments are flags. Several
processes: torchrun --nproc-per-node N before the script.
"""

from dataclasses import dataclass

import torch
from torch.utils.data import Subset
from transformers import AutoModelForCausalLM, HfArgumentParser, TrainingArguments

from megatron_qad.api import Policy, PreparedRows, QADTrainer, export_hf, quantize_model, validate


@dataclass
class Options:
    hf_model: str
    data: str
    valid_data: str
    policy: str = "nvfp4-all-linear"
    scales: str = "mse:frozen"
    loss: str = "kl"
    max_length: int = 1024
    valid_rows: int | None = None
    calibration_samples: int = 64


def main() -> None:
    options, args = HfArgumentParser((Options, TrainingArguments)).parse_args_into_dataclasses()
    held_out = PreparedRows(options.valid_data, options.max_length)
    student = AutoModelForCausalLM.from_pretrained(options.hf_model, dtype=torch.float32)
    teacher_dtype = torch.bfloat16 if args.bf16 else torch.float32
    trainer = QADTrainer(
        model=quantize_model(student, Policy.load(options.policy), scales=options.scales),
        teacher=AutoModelForCausalLM.from_pretrained(options.hf_model, dtype=teacher_dtype),
        args=args,
        train_dataset=PreparedRows(options.data, options.max_length),
        eval_dataset=Subset(held_out, range(options.valid_rows or len(held_out))),
        loss=options.loss,
        calibration_samples=options.calibration_samples,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    print("KL to the teacher:", trainer.evaluate()["eval_kl_to_teacher"])
    checkpoint = f"{args.output_dir}/final"
    trainer.save_model(checkpoint)
    trainer.accelerator.wait_for_everyone()  # only the first process writes the checkpoint; all of them export it
    for layout in ("modelopt", "compressed-tensors"):
        written = export_hf(checkpoint, f"{args.output_dir}/{layout}", layout)
        if trainer.is_world_process_zero():
            result = validate(written.directory, against=options.hf_model)
            print(*result.issues, result.summary(), sep="\n")


if __name__ == "__main__":
    main()
