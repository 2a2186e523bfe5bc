"""The exported checkpoint in plain transformers beside the Megatron student it was made from: logits, and a generated
answer.

Run by run.sh with pretrain_qad.py's arguments and ``--hf-model DIR``, the exported directory in the compressed-tensors
layout.
"""

import argparse
import sys

from megatron_qad.runtime import prepare

prepare(to_compute=True)

import torch  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.training.initialize import initialize_megatron  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from megatron_qad.models.builder import freeze  # noqa: E402
from megatron_qad.models.weights import load_weights  # noqa: E402
from megatron_qad.quantization.activations import InputQuantizers  # noqa: E402
from megatron_qad.quantization.weights import InPlaceWeights  # noqa: E402
from megatron_qad.training.arguments import model_config, parse_arguments  # noqa: E402
from megatron_qad.training.batch import Batch, logits_of  # noqa: E402
from megatron_qad.training.setup import resolve_formats  # noqa: E402

PROMPT = "Explain in two sentences why ships need lighthouses."


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--hf-model", required=True)
    own, rest = parser.parse_known_args()
    args = parse_arguments(rest)
    initialize_megatron()
    tokenizer = AutoTokenizer.from_pretrained(own.hf_model)
    exported = AutoModelForCausalLM.from_pretrained(own.hf_model, dtype=torch.bfloat16).eval()
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = exported.generate(**chat, max_new_tokens=60, do_sample=False)
    print("prompt:  ", PROMPT)
    print("answer:  ", tokenizer.decode(answer[0, chat["input_ids"].shape[1] :], skip_special_tokens=True))
    with torch.no_grad():
        ours = megatron_logits(args, answer)
        theirs = exported(answer).logits[..., : ours.shape[-1]].float()
    print_agreement(ours, theirs)


def megatron_logits(args: argparse.Namespace, tokens: torch.Tensor) -> torch.Tensor:
    """float32 [b, s, V] of the student of ``--load``, with quantized weights and inputs."""
    config = model_config(args, args.hf_config)
    builder = config.get_builder_cls()(config)
    chunks = builder.build_distributed_models(
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(), wrap_with_ddp=False
    )
    formats = resolve_formats(args)
    inputs = InputQuantizers([chunk.module for chunk in chunks], formats)
    inputs.expect_amax()
    load_weights(chunks, args.load, with_amaxes=True)
    assert inputs.calibrated, f"{args.load} was saved before calibration"
    model = freeze(chunks[0])
    position_ids = torch.arange(tokens.shape[1])[None]
    with InPlaceWeights(chunks, formats).on_grid(then_updated=False):
        logits = logits_of(model, Batch(tokens=tokens, position_ids=position_ids))
    return logits[..., : args.hf_config["vocab_size"]].float()


def print_agreement(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    log_p, log_q = ours.log_softmax(-1), theirs.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    error = ((ours - theirs).norm() / ours.norm()).item()
    same = (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item()
    print(f"logits of {ours.shape[1]} tokens, Megatron student against transformers: relative error {error:.4f},")
    print(f"KL {kl:.6f}, same most likely token {same:.3f}")


if __name__ == "__main__":
    sys.exit(main())
