"""vLLM's own loader holds exactly what we export: every weight, scale and expert, bit for bit. No kernel runs."""

from pathlib import Path

import pytest
import tiny_students
import torch
from engine_scripts import run_script
from safetensors.torch import load_file
from vllm_names import Comparison

CASES = [
    (family, policy, layout)
    for family in ("qwen3_moe", "nemotron_h")
    for policy in ("mixed-kv-fp8", "w4a16")
    for layout in ("modelopt", "compressed-tensors")
]
# Values that vLLM makes itself: placeholders of scales that no checkpoint has.
OWN = ("q_scale", "prob_scale", "zero_point")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory, server) -> dict[tuple, tuple[Path, Path]]:
    """Export and vLLM's parameters for each case. One process loads all."""
    directory = tmp_path_factory.mktemp("vllm_loader")
    students = tiny_students.Students(directory, server)
    students.prepare(sorted({family for family, _, _ in CASES}))
    found = {case: (students.export(*case), directory / f"{'-'.join(case)}.pt") for case in CASES}
    requests = [{"model": str(export), "output": str(output)} for export, output in found.values()]
    (directory / "log").write_text(run_script("vllm_load.py", requests, directory))
    return found


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_every_tensor_is_loaded_unchanged(loaded, case):
    export, output = loaded[case]
    error = Path(f"{output}.error")
    assert not error.exists(), error.read_text()
    held = torch.load(output)
    held.pop("not loaded")
    comparison = Comparison(load_file(export / "model.safetensors"), held)
    comparison.run()
    assert not comparison.different, comparison.different[:10]
    others = {name for name in held if not name.endswith(OWN)} - comparison.compared
    assert not others, sorted(others)[:10]
