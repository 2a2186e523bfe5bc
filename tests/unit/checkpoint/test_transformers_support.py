"""Exports that transformers would load wrongly: the facts, with the real transformers, and its refusal of our exports.

When a test of the facts fails, transformers was fixed: then ``transformers_support`` should claim less.
"""

import json
import sys
from pathlib import Path

import pytest
import tiny_hybrids
import torch
import transformers
from safetensors.torch import load_file

from megatron_qad.checkpoint.expected_tensors import inventory
from megatron_qad.checkpoint.hf_writer import write_hf_checkpoint
from megatron_qad.checkpoint.transformers_support import WEIGHTS_KEY, refused_by_transformers, transformers_problem
from megatron_qad.formats.format_registry import FORMATS

sys.path.insert(0, str(Path(__file__).parent))
from exported import CONFIG, edit_json, issues, items, linears  # noqa: E402  (a helper module in this directory)

QWEN3_MOE = tiny_hybrids.QWEN3_MOE | {"num_experts": 4, "hidden_size": 128, "head_dim": 32, "torch_dtype": "bfloat16"}
QWEN3_MOE |= {"moe_intermediate_size": 128}
NEMOTRON_H = tiny_hybrids.NEMOTRON_H | {"n_routed_experts": 4, "torch_dtype": "bfloat16"}
UNREADABLE = {"qwen3_moe": QWEN3_MOE, "nemotron_h": NEMOTRON_H}


def export(directory, config, fmt="nvfp4", layout="compressed-tensors"):
    stream = items(config, format_of=lambda module: fmt)
    return write_hf_checkpoint(stream, directory, config=config, layout=layout, linear_modules=linears_of(config))


def linears_of(config):
    model = inventory(config)
    return [*model.linears, *model.never_quantized]


def without_refusal(directory):
    edit_json(directory / "config.json", lambda config: config.pop(WEIGHTS_KEY))


def load(directory):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, output_loading_info=True)


def decoded(directory, fmt) -> dict[str, torch.Tensor]:
    """Return the decoded float32 weights of the experts' down projections, by name."""
    tensors, stored = load_file(directory / "model.safetensors"), FORMATS[fmt].stored["compressed-tensors"]
    weights = {}
    for name in (n for n in tensors if n.endswith("down_proj.weight_scale")):
        module = name.removesuffix(".weight_scale")
        codes = {role: tensors[f"{module}.{part}"] for role, (part, _) in stored.parts.items()}
        scale = 1 / codes.get("weight_scale", torch.ones(1)).reshape(())
        weights[module] = FORMATS[fmt].weight.dequantize(codes, scale, torch.float32)
    return weights


@pytest.mark.parametrize("fmt", ["nvfp4", "nvfp4-w4a16", "int4-w4a16"])
def test_experts_in_transformers(tmp_path, fmt):
    """NVFP4 experts lack their global scale, by which they are too large, without an error; INT4 experts are right."""
    written = export(tmp_path / "out", QWEN3_MOE, fmt)
    is_garbage = written.transformers_problem is not None
    if is_garbage:
        without_refusal(tmp_path / "out")
    model, info = load(tmp_path / "out")
    expert, weight = "model.layers.1.mlp.experts.3", model.model.layers[1].mlp.experts.down_proj[3].float()
    expected = decoded(tmp_path / "out", fmt)[f"{expert}.down_proj"]
    # BF16 keeps 8 bits.
    is_equal = torch.allclose(weight, expected, rtol=2**-7, atol=1e-6)
    assert is_equal != is_garbage
    assert (f"{expert}.down_proj.weight_global_scale" in info["unexpected_keys"]) == is_garbage == (fmt != "int4-w4a16")
    assert not info["missing_keys"]
    if is_garbage:
        assert weight.abs().max() > 100 * expected.abs().max()


def test_nemotron_h_in_transformers(tmp_path):
    """None of its packed weights is found; the linears keep random weights."""
    export(tmp_path / "out", NEMOTRON_H)
    without_refusal(tmp_path / "out")
    try:
        _, info = load(tmp_path / "out")
    except Exception as error:  # a later version may refuse it, which is as good
        pytest.fail(f"transformers now refuses it by itself: {error}. Then transformers_support need not.")
    assert any("in_proj.weight" in name for name in info["missing_keys"])


@pytest.mark.parametrize("family", UNREADABLE)
def test_transformers_refuses_exports_that_it_would_load_wrongly(tmp_path, family):
    written = export(tmp_path / "out", UNREADABLE[family])
    assert written.transformers_problem
    assert not [issue for issue in issues(tmp_path / "out") if issue.startswith("config.json")]
    with pytest.raises(ValueError, match="this export is for vLLM: transformers "):
        load(tmp_path / "out")
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").model_type == family  # as servers read it


def test_other_exports_are_not_refused(tmp_path):
    """Dense models, INT4 experts, quantized layers outside of the experts, and the modelopt layout."""
    attention = dict.fromkeys((m for m in linears_of(QWEN3_MOE) if "self_attn" in m), "nvfp4")
    experts = dict.fromkeys((m for m in linears_of(QWEN3_MOE) if ".experts." in m), "int4-w4a16")
    assert transformers_problem(QWEN3_MOE, "compressed-tensors", attention | experts) is None
    assert transformers_problem(QWEN3_MOE, "compressed-tensors", attention) is None
    assert transformers_problem(QWEN3_MOE, "bf16", {}) is None
    dense = dict.fromkeys(linears(), "nvfp4")
    assert transformers_problem(CONFIG, "compressed-tensors", dense) is None
    written = export(tmp_path / "modelopt", NEMOTRON_H, layout="modelopt")
    assert written.transformers_problem is None
    assert WEIGHTS_KEY not in json.loads((tmp_path / "modelopt" / "config.json").read_text())


def test_name_of_a_weight_file_of_the_source_is_dropped():
    """transformers would look for this file in the export."""
    assert refused_by_transformers({"a": 1, WEIGHTS_KEY: "other.safetensors"}, None) == {"a": 1}
    assert refused_by_transformers({}, "x") == {WEIGHTS_KEY: "this export is for vLLM: x"}
