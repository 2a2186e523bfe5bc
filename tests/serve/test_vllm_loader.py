"""vLLM's own loader holds exactly what we export: every weight, scale and expert, bit for bit. No kernel runs."""

from pathlib import Path

import pytest
import tiny_students
import torch
from safetensors.torch import load_file
from vllm_names import Comparison

CASES = [
    (family, policy, layout)
    for family in ("qwen3_moe", "nemotron_h")
    for policy in ("kv-fp8", "mixed-kv-fp8", "w4a16")
    for layout in ("modelopt", "compressed-tensors")
]
CASES.append(("nemotron_vl", "nvfp4", "modelopt"))
REFUSED = {("nemotron_h", "mixed-kv-fp8", "compressed-tensors"): "same quantization scheme"}
"""Exports that vLLM does not load, and a part of its message."""
OWN = ("q_scale", "prob_scale", "zero_point", ".ls1", ".ls2")
"""Placeholders that vLLM makes for every attention layer, and layer scales of RADIO. Exports do not have these."""
OWN_OF_POLICY = {"nvfp4": ("k_scale", "v_scale"), "w4a16": ("k_scale", "v_scale", "input_scale", "input_global_scale")}
"""Placeholders of scales that vLLM ignores or sets to one under a policy."""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory, server, run_script) -> dict[tuple, tuple[Path, Path]]:
    """Export and vLLM's parameters for each case. One process loads all."""
    directory = tmp_path_factory.mktemp("vllm_loader")
    students = tiny_students.Students(directory, server, dtype="bfloat16")  # vLLM's dtype: nothing is cast
    students.prepare(sorted({family for family, _, _ in CASES}))
    found = {case: (students.export(*case), directory / f"{'-'.join(case)}.pt") for case in CASES}
    requests = [{"model": str(export), "output": str(output)} for export, output in found.values()]
    run_script("vllm_load.py", requests, directory)
    return found


@pytest.mark.parametrize("case", [case for case in CASES if case not in REFUSED], ids="-".join)
def test_every_tensor_is_loaded_unchanged(loaded, case):
    export, output = loaded[case]
    error = Path(f"{output}.error")
    assert not error.exists(), error.read_text()
    held = torch.load(output)
    not_loaded = set(held.pop("not loaded"))
    tensors = load_file(export / "model.safetensors")
    # They are carried as they are, here in float32, and vLLM casts them to its dtype.
    tensors |= {
        name: tensor.bfloat16() for name, tensor in tensors.items() if name.startswith(("vision_model.", "mlp1."))
    }
    comparison = Comparison(tensors, held)
    comparison.run()
    assert not comparison.different, comparison.different[:10]
    assert not comparison.compared & not_loaded
    own = OWN + OWN_OF_POLICY.get(case[1], ())
    others = {name for name in held if not name.endswith(own)} - comparison.compared
    assert not others, sorted(others)[:10]


@pytest.mark.parametrize("case", REFUSED, ids="-".join)
def test_exports_that_vllm_refuses(loaded, case):
    """When this fails, vLLM has learned to read them: then docs/support.md can say more."""
    _, output = loaded[case]
    assert not output.exists()
    assert REFUSED[case] in Path(f"{output}.error").read_text()
