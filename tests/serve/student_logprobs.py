"""Writes the full log-probabilities of a trained student in Megatron, with quantized weights and inputs, on all ranks.

    student_logprobs.py --prompts FILE.npy --output FILE.npy --qad-student RUN ...

with the flags of the job that saved RUN.

Prompts are token ids [n, s]; the output is float32 [n, s, V]: at each position the log-probabilities of the next token.
"""

import argparse

from megatron_qad.engine import init_runtime

init_runtime(for_compute=True)

import numpy as np  # noqa: E402
import torch  # noqa: E402
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region  # noqa: E402
from megatron.core.utils import unwrap_model  # noqa: E402
from megatron.training.initialize import initialize_megatron  # noqa: E402
from megatron.training.utils import is_rank0  # noqa: E402

from megatron_qad.models.builder import build_chunks, freeze  # noqa: E402
from megatron_qad.models.weight_loading import load_weights  # noqa: E402
from megatron_qad.training.batch import Batch  # noqa: E402
from megatron_qad.training.job import QADJob  # noqa: E402
from megatron_qad.training.models import model_config  # noqa: E402
from megatron_qad.training.start import read_command_line, start_job  # noqa: E402


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--output", required=True)
    options, job_argv = parser.parse_known_args(argv)
    job = start_job(read_command_line(job_argv, trains=False))
    initialize_megatron()
    logprobs = student_logprobs(job, torch.from_numpy(np.load(options.prompts)))
    if is_rank0():
        np.save(options.output, logprobs.numpy())


def student_logprobs(job: QADJob, tokens: torch.Tensor) -> torch.Tensor:
    """Return float32 [n, s, V] of the student of ``--qad-student``. Collective.

    tokens: int64 [n, s]
    """
    student = job.config.student
    run = student.checkpoint
    chunks = build_chunks(model_config(job.config, job.args, student))
    inputs, weights = job.quantize_activations(unwrap_model(chunks)), job.quantize_weights(unwrap_model(chunks))
    inputs.expect_amax(device=torch.cuda.current_device())
    load_weights(chunks, run, with_amaxes=True)
    assert inputs.calibrated, f"{run} was saved before calibration"
    model = freeze(chunks[0])
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.no_grad(), weights.quantized_weights(then_updated=False):
        logits = gather_from_tensor_model_parallel_region(job.forward(model, Batch(tokens, positions)))
    return logits[..., : student.vocab_size].float().log_softmax(-1)


if __name__ == "__main__":
    main()
