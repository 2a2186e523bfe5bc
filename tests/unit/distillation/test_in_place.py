"""The gradient overwrites the student's logits, unless they may be read again."""

import pytest
import torch
from test_losses import CASES, SEQUENCE, WIDTH, labels, logits

from megatron_qad.distillation import LOSSES, VocabShard, logit_losses, per_token_loss

SHARD = VocabShard(0, WIDTH)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("case", CASES)
def test_backward_pass_overwrites_logits(case, dtype):
    leaf = logits(0, dtype).requires_grad_()
    student, teacher = leaf * 1, logits(1, dtype)
    kept = teacher.clone()
    before = student.detach().clone()
    out = per_token_loss(case.split()[0], student, teacher, labels(), SHARD, **CASES[case])
    assert torch.equal(student, before)  # the forward pass leaves them unchanged
    (grad,) = torch.autograd.grad(out.sum(), student)
    assert grad.data_ptr() == student.data_ptr() and torch.equal(grad, student)
    assert torch.equal(teacher, kept)


def test_logits_that_may_be_read_again_are_copied():
    leaf = logits(0).requires_grad_()
    student = leaf * 1
    (written,) = torch.autograd.grad(per_token_loss("kl", student, logits(1), None, SHARD).sum(), student)

    # A leaf is a parameter or a test's input, which is read again.
    per_token_loss("kl", leaf, logits(1), None, SHARD).sum().backward()
    assert torch.equal(leaf.detach(), logits(0)) and torch.equal(leaf.grad, written)

    student = leaf * 1
    (out,) = logit_losses([LOSSES["kl"]()], student, logits(1), None, SHARD, in_place=False)
    (grad,) = torch.autograd.grad(out.sum(), student)
    assert torch.equal(student, logits(0)) and torch.equal(grad, written)

    # An expanded row: the gradients of five tokens do not fit into the memory of one.
    row = (leaf[:, :1] * 1).expand(-1, SEQUENCE, -1)
    teacher = logits(1)
    expected = per_token_loss("kl", row.contiguous(), teacher, None, SHARD)
    out = per_token_loss("kl", row, teacher, None, SHARD)
    (grad,) = torch.autograd.grad(out.sum(), row)
    assert torch.equal(out, expected) and torch.equal(row, leaf[:, :1].expand(-1, SEQUENCE, -1))
    assert not torch.equal(grad[:, 0], grad[:, 1])


@pytest.mark.parametrize("make_other", [torch.square, lambda z: z[..., :3].exp().square() * z[..., :3]])
def test_autograd_raises_on_reading_overwritten_logits(make_other):
    """Another operation saved the logits, or a view of them, and runs its backward pass later."""
    student = logits(0).requires_grad_() * 1
    other = make_other(student)
    loss = per_token_loss("kl", student, logits(1), None, SHARD).sum() + other.sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_second_backward_pass_raises():
    out = per_token_loss("kl", logits(0).requires_grad_() * 1, logits(1), None, SHARD).sum()
    out.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_loss_without_grad_keeps_logits():
    student = logits(0)
    with torch.no_grad():
        assert per_token_loss("kl", student, logits(1), None, SHARD).all()
    assert torch.equal(student, logits(0))
