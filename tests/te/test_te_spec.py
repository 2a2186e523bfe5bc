"""Tests that Transformer Engine's layer spec and the local spec build and save the same model."""

from pathlib import Path

import pytest
import tiny_hybrids
import tiny_job
import tiny_models
import torch
from launch import run_workers

HERE = Path(__file__).parent
CASES = ("llama-tied", "llama3-rope", "qwen2", "qwen3")
# Number of Transformer Engine's linears, all with quantized inputs: 2 per Mamba layer, attention, MLP and shared
# expert, and 2 latent projections. Each layer of routed experts has 2 projections of ours, with one quantizer each.
HYBRIDS = {
    "nemotron-h": 2 * 2 + 2 + 2 + 2 * 2,
    "nemotron-h, latent experts": 2 + 2 + 2 * (2 + 2),
    "qwen3-moe": 2 * 2,
}
EXPERT_PROJECTIONS = dict.fromkeys(HYBRIDS, 2 * 2)
ATTENTIONS = {"nemotron-h": 1, "nemotron-h, latent experts": 1, "qwen3-moe": 2}


@pytest.fixture(scope="module", params=[1, 2], ids=["tp1", "tp2"])
def comparison(request, tmp_path_factory):
    """Import, build, save, load and export every case with both specs at this tensor-parallel size."""
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
def test_names_shards_values_and_quantizers_agree(comparison, case):
    """After import, with quantizers, and after loading the other spec's checkpoint."""
    result = comparison[1][case]
    assert result["problems"] == []
    blocks = tiny_models.config_of(case).num_hidden_layers
    assert result["linears"] == 4 * blocks  # qkv, proj, fc1, fc2
    assert result["quantizers"] == 6 * blocks  # inputs of the linears, and keys and values of the FP8 cache
    assert result["tensors"] > 6 * blocks


@pytest.mark.parametrize("case", HYBRIDS)
def test_hybrid_models_agree(comparison, case):
    """The same for models with Mamba layers and experts, whose layers share a quantizer per projection."""
    result = comparison[1][case]
    assert result["problems"] == []
    assert result["linears"] == HYBRIDS[case]
    assert result["quantizers"] == HYBRIDS[case] + EXPERT_PROJECTIONS[case] + 2 * ATTENTIONS[case]


@pytest.mark.parametrize("case", (*CASES, *HYBRIDS))
def test_bf16_export_of_te_checkpoint_equals_the_import(comparison, case):
    """Quantized linears are exported fake-quantized, with the same values as from the local spec's checkpoint."""
    root, _ = comparison
    outputs = root / "out" / case
    imported = _tensors(root / "hf" / case)
    te, local = _tensors(outputs / "te/bf16"), _tensors(outputs / "local/bf16")
    packed = {
        name.removesuffix("_scale") for name in _tensors(outputs / "te/modelopt") if name.endswith("weight_scale")
    }
    assert set(imported) == set(te) and packed < set(imported)
    for name in imported:
        expected = local[name] if name in packed else imported[name]
        assert torch.equal(te[name].view(torch.uint8), expected.view(torch.uint8)), name
        assert torch.equal(te[name], imported[name]) == (name not in packed), name


@pytest.mark.parametrize("case", (*CASES, *HYBRIDS))
def test_nvfp4_exports_of_both_specs_are_identical(comparison, case):
    root, _ = comparison
    local, te = (root / "out" / case / spec / "modelopt" for spec in ("local", "te"))
    names = sorted(file.name for file in local.iterdir())
    assert names == sorted(file.name for file in te.iterdir())
    for name in set(names) - {"qad_export.json"}:  # contains the path of the source checkpoint
        assert (local / name).read_bytes() == (te / name).read_bytes(), name
    for part in ("weight_scale_2", "k_proj.k_scale", "v_proj.v_scale"):
        assert any(name.endswith(part) for name in _tensors(te)), f"no {part}: nothing was quantized"


def _tensors(directory: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}
