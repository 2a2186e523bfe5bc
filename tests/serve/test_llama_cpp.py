"""llama.cpp converts our exports and answers as the decoded weights do in transformers.

llama.cpp ignores the scales of inputs: it computes W4A16, and rounds the inputs of NVFP4 weights to 8 bits. The
reference is a float32 model of the decoded weights whose inputs are rounded in the same way.
"""

from pathlib import Path

import numpy as np
import pytest
import tiny_students
import torch
import transformers
from decoded_export import shapes_of_plain_linears, write_decoded
from llama_cpp_inputs import RoundedInputs

MAX_KL = 3e-4
"""Differences in float32 flip single 8-bit codes: 7e-6 to 7e-5 were measured, and 4e-4 to 2e-3 against inputs that are
not rounded. The smallest mistake in a weight that was tried, doubled scales of o_proj, gives 0.15."""
CASES = [
    ("llama", "nvfp4", "modelopt"),
    ("llama", "nvfp4", "compressed-tensors"),
    ("llama", "head", "modelopt"),
    ("llama", "head", "compressed-tensors"),
    ("llama", "mixed", "modelopt"),
    ("llama", "w4a16", "compressed-tensors"),
    ("qwen3", "nvfp4", "modelopt"),
    ("qwen3", "nvfp4", "compressed-tensors"),
    ("qwen3_moe", "nvfp4", "modelopt"),
    ("qwen3_moe", "nvfp4", "compressed-tensors"),
]
REFUSED = {
    ("llama", "mixed", "compressed-tensors"): "multiple config groups",
    ("llama", "w4a16", "modelopt"): "broadcast",  # it takes the packed weights for FP8
}
"""What the converter does not know, and a part of its message."""


@pytest.fixture(scope="module")
def answers(tmp_path_factory, server, run_script) -> dict[tuple, tuple[Path, Path]]:
    """Export and output of llama.cpp for each case. One process runs all."""
    directory = tmp_path_factory.mktemp("llama_cpp")
    students = tiny_students.Students(directory, server)
    students.prepare(sorted({family for family, _, _ in CASES}))
    prompts = directory / "prompts.npy"
    np.save(prompts, tiny_students.tokens(num_rows=8, length=24).numpy())
    found = {}
    for case in [*CASES, *REFUSED]:
        found[case] = students.export(*case), directory / f"{'-'.join(case)}.npy"
    requests = [{"model": str(m), "prompts": str(prompts), "output": str(o)} for m, o in found.values()]
    run_script("llama_cpp_logprobs.py", requests, directory)
    return found


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_answers_match_the_decoded_weights(answers, case, tmp_path):
    export, output = answers[case]
    error = Path(f"{output}.error")
    assert not error.exists(), error.read_text()
    served = torch.from_numpy(np.load(output))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        write_decoded(export, tmp_path / "decoded"), dtype=torch.float32, experts_implementation="eager"
    )
    with torch.no_grad(), RoundedInputs(shapes_of_plain_linears(export)) as inputs:
        logits = model(tiny_students.tokens(num_rows=8, length=24), use_cache=False).logits[:, -1]
    assert inputs.num_rounded
    expected = logits.log_softmax(-1)
    assert served.isfinite().all()
    kl = (expected.exp() * (expected - served)).sum(-1).mean().item()
    uniform = (expected.exp() * (expected + np.log(expected.shape[-1]))).sum(-1).mean().item()
    print(f"{'-'.join(case)}: KL {kl:.1e}; of the uniform distribution {uniform:.2f}")
    assert uniform > 0.5  # the student says something
    assert kl < MAX_KL


@pytest.mark.parametrize("case", REFUSED, ids="-".join)
def test_layouts_that_the_converter_refuses(answers, case):
    """When this fails, llama.cpp has learned to read them: then docs/support.md can say more."""
    _, output = answers[case]
    assert not output.exists()
    assert REFUSED[case] in Path(f"{output}.error").read_text()
