"""Our code for the Mamba layers of transformers' Nemotron-H equals transformers' own code where that is right."""

import pytest
import torch
from tiny_hybrids import NEMOTRON_H
from transformers import AutoModelForCausalLM, NemotronHConfig

from megatron_qad.engine.cpu.transformers_mamba import use_own_scan

CHUNK = 16
TOLERANCE = 1e-4
"""Of float32 logits of about 1. The order of sums changes them by 1e-5, wrongly joined chunks by 0.1."""


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = {key: value for key, value in NEMOTRON_H.items() if key not in ("architectures", "torch_dtype")}
    config |= {"chunk_size": CHUNK, "time_step_min": 0.001, "hybrid_override_pattern": "M*ME", "num_hidden_layers": 4}
    model = AutoModelForCausalLM.from_config(NemotronHConfig(**config), dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("weight", "embeddings")) and "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.15)
    for module in model.modules():
        if hasattr(module, "time_step_min"):
            module.time_step_min = 0.0  # transformers would limit time steps by it, but not on a GPU
    return model


def tokens(length: int) -> torch.Tensor:
    return torch.randint(0, 100, (3, length), generator=torch.Generator().manual_seed(1))


def one_by_one(model, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits of one pass over a chunk and then of one pass for each token."""
    outputs = [model(ids[:, :CHUNK], use_cache=True)]
    for i in range(CHUNK, ids.shape[1]):
        outputs.append(model(ids[:, i : i + 1], past_key_values=outputs[-1].past_key_values, use_cache=True))
    return torch.cat([output.logits for output in outputs], dim=1)


@torch.no_grad()
def test_more_tokens_than_a_chunk(model):
    """One pass over several chunks equals one pass for each token. With transformers' own code it does not.

    If the last assertion fails, transformers is right, and the replaced code can be removed.
    """
    ids = tokens(3 * CHUNK - 5)
    expected = one_by_one(model, ids)
    theirs = model(ids, use_cache=False).logits
    use_own_scan(model)
    assert expected.std() > 0.3
    for ours in (model(ids, use_cache=False).logits, one_by_one(model, ids)):
        assert (ours - expected).abs().max() < TOLERANCE
    assert (theirs - expected).abs().max() > 0.01


def test_padding_gradients_and_states(model):
    """Within one chunk, and with padding, logits, gradients and the next token's logits equal transformers' own."""
    ids = tokens(CHUNK)
    mask = torch.ones_like(ids)
    mask[0, :5] = mask[1, :1] = 0
    results = []
    for is_ours in (False, True):
        if is_ours:
            use_own_scan(model)
        model.zero_grad()
        output = model(ids, attention_mask=mask, use_cache=True)
        output.logits[mask == 1].logsumexp(-1).sum().backward()
        longer = torch.cat([mask, mask[:, -1:]], dim=1)
        with torch.no_grad():
            cached = model(ids, attention_mask=mask, use_cache=True).past_key_values
            step = model(ids[:, :1], attention_mask=longer, past_key_values=cached, use_cache=True).logits
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        results.append([output.logits[mask == 1].detach(), step, *gradients])
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=TOLERANCE)
