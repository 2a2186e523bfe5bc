"""Compares the fused output layer and loss with the unfused one and with float64, on one rank."""

import pytest
import torch
from reference_losses import expected

from megatron_qad.distillation import LOSSES, VocabShard, logit_losses
from megatron_qad.distillation.fused_linear import fused_linear_losses, tokens_per_chunk

SHAPE, VOCAB, PADDED, HIDDEN, TEACHER_HIDDEN = (2, 11), 40, 48, 16, 24
CASES = {
    "kl": [("kl", {})],
    "kl and ce": [("kl", {"temperature": 2.0}), ("ce", {})],
    "all of one round": [(name, {"k": 5} if name == "topk" else {}) for name in LOSSES if name != "jsd"],
}


def make_inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def make(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    hidden, weight = make(*SHAPE, HIDDEN), make(PADDED, HIDDEN) * 0.5
    teacher_hidden, teacher_weight = make(*SHAPE, TEACHER_HIDDEN), make(PADDED, TEACHER_HIDDEN) * 0.5
    labels = torch.randint(0, VOCAB, SHAPE, generator=generator)
    labels[0, 1] = -100
    token_weight = torch.rand(SHAPE, generator=generator)
    token_weight[1, 2:6] = 0
    return hidden, weight, teacher_hidden, teacher_weight, labels, token_weight


def fused(case, hidden, weight, teacher_hidden, teacher_weight, labels, token_weight, **settings):
    losses = [LOSSES[name](**loss_settings) for name, loss_settings in CASES[case]]
    inputs = (hidden, weight, teacher_hidden, teacher_weight, labels, VocabShard(0, VOCAB))
    return fused_linear_losses(losses, *inputs, token_weight=token_weight, **settings)


def total(losses):
    return sum((i + 1) * loss.sum() for i, loss in enumerate(losses))


@pytest.mark.parametrize("in_forward", [True, False], ids=["gradient in forward", "recomputed"])
@pytest.mark.parametrize("chunk_tokens", [1, 4, 100])
@pytest.mark.parametrize("case", CASES)
def test_equals_float64(case, chunk_tokens, in_forward):
    hidden, weight, teacher_hidden, teacher_weight, labels, token_weight = make_inputs()
    h, w = (t.double().requires_grad_() for t in (hidden, weight))
    logits, teacher = h @ w.t(), teacher_hidden.double() @ teacher_weight.double().t()
    counted, grad_logits = token_weight * (labels != -100), 0
    expected_losses = []
    for i, (name, settings) in enumerate(CASES[case]):
        loss, grad = expected(name, logits, teacher, labels.clamp(min=0), counted, columns=VOCAB, **settings)
        expected_losses.append(loss)
        grad_logits = grad_logits + (i + 1) * grad
    logits.backward(grad_logits)
    hidden.requires_grad_()
    weight.requires_grad_()
    inputs = (hidden, weight, teacher_hidden, teacher_weight, labels, token_weight)
    losses = fused(case, *inputs, chunk_tokens=chunk_tokens, gradient_in_forward=in_forward)
    total(losses).backward()
    for a, b in zip(losses, expected_losses, strict=True):
        # float32 logits of up to 10 are sums of 24 products; gradients of six losses with weights up to 6 are summed.
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hidden.grad.double(), h.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(weight.grad.double(), w.grad, rtol=1e-4, atol=1e-4)
    assert not hidden.grad[counted == 0].any() and not weight.grad[VOCAB:].any()


@pytest.mark.parametrize("in_forward", [True, False], ids=["gradient in forward", "recomputed"])
@pytest.mark.parametrize("case", CASES)
def test_equals_unfused_losses_in_bf16(case, in_forward):
    """Losses and hidden-state gradients are bit-identical if one chunk runs the same GEMM as the unfused form."""
    hidden, weight, teacher_hidden, teacher_weight, labels, token_weight = make_inputs(torch.bfloat16)
    token_weight, labels = token_weight + 0.1, labels.clamp(min=0)  # every token counts, so both GEMMs have all rows
    grads = []
    for is_fused in (True, False):
        h, w = (t.clone().requires_grad_() for t in (hidden, weight))
        if is_fused:
            inputs = (h, w, teacher_hidden, teacher_weight, labels, token_weight)
            outputs = fused(case, *inputs, gradient_in_forward=in_forward)
        else:
            losses = [LOSSES[name](**settings) for name, settings in CASES[case]]
            logits, teacher = h.flatten(0, 1) @ w.t(), teacher_hidden.flatten(0, 1) @ teacher_weight.t()
            shard, target = VocabShard(0, VOCAB), labels.flatten()
            plain = logit_losses(losses, logits, teacher, target, shard, weight=token_weight.flatten())
            assert all(torch.equal(a.flatten(), b) for a, b in zip(outputs, plain, strict=True))
            outputs = plain
        total(outputs).backward()
        grads.append((h.grad, w.grad))
    assert torch.equal(grads[0][0], grads[1][0])
    torch.testing.assert_close(grads[0][1], grads[1][1], rtol=2.0**-7, atol=1e-6)  # BF16 rounds a float32 sum once


class _GemmCounter(torch.utils._python_dispatch.TorchDispatchMode):
    num_gemms = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.num_gemms += function._schema.name in ("aten::mm", "aten::addmm", "aten::addmm_")
        return function(*args, **(kwargs or {}))


def test_number_of_gemms():
    """Four if the gradient is computed in the forward pass and the loss is summed, six with recomputation."""
    inputs = make_inputs()
    factors = torch.rand(SHAPE)
    grads, counts = [], []
    for in_forward, token_factors in ((True, None), (True, factors), (False, factors), (False, None)):
        h, w = (t.clone().requires_grad_() for t in inputs[:2])
        with _GemmCounter() as gemms:
            (loss,) = fused("kl", h, w, *inputs[2:], chunk_tokens=100, gradient_in_forward=in_forward)
            (3 * loss.sum() if token_factors is None else (loss * token_factors).sum()).backward()
        counts.append(gemms.num_gemms)
        grads.append((h.grad, w.grad))
    assert counts == [4, 8, 6, 6]  # the second also counts the GEMMs of the gradient that was discarded
    for a, b in ((0, 3), (1, 2)):
        torch.testing.assert_close(
            grads[a], grads[b], rtol=1e-5, atol=1e-6
        )  # float32: a sum times three, or a sum of tripled terms


def test_default_of_gradient_in_forward_depends_on_memory():
    shard, kl = VocabShard(0, 40), [LOSSES["kl"]()]
    for tokens, hidden, expected_gemms in ((32, 32, 4), (31, 32, 6), (32, 33, 6)):
        h, w = torch.randn(tokens, hidden).bfloat16(), torch.randn(40, hidden).bfloat16()
        with _GemmCounter() as gemms:
            inputs = (h.requires_grad_(), w.requires_grad_(), h.detach(), w.detach(), None, shard)
            fused_linear_losses(kl, *inputs)[0].sum().backward()
        assert gemms.num_gemms == expected_gemms


class _LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Records the size of the largest tensor that any operation returned, in elements."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


def test_no_tensor_of_size_tokens_times_vocabulary():
    tokens, vocab, hidden = 64, 512, 8
    weight = torch.randn(vocab, hidden, requires_grad=True)
    h, t = torch.randn(tokens, hidden, requires_grad=True), torch.randn(tokens, hidden)
    with _LargestTensor() as recorder:
        shard = VocabShard(0, vocab)
        inputs = (h, weight, t, weight.detach(), None, shard)
        (loss,) = fused_linear_losses([LOSSES["kl"]()], *inputs, chunk_tokens=4)
        loss.sum().backward()
    # The four float32 tiles of a chunk are one allocation; next in size are the weights and their gradient.
    assert 4 * vocab <= recorder.largest <= max(4 * 4 * vocab, vocab * hidden) < tokens * vocab


@pytest.mark.parametrize("in_forward", [True, False], ids=["gradient in forward", "recomputed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_main_grad(dtype, in_forward):
    """The gradient is added to main_grad as DDP's hook would do, and autograd adds nothing to it."""
    inputs = make_inputs(dtype)
    weight = inputs[1].requires_grad_()
    total(fused("kl", inputs[0], weight, *inputs[2:], gradient_in_forward=in_forward)).backward()
    expected_grad, weight.grad = weight.grad.float(), None
    weight.main_grad, weight.grad_added_to_main_grad = torch.ones(weight.shape), False
    total(fused("kl", inputs[0], weight, *inputs[2:], gradient_in_forward=in_forward)).backward()
    rtol = 1e-6 if dtype == torch.float32 else 2.0**-8  # main_grad is float32, the gradient was rounded
    torch.testing.assert_close(weight.main_grad - 1, expected_grad, rtol=rtol, atol=1e-6)
    assert weight.grad_added_to_main_grad

    # Tied weight: autograd adds the embedding's gradient to the same .grad, which DDP then adds to main_grad.
    weight.grad, weight.zero_out_wgrad = None, True
    embedded = torch.nn.functional.embedding(torch.tensor([3]), weight)
    (total(fused("kl", inputs[0], weight, *inputs[2:], gradient_in_forward=in_forward)) + embedded.sum()).backward()
    assert torch.equal(weight.grad[3], torch.ones(HIDDEN, dtype=dtype))
    assert weight.grad.count_nonzero() == HIDDEN


def test_frozen_output_layer_and_fully_masked_batch():
    hidden, weight, *inputs = make_inputs()
    hidden.requires_grad_()
    total(fused("kl", hidden, weight, *inputs)).backward()
    assert weight.grad is None and hidden.grad.any()
    hidden.grad = None
    out = fused("kl", hidden, weight.requires_grad_(), *inputs[:-1], inputs[-1] * 0)
    total(out).backward()
    assert not out[0].any() and not hidden.grad.any() and not weight.grad.any()


def test_invalid_inputs_raise():
    hidden, weight, teacher_hidden, teacher_weight, labels, _ = make_inputs()
    shard, kl = VocabShard(0, VOCAB), [LOSSES["kl"]()]
    with pytest.raises(ValueError, match="JSD needs the logits twice and cannot be fused"):
        fused_linear_losses([LOSSES["jsd"]()], hidden, weight, teacher_hidden, teacher_weight, labels, shard)
    with pytest.raises(ValueError, match="KL needs the teacher's logits"):
        fused_linear_losses(kl, hidden, weight, None, None, labels, shard)
    with pytest.raises(ValueError, match="expected the same tokens"):
        fused_linear_losses(kl, hidden, weight, teacher_hidden[:1], teacher_weight, labels, shard)
    with pytest.raises(ValueError, match="expected the same V/tp"):
        fused_linear_losses(kl, hidden, weight, teacher_hidden, teacher_weight[:40], labels, shard)


def test_tokens_per_chunk():
    """The logits of both models fill the budget; a very wide vocabulary still gets 128 tokens per GEMM."""
    assert tokens_per_chunk(131072, 2, "cpu") == 512 and tokens_per_chunk(16384, 2, "cpu") == 4096
    assert tokens_per_chunk(131072, 2, "cuda") == 4096 and tokens_per_chunk(1 << 20, 4, "cpu") == 128
