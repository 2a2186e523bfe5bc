"""Compares the exported checkpoint in transformers with the student in Megatron, by logits; also generates an answer.

With unquantized inputs both run the same BF16 model and differ only in bfloat16 rounding. A larger error than MAX_ERROR
means that the models differ, and the exit status is 1. With NVFP4 inputs, the last bit of a value may decide its code,
and neighbouring codes differ by up to a third. So two correct implementations differ about as much as one of them from
itself with inputs perturbed by half a bfloat16 unit, which is printed for comparison.

Run by run.sh on one rank with the arguments of pretrain_qad.py, ``--hf-model DIR`` (the compressed-tensors export) and
``--text FILE``.
"""

import argparse
import os
import sys
from functools import partial
from pathlib import Path

from megatron_qad.engine import init_runtime

init_runtime(for_compute=True)

import torch  # noqa: E402
from megatron.training.initialize import initialize_megatron  # noqa: E402
from modelopt.torch.quantization.nn import register_quant_backend  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from megatron_qad.formats.nvfp4_format import NVFP4  # noqa: E402
from megatron_qad.models.builder import build_chunks, freeze  # noqa: E402
from megatron_qad.models.checkpoint_config import read_job  # noqa: E402
from megatron_qad.models.weight_loading import load_weights  # noqa: E402
from megatron_qad.quantization.activations import ActivationQuantizers, backend_of, quantize_input  # noqa: E402
from megatron_qad.quantization.in_place_weights import InPlaceWeights  # noqa: E402
from megatron_qad.quantization.scale_record import recorded_scales  # noqa: E402
from megatron_qad.training.batch import Batch  # noqa: E402
from megatron_qad.training.job import QADJob  # noqa: E402
from megatron_qad.training.models import model_config  # noqa: E402
from megatron_qad.training.start import read_command_line, start_job  # noqa: E402

PROMPT = "Explain in two sentences why ships need lighthouses."
NUM_TOKENS = 256
MAX_ERROR = 0.05
"""Limit of the relative error of logits. Measured: 0.013 to 0.016; 0.127 with a scale rule other than the export's."""


nvfp4_inputs = partial(quantize_input, NVFP4)


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--hf-model", required=True)
    parser.add_argument("--text", required=True)
    options, job_argv = parser.parse_known_args()
    if (num_ranks := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        sys.exit(
            f"error: compare.py runs on one rank, because it compares the logits of whole models; torchrun started "
            f"{num_ranks} ranks. Use NPROC_PER_NODE=1; the checkpoint may come from any number of ranks."
        )
    job = start_job(read_command_line(job_argv))
    initialize_megatron()
    tokenizer = AutoTokenizer.from_pretrained(options.hf_model)
    exported = AutoModelForCausalLM.from_pretrained(options.hf_model, dtype=torch.bfloat16).eval()
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = exported.generate(**chat, max_new_tokens=60, do_sample=False)
    print("prompt:  ", PROMPT)
    print("answer:  ", tokenizer.decode(answer[0, chat["input_ids"].shape[1] :], skip_special_tokens=True))
    tokens = tokenizer(Path(options.text).read_text(), return_tensors="pt")["input_ids"][:, :NUM_TOKENS]
    with torch.no_grad():
        ours = megatron_logits(job, tokens)
        print_agreement("NVFP4 inputs, Megatron against transformers", ours, exported(tokens).logits)
        perturbed = megatron_logits(job, tokens, lambda x, q: nvfp4_inputs(x * (1 + torch.randn_like(x) * 2**-9), q))
        print_agreement("NVFP4 inputs, Megatron against itself, perturbed", ours, perturbed)
        unquantized = megatron_logits(job, tokens, lambda x, quantizer: x)
        for module in exported.modules():  # turns input quantization off in compressed-tensors
            if getattr(module, "quantization_scheme", None) is not None:
                module.quantization_scheme.input_activations = None
        error = print_agreement(
            "unquantized inputs, Megatron against transformers", unquantized, exported(tokens).logits
        )
    if not error <= MAX_ERROR:
        sys.exit(
            f"error: the exported model differs from the student: relative error {error:.4f}, expected {MAX_ERROR} at "
            "most. Check the export."
        )


def megatron_logits(job: QADJob, tokens: torch.Tensor, quantize_inputs=nvfp4_inputs) -> torch.Tensor:
    """Return logits [b, s, V] of the student of ``--load``, with quantized weights.

    Args:
        quantize_inputs: function (inputs, quantizer) that quantizes the inputs of linear layers.
    """
    register_quant_backend(backend_of(NVFP4), quantize_inputs)
    load, student = job.args.load, job.config.student
    chunks = build_chunks(model_config(job.config, job.args, student))
    saved_job = read_job(Path(load))
    formats = saved_job["formats"]
    inputs = ActivationQuantizers([chunk.module for chunk in chunks], formats)
    inputs.expect_amax(device=torch.cuda.current_device())
    weights = InPlaceWeights(chunks, formats, scales=recorded_scales(saved_job, load))
    load_weights(chunks, load, with_amaxes=True)
    assert inputs.calibrated, f"{load} was saved before calibration"
    model = freeze(chunks[0])
    tokens = tokens.cuda()  # stays on the CPU where there is no GPU
    position_ids = torch.arange(tokens.shape[1], device=tokens.device)[None]
    with weights.quantized_weights(then_updated=False):
        logits = job.forward(model, Batch(tokens=tokens, position_ids=position_ids))
    return logits[..., : student.vocab_size].cpu()


def print_agreement(title: str, ours: torch.Tensor, other: torch.Tensor) -> float:
    """Print how two tensors of logits, [b, s, V], agree. Returns the relative error."""
    ours, other = ours.float(), other[..., : ours.shape[-1]].float()
    log_p, log_q = ours.log_softmax(-1), other.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    error = ((ours - other).norm() / ours.norm()).item()
    same = (ours.argmax(-1) == other.argmax(-1)).float().mean().item()
    print(
        f"{title}: relative error {error:.4f}, KL {kl:.5f}, same most likely token {same:.3f} ({ours.shape[1]} tokens)"
    )
    return error


if __name__ == "__main__":
    sys.exit(main())
