"""Serves exports with vLLM's engine and writes the full log-probabilities. Runs in the serving environment.

    python vllm_logprobs.py REQUESTS.json

REQUESTS.json is a list of {"model": DIR, "prompts": FILE.npy, "output": FILE.npy, "bf16_inputs": false}. Prompts are
token ids [n, s]. The output is float32 [n, s, V]: at each position the log-probabilities of the next token. A model
that vLLM cannot serve gets OUTPUT.error with the message instead, and the next one follows. "bf16_inputs" rounds the
inputs of linears to bfloat16 before they are quantized, as they are in BF16 models.
"""

import gc
import json
import os
import sys
from pathlib import Path

import numpy as np
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory


def main(requests: list[dict]) -> None:
    for request in requests:
        os.environ.pop("QAD_BF16_INPUTS", None)
        if request["bf16_inputs"]:
            os.environ["QAD_BF16_INPUTS"] = "1"  # read by vllm_plugin/nvfp4_on_cpu.py
        try:
            np.save(request["output"], logprobs(request["model"], np.load(request["prompts"])))
        except Exception as error:  # vLLM raises many types; the test shows the message
            Path(request["output"] + ".error").write_text(f"{type(error).__name__}: {error}")
        gc.collect()  # the engine of this model, before the next one starts
        cleanup_dist_env_and_memory()


def logprobs(model: str, prompts: np.ndarray) -> np.ndarray:
    vocab_size = json.loads((Path(model) / "config.json").read_text())["vocab_size"]
    engine = LLM(
        model,
        dtype="float32",
        max_model_len=prompts.shape[1] + 1,
        # The start runs this many tokens and touches all cache blocks, so the defaults cost seconds.
        max_num_batched_tokens=prompts.size + len(prompts),
        max_num_seqs=len(prompts),
        num_gpu_blocks_override=len(prompts) * (prompts.shape[1] // 16 + 2),
        enforce_eager=True,
        max_logprobs=vocab_size,
        skip_tokenizer_init=True,
    )
    params = SamplingParams(
        temperature=0, max_tokens=1, prompt_logprobs=vocab_size, logprobs=vocab_size, detokenize=False
    )
    answers = engine.generate([{"prompt_token_ids": row.tolist()} for row in prompts], params, use_tqdm=False)
    result = np.full((*prompts.shape, vocab_size), np.nan, np.float32)
    for row, answer in zip(result, answers, strict=True):
        # A prompt's first token has no log-probabilities; those of the answer's first token are the last position's.
        for position, entries in zip(row, [*answer.prompt_logprobs[1:], answer.outputs[0].logprobs[0]], strict=True):
            position[list(entries)] = [entry.logprob for entry in entries.values()]
    return result


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
