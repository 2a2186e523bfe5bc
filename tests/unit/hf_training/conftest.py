"""Tiny transformers models."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_qad.hf_training.input_calibration import calibrating
from megatron_qad.hf_training.quantize_model import quantization_of, quantize_model

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 2,
    "vocab_size": 101,
}


@pytest.fixture
def make_model():
    """Return a maker of random float32 models: (model_type, entries of the config) -> model."""

    def make(model_type: str = "llama", **entries):
        torch.manual_seed(0)
        config = AutoConfig.for_model(model_type, **(SIZES | entries))
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()

    return make


@pytest.fixture
def tokens():
    return torch.randint(0, SIZES["vocab_size"], (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def make_student(make_model, tokens):
    """Return a maker of quantized and calibrated models: (policy, arguments of quantize_model) -> model."""

    def make(policy="nvfp4-all-linear", model_type: str = "llama", **arguments):
        model = quantize_model(make_model(model_type), policy, **arguments)
        with torch.no_grad(), calibrating(quantization_of(model)):
            model(tokens)
        return model

    return make
