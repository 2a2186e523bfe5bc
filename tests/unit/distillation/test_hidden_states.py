"""Compares hidden-state losses with float64, and the gradient of an attached loss with that of a plain sum."""

import pytest
import torch

from megatron_qad.distillation.hidden_states import HiddenCosine, HiddenLoss, HiddenMSE, attach_loss
from megatron_qad.distillation.loss_registry import losses_of_type

HIDDEN_LOSSES = losses_of_type(HiddenLoss)


def states(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 5, 3, 8, generator=generator, dtype=torch.float64)
    return (student * 2).to(dtype), (teacher * 30).to(dtype)  # much larger than the student's


def test_mse_is_relative_to_the_teacher():
    student, teacher = states()
    expected = ((student - teacher) ** 2).sum(-1) / (teacher**2).sum(-1)
    torch.testing.assert_close(HiddenMSE().per_token(student, teacher).double(), expected, rtol=1e-6, atol=0)
    assert HiddenMSE().per_token(teacher, teacher).abs().max() == 0
    assert torch.isfinite(HiddenMSE().per_token(student, torch.zeros_like(teacher))).all()


def test_cosine():
    student, teacher = states()
    expected = 1 - (student * teacher).sum(-1) / student.norm(dim=-1) / teacher.norm(dim=-1)
    torch.testing.assert_close(HiddenCosine().per_token(student, teacher).double(), expected, rtol=0, atol=3e-7)
    assert HiddenCosine().per_token(3 * teacher, teacher).abs().max() < 3e-7  # 1 rounded to float32


@pytest.mark.parametrize("name", HIDDEN_LOSSES)
def test_attached_loss_has_gradient_of_sum(name):
    student, teacher = states(torch.float32)
    loss = HIDDEN_LOSSES[name]()
    x, y = (student.clone().requires_grad_() for _ in range(2))
    hidden = x.tanh()
    out = attach_loss(hidden, 0.3 * loss.per_token(hidden, teacher).sum())
    assert torch.equal(out, hidden)
    out.square().sum().backward()
    hidden = y.tanh()
    (hidden.square().sum() + 0.3 * loss.per_token(hidden, teacher).sum()).backward()
    assert torch.equal(x.grad, y.grad) or torch.allclose(x.grad, y.grad, rtol=1e-6, atol=1e-7)
    assert not teacher.requires_grad


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"layers": []}, "expected a list of layer positions"),
        ({"layers": [0.5]}, "expected a list of layer positions"),
        ({"layers": 3}, "expected a list of layer positions"),
        ({"layers": [0, 1], "teacher_layers": [0]}, "expected one layer for each of layers"),
        ({"teacher_layers": [0]}, "expected one layer for each of layers"),
    ],
)
def test_invalid_settings_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        HiddenMSE(**settings)


def test_layers_out_of_range_or_repeated_raise():
    with pytest.raises(ValueError, match="layer 4 is out of range for the student, which has 4 layers"):
        HiddenMSE(layers=[4]).pairs(4, 8)
    with pytest.raises(ValueError, match=r"layers \[1, -3\] name a layer of the student twice; it has 4 layers"):
        HiddenMSE(layers=[1, -3]).pairs(4, 4)
    with pytest.raises(ValueError, match="layer 2 is out of range for the teacher, which has 2 layers"):
        HiddenMSE().pairs(4, 2)
