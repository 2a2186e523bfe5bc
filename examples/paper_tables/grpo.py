"""Reinforcement learning with verified answers: GRPO (policy gradient with groups of sampled answers), by TRL.

    python grpo.py --model HF --prompts prompts.jsonl --output HF [--steps 100]

The reward is 1 for an answer that ends with the right result, and 0 otherwise.
"""

import argparse
import json
import sys
from pathlib import Path

from datasets import Dataset
from problems import is_right
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

sys.path.insert(0, str(Path(__file__).parents[2]))
from megatron_qad.engine.cpu.transformers_mamba import use_own_scan  # noqa: E402

MAX_ANSWER = 64
"""Tokens. The longest right answer has 56."""


def reward(completions: list[list[dict]], result: list[str], **_) -> list[float]:
    """Return the reward of each answer, [completions]."""
    records = ({"messages": answer, "result": end} for answer, end in zip(completions, result, strict=True))
    return [float(is_right(record)) for record in records]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face directory to start from")
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--groups", type=int, default=32, help="problems in a step (default: 32)")
    parser.add_argument("--group-size", type=int, default=8, help="answers to each problem (default: 8)")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    options = parser.parse_args()
    records = [json.loads(line) for line in options.prompts.read_text().split("\n")[:-1]]
    prompts = [[{"role": "user", "content": record["prompt"]}] for record in records]
    columns = {"prompt": prompts, "result": [record["result"] for record in records]}
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    batch = options.groups * options.group_size
    config = GRPOConfig(
        output_dir=f"{options.output}.trainer",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_steps=options.steps,
        learning_rate=options.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=5,
        per_device_train_batch_size=batch,
        num_generations=options.group_size,
        max_completion_length=MAX_ANSWER,
        temperature=1.0,
        top_k=0,
        beta=0.0,  # no penalty on the distance to the start
        logging_steps=5,
        disable_tqdm=True,
        save_strategy="no",
        report_to="none",
        seed=1,
    )
    model = AutoModelForCausalLM.from_pretrained(options.model)
    use_own_scan(model)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_dict(columns),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)


if __name__ == "__main__":
    main()
