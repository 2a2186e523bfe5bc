"""KL and cross entropy against float64 autograd on one rank. Over several ranks: tests/dist/test_sharded.py."""

import pytest
import torch

from megatron_qad.distillation import LOSSES, per_token_loss, vocab_parallel
from megatron_qad.distillation.losses import VocabShard

BATCH, SEQUENCE, WIDTH = 3, 5, 48
DTYPES = (torch.float32, torch.bfloat16)


def logits(seed: int, dtype=torch.float32, *, scale: float = 3.0, width: int = WIDTH) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(BATCH, SEQUENCE, width, generator=generator) * scale).to(dtype)


def labels(num_columns: int = WIDTH) -> torch.Tensor:
    return torch.randint(0, num_columns, (BATCH, SEQUENCE), generator=torch.Generator().manual_seed(9))


def expected(name, student, teacher, target, weight, *, columns=None, temperature=1.0):
    """Loss of each token and the gradient of the weighted sum in the student's logits, float64, by autograd."""
    z = student.detach().double().requires_grad_()
    log_s = torch.log_softmax(z[..., :columns] / temperature, dim=-1)
    if name == "kl":
        log_t = torch.log_softmax(teacher.double()[..., :columns] / temperature, dim=-1)
        loss = (log_t.exp() * (log_t - log_s)).sum(-1)
    else:
        loss = -torch.log_softmax(z[..., :columns], dim=-1).gather(-1, target[..., None])[..., 0]
    (loss * weight).sum().backward()
    return loss.detach(), z.grad


def assert_matches(name, student, teacher, *, columns=None, temperature=1.0, scale=3.0, weight=None):
    target = labels(columns or WIDTH)
    weight = torch.rand(BATCH, SEQUENCE, generator=torch.Generator().manual_seed(4)) if weight is None else weight
    loss_64, grad_64 = expected(name, student, teacher, target, weight, columns=columns, temperature=temperature)
    dtype, student = student.dtype, student.clone(memory_format=torch.preserve_format).requires_grad_()
    shard = VocabShard(0, columns or WIDTH)
    # The operation consumes its input: a leaf may not be written, what a model returns may.
    out = per_token_loss(name, student * 1, teacher, target, shard, temperature=temperature)
    assert out.dtype == torch.float32 and out.shape == (BATCH, SEQUENCE)
    (out * weight).sum().backward()
    # float32 rounds logits and their sums at 6e-8 of their magnitude, a few operations deep.
    torch.testing.assert_close(out.double(), loss_64, rtol=2e-6, atol=2e-6 * scale)
    # A probability's error is that of its exponent; BF16 logits also round the gradient itself at 2^-9.
    rtol = 2e-6 * scale + (2.0**-8 if dtype == torch.bfloat16 else 0)
    torch.testing.assert_close(student.grad.double(), grad_64, rtol=rtol, atol=2e-6 * scale)
    assert student.grad.dtype == dtype
    return out, student.grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("columns", [None, 33, 1])
def test_equals_float64_autograd(name, dtype, columns):
    _, grad = assert_matches(name, logits(0, dtype), logits(1, dtype), columns=columns)
    if columns is not None:
        assert not grad[..., columns:].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_temperature(dtype, temperature):
    # Dividing by 0.5 doubles what float32 rounds.
    assert_matches("kl", logits(0, dtype), logits(1, dtype), temperature=temperature, scale=6.0)


def test_temperature_does_not_touch_cross_entropy():
    a, b = (per_token_loss("ce", logits(0), None, labels(), VocabShard(0, WIDTH), temperature=t) for t in (1.0, 3.0))
    assert torch.equal(a, b)


@pytest.mark.parametrize("name", LOSSES)
def test_masked_tokens_have_no_gradient(name):
    weight = torch.zeros(BATCH, SEQUENCE)
    weight[0, 1] = weight[2, 3] = 1
    _, grad = assert_matches(name, logits(0), logits(1), weight=weight)
    assert not grad[weight == 0].any() and grad[weight == 1].any()


@pytest.mark.parametrize("name", LOSSES)
def test_padding_may_hold_anything(name):
    student, teacher = logits(0), logits(1)
    clean = per_token_loss(name, student.clone(), teacher.clone(), labels(40), VocabShard(0, 40))
    for tensor, value in ((student, torch.inf), (teacher, torch.nan)):
        tensor[..., 40:] = value
    student.requires_grad_()
    found = per_token_loss(name, student * 1, teacher, labels(40), VocabShard(0, 40))
    assert torch.equal(found, clean)
    found.sum().backward()
    assert student.grad.isfinite().all() and not student.grad[..., 40:].any()


@pytest.mark.parametrize("name", LOSSES)
def test_huge_logits(name):
    """At 1e4 float32 numbers are 1e-3 apart; nothing overflows and the loss keeps six digits."""
    student, teacher = logits(0, scale=1e4), logits(1, scale=1e4)
    weight = torch.ones(BATCH, SEQUENCE)
    loss_64, grad_64 = expected(name, student, teacher, labels(), weight)
    student.requires_grad_()
    found = per_token_loss(name, student * 1, teacher, labels(), VocabShard(0, WIDTH))
    found.sum().backward()
    torch.testing.assert_close(found.double(), loss_64, rtol=1e-6, atol=1e-2)
    torch.testing.assert_close(student.grad.double(), grad_64, rtol=5e-3, atol=5e-3)  # exp of an exponent 1e-3 off


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_logits_have_no_divergence(dtype):
    student = logits(0, dtype).requires_grad_()
    found = per_token_loss("kl", student * 1, student.detach().clone(), labels(), VocabShard(0, WIDTH))
    found.sum().backward()
    assert not found.any() and not student.grad.any()


@pytest.mark.parametrize("name", LOSSES)
def test_non_contiguous_logits(name):
    """[s, b, V] seen as [b, s, V], and a slice of wider logits."""
    student, teacher = (logits(seed).transpose(0, 1).contiguous().transpose(0, 1) for seed in (0, 1))
    assert not student.is_contiguous()
    assert_matches(name, student, teacher)
    wide = logits(0, width=2 * WIDTH).requires_grad_()
    target = labels()
    _, grad = expected(name, wide[..., :WIDTH], logits(1), target, torch.ones(BATCH, SEQUENCE))
    sliced = (wide * 1)[..., :WIDTH]
    per_token_loss(name, sliced, logits(1), target, VocabShard(0, WIDTH)).sum().backward()
    torch.testing.assert_close(wide.grad[..., :WIDTH].double(), grad, rtol=1e-5, atol=1e-5)
    assert not wide.grad[..., WIDTH:].any()


@pytest.mark.parametrize("name", LOSSES)
def test_the_backward_pass_writes_over_the_logits(name):
    leaf = logits(0).requires_grad_()
    student, teacher = leaf * 1, logits(1)
    kept = teacher.clone()
    before = student.detach().clone()
    out = per_token_loss(name, student, teacher, labels(), VocabShard(0, WIDTH))
    assert torch.equal(student, before)  # the forward pass does not
    (grad,) = torch.autograd.grad(out.sum(), student)
    assert grad.data_ptr() == student.data_ptr() and torch.equal(grad, student)
    assert torch.equal(teacher, kept)


@pytest.mark.parametrize("name", LOSSES)
def test_chunks_of_tokens_change_nothing(name, monkeypatch):
    def run():
        student = logits(0).requires_grad_()
        out = per_token_loss(name, student * 1, logits(1), labels(), VocabShard(0, WIDTH))
        out.sum().backward()
        return out, student.grad

    whole = run()
    monkeypatch.setattr(vocab_parallel, "CHUNK_ELEMENTS", 4 * WIDTH)  # 15 tokens in chunks of 4
    assert [chunk.stop - chunk.start for chunk in vocab_parallel.token_chunks(15, WIDTH)] == [4, 4, 4, 3]
    for a, b in zip(run(), whole, strict=True):
        assert torch.equal(a, b)


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match=r"student logits \[3, 5, 48\], teacher logits \[3, 5, 40\]"):
        per_token_loss("kl", logits(0), logits(1)[..., :40], labels(), VocabShard(0, WIDTH))
    with pytest.raises(ValueError, match="unknown loss 'mse'"):
        per_token_loss("mse", logits(0), logits(1), labels(), VocabShard(0, WIDTH))


@pytest.mark.parametrize("rank, expected", [(0, (0, 128)), (1, (128, 22)), (2, (256, 0)), (3, (384, 0))])
def test_the_shard_of_a_rank(rank, expected):
    class Group:
        def rank(self):
            return rank

    shard = VocabShard.of_rank(128, 150, Group())
    assert (shard.first_column, shard.num_columns) == expected
    assert VocabShard.of_rank(128, 150).num_columns == 128
