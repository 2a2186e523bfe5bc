"""Models of Transformer Engine's layer spec and of the local one are one model: names, shards, values, files."""

from pathlib import Path

import pytest
import tiny_hybrids
import tiny_job
import tiny_models
import torch
from launch import run_workers

HERE = Path(__file__).parent
CASES = ("llama-tied", "llama3-rope", "qwen2", "qwen3")
# Linears, and linears with a quantized input: a Mamba layer has 2, attention 2, an MLP 2, a layer of experts 2 each and
# perhaps 2 around them.
HYBRIDS = {
    "nemotron-h": 2 * 2 + 2 + 2 + 2 * (8 + 1) * 2,
    "nemotron-h, latent experts": 2 + 2 + 2 * ((8 + 1) * 2 + 2),
    "qwen3-moe": 2 * (2 + 8 * 2),
}
ATTENTIONS = {"nemotron-h": 1, "nemotron-h, latent experts": 1, "qwen3-moe": 2}


@pytest.fixture(scope="module", params=[1, 2], ids=["tp1", "tp2"])
def compared(request, tmp_path_factory):
    """Every case imported, built, saved and loaded by both specs at this tensor-parallel size, and exported."""
    root = tmp_path_factory.mktemp(f"te{request.param}")
    imports, models, exports = [], [], []
    for case in (*CASES, *HYBRIDS):
        if case in HYBRIDS:
            config = tiny_hybrids.CASES[case] | {"torch_dtype": "bfloat16"}
            tiny_job.write_hf(root / "hf" / case, config, dtype=torch.bfloat16)
        else:
            tiny_models.make(case, root / "hf" / case, torch.bfloat16)
        imports.append([str(root / "hf" / case), str(root / "imported" / case), "bfloat16"])
        saved = root / "saved" / case
        models.append({"case": case, "checkpoint": str(root / "imported" / case), "saved": str(saved)})
        for spec in ("local", "te"):
            for layout in ("bf16", "modelopt"):
                exports.append([str(saved / spec), str(root / "out" / case / spec / layout), layout, 10**9])
    arguments = {"imports": imports, "models": models, "tp": request.param}
    results = run_workers(HERE / "worker_te.py", request.param, arguments)
    run_workers(HERE.parent / "dist" / "worker_models.py", 1, {"exports": exports})
    return root, {result["case"]: result for result in results}


@pytest.mark.parametrize("case", CASES)
def test_names_shards_values_and_quantizers_agree(compared, case):
    """As imported, with quantizers, and each spec's checkpoint in a model of the other."""
    result = compared[1][case]
    assert result["problems"] == []
    blocks = tiny_models.config_of(case).num_hidden_layers
    assert result["linears"] == 4 * blocks  # qkv, proj, fc1, fc2
    assert result["quantizers"] == 6 * blocks  # their inputs, and an FP8 cache's keys and values
    assert result["tensors"] > 6 * blocks


@pytest.mark.parametrize("case", HYBRIDS)
def test_a_hybrid_agrees(compared, case):
    """The same for Mamba layers and experts, each of them with a quantizer of its own."""
    result = compared[1][case]
    assert result["problems"] == []
    assert result["linears"] == HYBRIDS[case]
    assert result["quantizers"] == HYBRIDS[case] + 2 * ATTENTIONS[case]


@pytest.mark.parametrize("case", (*CASES, *HYBRIDS))
def test_te_saved_checkpoint_exports_to_the_bytes_that_were_imported(compared, case):
    """Quantized linears to their values on the grid, as of the local spec's checkpoint."""
    root, _ = compared
    outputs = root / "out" / case
    given, found, local = _tensors(root / "hf" / case), _tensors(outputs / "te/bf16"), _tensors(outputs / "local/bf16")
    packed = {
        name.removesuffix("_scale") for name in _tensors(outputs / "te/modelopt") if name.endswith("weight_scale")
    }
    assert set(given) == set(found) and packed < set(given)
    for name in given:
        expected = local[name] if name in packed else given[name]
        assert torch.equal(found[name].view(torch.uint8), expected.view(torch.uint8)), name
        assert torch.equal(found[name], given[name]) == (name not in packed), name


@pytest.mark.parametrize("case", (*CASES, *HYBRIDS))
def test_te_saved_checkpoint_exports_to_the_nvfp4_bytes_of_the_local_one(compared, case):
    root, _ = compared
    local, te = (root / "out" / case / spec / "modelopt" for spec in ("local", "te"))
    names = sorted(file.name for file in local.iterdir())
    assert names == sorted(file.name for file in te.iterdir())
    for name in set(names) - {"qad_export.json"}:  # which says from where it was made
        assert (local / name).read_bytes() == (te / name).read_bytes(), name
    for part in ("weight_scale_2", "k_proj.k_scale", "v_proj.v_scale"):
        assert any(name.endswith(part) for name in _tensors(te)), f"no {part}: nothing was quantized"


def _tensors(directory: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}
