"""kl_loss against torch, with masks and a global divisor."""

import pytest
import torch

from megatron_qad.distillation.kl_loss import kl_loss

MASK = torch.tensor([[1, 1, 0, 1], [0, 1, 0, 0]])


def expected(student, teacher, temperature=1.0):
    p, q = (torch.log_softmax(x.double() / temperature, -1) for x in (teacher, student))
    return (p.exp() * (p - q)).sum(-1)


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 4, 33, generator=generator) * 3 for _ in range(2)]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_mean_over_counted_tokens(logits, temperature):
    student, teacher = logits
    values = expected(student, teacher, temperature)
    close = {"rtol": 1e-6, "atol": 1e-7}  # float32 against float64
    found = kl_loss(student, teacher, MASK, temperature=temperature).double()
    torch.testing.assert_close(found, values[MASK == 1].mean(), **close)
    torch.testing.assert_close(kl_loss(student, teacher, temperature=temperature).double(), values.mean(), **close)
    assert kl_loss(student, teacher, torch.zeros_like(MASK)) == 0


def test_microbatches_add_up_with_the_global_count(logits):
    student, teacher = logits
    parts = [kl_loss(student[i], teacher[i], MASK[i], num_tokens=MASK.sum()) for i in range(2)]
    torch.testing.assert_close(sum(parts), kl_loss(student, teacher, MASK))


def test_gradients(logits):
    student, teacher = logits
    first, second = (student.clone().requires_grad_() for _ in range(2))
    kl_loss(first * 1, teacher, MASK).backward()  # * 1: not a leaf, so the gradient is written over the logits
    (expected(second, teacher) * MASK).sum().div(MASK.sum()).backward()
    torch.testing.assert_close(first.grad, second.grad, rtol=1e-5, atol=1e-7)
    kept = student.clone().requires_grad_() * 1
    kl_loss(kept, teacher, MASK, in_place=False).backward()
    assert torch.equal(kept.detach(), student)
