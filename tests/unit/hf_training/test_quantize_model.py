"""Which models and policies quantize_model takes, and what it refuses by name."""

import pytest
import torch

from megatron_qad.engine.errors import QADError
from megatron_qad.hf_training.quantize_model import quantization_of, quantize_model
from megatron_qad.hf_training.quantized_linear import QuantizedLinear
from megatron_qad.quantization.policy import Policy


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_dense_families(make_student, tokens, model_type):
    """All linears of the decoder are quantized; q, k, v and gate, up share their scales."""
    entries = make_student(model_type=model_type)
    linears = {name: m for name, m in entries.named_modules() if isinstance(m, QuantizedLinear)}
    assert len(linears) == 14 and type(entries.lm_head) is torch.nn.Linear
    groups = [sorted(name.rpartition(".")[2] for name, m in linears.items() if m.group is g) for g in _groups(entries)]
    assert groups == [["k_proj", "q_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]] * 2
    attention = entries.model.layers[0].self_attn
    assert torch.equal(attention.q_proj.weight_amax, attention.v_proj.weight_amax)
    assert entries(tokens).logits.isfinite().all()
    assert (attention.q_proj.bias is not None) == (model_type == "qwen2")


def _groups(model):
    return quantization_of(model).groups


def test_policies_and_overrides(make_model):
    policy = Policy.load("nvfp4-all-linear", ["head=nvfp4", "attention=bf16", "mlp=nvfp4-w4a16:max"])
    model = quantize_model(make_model(), policy)
    assert type(model.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    names = {name.partition(".")[0] for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert names == {"model", "lm_head"}
    down, head = model.model.layers[0].mlp.down_proj, model.lm_head
    assert {name for name, _ in down.named_buffers()} == set()
    assert {name for name, _ in head.named_buffers()} == {"input_amax", "weight_amax", "weight_block_scales"}


def test_bf16_policy_changes_nothing(make_model, tokens):
    model = make_model()
    expected = model(tokens).logits
    assert torch.equal(quantize_model(model, "bf16")(tokens).logits, expected)


def test_a_tied_head_stays(make_model):
    quantize_model(make_model(tie_word_embeddings=True))
    with pytest.raises(QADError, match="tied to its embedding"):
        quantize_model(make_model(tie_word_embeddings=True), Policy.load("nvfp4-all-linear", ["head=nvfp4"]))


def test_other_models_are_refused_by_name(make_model):
    with pytest.raises(QADError, match="Qwen3MoeForCausalLM: QADTrainer trains LlamaForCausalLM.*megatron-qad train"):
        quantize_model(make_model("qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32))
    with pytest.raises(QADError, match="GPT2LMHeadModel"):
        quantize_model(make_model("gpt2", n_embd=64, n_layer=1, n_head=4))
    with pytest.raises(QADError, match="is bfloat16, expected float32.*bf16=True"):
        quantize_model(make_model().to(torch.bfloat16))
    with pytest.raises(QADError, match="bias: is not a parameter of LlamaForCausalLM"):
        quantize_model(make_model(attention_bias=True))
    with pytest.raises(QADError, match="quantized already"):
        quantize_model(quantize_model(make_model()))
    with pytest.raises(QADError, match="the model is not quantized"):
        quantization_of(make_model())


def test_policies_that_only_megatrons_jobs_have(make_model):
    with pytest.raises(QADError, match="kv_cache is fp8"):
        quantize_model(make_model(), Policy.load("nvfp4-all-linear", ["kv_cache=fp8"]))
    with pytest.raises(QADError, match="local_hessian.*mse_sweep"):
        quantize_model(make_model(), scales="local_hessian:frozen")
    with pytest.raises(QADError, match="found scales 'mean'"):
        quantize_model(make_model(), scales="mean")


def test_the_source_directory_is_remembered(make_model, tmp_path):
    make_model().save_pretrained(tmp_path)
    loaded = type(make_model()).from_pretrained(tmp_path, dtype=torch.float32)
    assert quantization_of(quantize_model(loaded)).source == tmp_path
    assert quantization_of(quantize_model(make_model())).source is None
