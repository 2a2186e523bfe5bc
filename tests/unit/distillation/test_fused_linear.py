"""The fused output layer and loss against the unfused one and float64. Over ranks: tests/dist/test_loss_shards.py."""

import pytest
import torch
from reference_losses import expected

from megatron_qad.distillation import LOSSES, VocabShard, logit_losses
from megatron_qad.distillation.fused_linear import fused_linear_losses, tokens_of_chunk

SHAPE, VOCAB, PADDED, HIDDEN, TEACHER_HIDDEN = (2, 11), 40, 48, 16, 24
CASES = {
    "kl": [("kl", {})],
    "kl and ce": [("kl", {"temperature": 2.0}), ("ce", {})],
    "all of one round": [(name, {"k": 5} if name == "topk" else {}) for name in LOSSES if name != "jsd"],
}


def given(dtype=torch.float32):
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
    losses = [LOSSES[name](**given) for name, given in CASES[case]]
    inputs = (hidden, weight, teacher_hidden, teacher_weight, labels, VocabShard(0, VOCAB))
    return fused_linear_losses(losses, *inputs, token_weight=token_weight, **settings)


def total(losses):
    return sum((i + 1) * loss.sum() for i, loss in enumerate(losses))


@pytest.mark.parametrize("in_forward", [True, False], ids=["gradient in forward", "recomputed"])
@pytest.mark.parametrize("chunk_tokens", [1, 4, 100])
@pytest.mark.parametrize("case", CASES)
def test_equals_float64(case, chunk_tokens, in_forward):
    hidden, weight, teacher_hidden, teacher_weight, labels, token_weight = given()
    h, w = (t.double().requires_grad_() for t in (hidden, weight))
    logits, teacher = h @ w.t(), teacher_hidden.double() @ teacher_weight.double().t()
    counted, grad_logits = token_weight * (labels != -100), 0
    wanted = []
    for i, (name, settings) in enumerate(CASES[case]):
        loss, grad = expected(name, logits, teacher, labels.clamp(min=0), counted, columns=VOCAB, **settings)
        wanted.append(loss)
        grad_logits = grad_logits + (i + 1) * grad
    logits.backward(grad_logits)
    hidden.requires_grad_()
    weight.requires_grad_()
    inputs = (hidden, weight, teacher_hidden, teacher_weight, labels, token_weight)
    found = fused(case, *inputs, chunk_tokens=chunk_tokens, gradient_in_forward=in_forward)
    total(found).backward()
    for a, b in zip(found, wanted, strict=True):
        # float32 logits of up to 10 are sums of 24 products; gradients of six losses, weighted up to 6, add up.
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hidden.grad.double(), h.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(weight.grad.double(), w.grad, rtol=1e-4, atol=1e-4)
    assert not hidden.grad[counted == 0].any() and not weight.grad[VOCAB:].any()


@pytest.mark.parametrize("in_forward", [True, False], ids=["gradient in forward", "recomputed"])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_unfused_losses_in_bf16(case, in_forward):
    """Bit for bit in the losses and the gradient of hidden states where one chunk does the unfused GEMM."""
    hidden, weight, teacher_hidden, teacher_weight, labels, token_weight = given(torch.bfloat16)
    token_weight, labels = token_weight + 0.1, labels.clamp(min=0)  # every token counts, so both GEMMs have all rows
    grads = []
    for is_fused in (True, False):
        h, w = (t.clone().requires_grad_() for t in (hidden, weight))
        if is_fused:
            inputs = (h, w, teacher_hidden, teacher_weight, labels, token_weight)
            found = fused(case, *inputs, gradient_in_forward=in_forward)
        else:
            losses = [LOSSES[name](**settings) for name, settings in CASES[case]]
            logits, teacher = h.flatten(0, 1) @ w.t(), teacher_hidden.flatten(0, 1) @ teacher_weight.t()
            shard, target = VocabShard(0, VOCAB), labels.flatten()
            plain = logit_losses(losses, logits, teacher, target, shard, weight=token_weight.flatten())
            assert all(torch.equal(a.flatten(), b) for a, b in zip(found, plain, strict=True))
            found = plain
        total(found).backward()
        grads.append((h.grad, w.grad))
    assert torch.equal(grads[0][0], grads[1][0])
    torch.testing.assert_close(grads[0][1], grads[1][1], rtol=2.0**-7, atol=1e-6)  # BF16 rounds a float32 sum once


class _Gemms(torch.utils._python_dispatch.TorchDispatchMode):
    number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += function._schema.name in ("aten::mm", "aten::addmm", "aten::addmm_")
        return function(*args, **(kwargs or {}))


def test_the_number_of_gemms():
    """Four where the gradient is made in the forward pass and the loss is summed; six elsewhere."""
    inputs = given()
    each = torch.rand(SHAPE)
    grads, numbers = [], []
    for in_forward, of_each in ((True, None), (True, each), (False, each), (False, None)):
        h, w = (t.clone().requires_grad_() for t in inputs[:2])
        with _Gemms() as gemms:
            (loss,) = fused("kl", h, w, *inputs[2:], chunk_tokens=100, gradient_in_forward=in_forward)
            (3 * loss.sum() if of_each is None else (loss * of_each).sum()).backward()
        numbers.append(gemms.number)
        grads.append((h.grad, w.grad))
    assert numbers == [4, 8, 6, 6]  # the second: those of a gradient that was made for nothing, too
    for a, b in ((0, 3), (1, 2)):
        torch.testing.assert_close(grads[a], grads[b], rtol=1e-5, atol=1e-6)  # float32: three times a sum or its terms


def test_the_gradient_is_made_in_the_forward_pass_where_that_costs_no_more_memory_than_logits():
    shard, kl = VocabShard(0, 40), [LOSSES["kl"]()]
    for tokens, hidden, gemms_wanted in ((32, 32, 4), (31, 32, 6), (32, 33, 6)):
        h, w = torch.randn(tokens, hidden).bfloat16(), torch.randn(40, hidden).bfloat16()
        with _Gemms() as gemms:
            inputs = (h.requires_grad_(), w.requires_grad_(), h.detach(), w.detach(), None, shard)
            fused_linear_losses(kl, *inputs)[0].sum().backward()
        assert gemms.number == gemms_wanted


class _Recorder(torch.utils._python_dispatch.TorchDispatchMode):
    """The largest tensor any operation returned, in elements."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


def test_no_tensor_of_tokens_times_vocabulary():
    tokens, vocab, hidden = 64, 512, 8
    weight = torch.randn(vocab, hidden, requires_grad=True)
    h, t = torch.randn(tokens, hidden, requires_grad=True), torch.randn(tokens, hidden)
    with _Recorder() as recorder:
        shard = VocabShard(0, vocab)
        inputs = (h, weight, t, weight.detach(), None, shard)
        (loss,) = fused_linear_losses([LOSSES["kl"]()], *inputs, chunk_tokens=4)
        loss.sum().backward()
    # Four float32 tiles of a chunk are one allocation; weights and their gradient are what is largest after it.
    assert 4 * vocab <= recorder.largest <= max(4 * 4 * vocab, vocab * hidden) < tokens * vocab


@pytest.mark.parametrize("in_forward", [True, False], ids=["gradient in forward", "recomputed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_main_grad(dtype, in_forward):
    """What DDP's hook and autograd would do without us, and what they then leave alone."""
    inputs = given(dtype)
    weight = inputs[1].requires_grad_()
    total(fused("kl", inputs[0], weight, *inputs[2:], gradient_in_forward=in_forward)).backward()
    wanted, weight.grad = weight.grad.float(), None
    weight.main_grad, weight.grad_added_to_main_grad = torch.ones(weight.shape), False
    total(fused("kl", inputs[0], weight, *inputs[2:], gradient_in_forward=in_forward)).backward()
    rtol = 1e-6 if dtype == torch.float32 else 2.0**-8  # main_grad is float32, the gradient was rounded
    torch.testing.assert_close(weight.main_grad - 1, wanted, rtol=rtol, atol=1e-6)
    assert weight.grad_added_to_main_grad

    # Tied: the embedding's gradient arrives through autograd, in the same .grad, which DDP then adds to main_grad.
    weight.grad, weight.zero_out_wgrad = None, True
    embedded = torch.nn.functional.embedding(torch.tensor([3]), weight)
    (total(fused("kl", inputs[0], weight, *inputs[2:], gradient_in_forward=in_forward)) + embedded.sum()).backward()
    assert torch.equal(weight.grad[3], torch.ones(HIDDEN, dtype=dtype))
    assert weight.grad.count_nonzero() == HIDDEN


def test_a_frozen_output_layer_and_no_token():
    hidden, weight, *rest = given()
    hidden.requires_grad_()
    total(fused("kl", hidden, weight, *rest)).backward()
    assert weight.grad is None and hidden.grad.any()
    hidden.grad = None
    out = fused("kl", hidden, weight.requires_grad_(), *rest[:-1], rest[-1] * 0)
    total(out).backward()
    assert not out[0].any() and not hidden.grad.any() and not weight.grad.any()


def test_what_cannot_be_done_is_refused():
    hidden, weight, teacher_hidden, teacher_weight, labels, _ = given()
    shard, kl = VocabShard(0, VOCAB), [LOSSES["kl"]()]
    with pytest.raises(ValueError, match="JSD reads the logits in two rounds; compute it unfused"):
        fused_linear_losses([LOSSES["jsd"]()], hidden, weight, teacher_hidden, teacher_weight, labels, shard)
    with pytest.raises(ValueError, match="KL needs the teacher's logits"):
        fused_linear_losses(kl, hidden, weight, None, None, labels, shard)
    with pytest.raises(ValueError, match="expected the same tokens"):
        fused_linear_losses(kl, hidden, weight, teacher_hidden[:1], teacher_weight, labels, shard)
    with pytest.raises(ValueError, match=r"expected one V/tp"):
        fused_linear_losses(kl, hidden, weight, teacher_hidden, teacher_weight[:40], labels, shard)


def test_a_chunk_is_as_large_as_its_memory_allows():
    """Two models' logits; where a vocabulary is so wide that few tokens fit, enough for a GEMM."""
    assert tokens_of_chunk(131072, 2, "cpu") == 512 and tokens_of_chunk(16384, 2, "cpu") == 4096
    assert tokens_of_chunk(131072, 2, "cuda") == 4096 and tokens_of_chunk(1 << 20, 4, "cpu") == 128
