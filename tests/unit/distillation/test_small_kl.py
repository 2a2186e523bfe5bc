"""Absolute error of small KL values, as late in distillation, compared with modelopt's loss."""

import pytest
import torch
from reference_losses import expected

from megatron_qad.distillation import VocabShard, per_token_loss

TOKENS, WIDTH = 128, 4096


def pair(kl: float, sharpness: float, offset: float = 0.0, dtype=torch.float32):
    """Student and teacher logits with a mean KL near ``kl``. ``sharpness``: standard deviation of the teacher's."""
    generator = torch.Generator().manual_seed(int(sharpness))
    teacher = torch.randn(TOKENS, WIDTH, generator=generator) * sharpness
    noise = torch.randn(TOKENS, WIDTH, generator=generator)
    scale = (2 * kl) ** 0.5
    for _ in range(8):  # KL is nearly quadratic in the noise
        student = teacher + scale * noise
        mean = expected("kl", student, teacher, None, torch.ones(TOKENS))[0].mean().item()
        scale *= (kl / mean) ** 0.5
    return (student + offset).to(dtype), teacher.to(dtype)


def our_kl(student, teacher):
    leaf = student.clone().requires_grad_()
    loss = per_token_loss("kl", leaf * 1, teacher, None, VocabShard(0, WIDTH))
    loss.sum().backward()
    return loss.double(), leaf.grad.double()


def modelopt_kl(student, teacher):
    """The formula of modelopt's LogitsKLLoss on one rank: kl_div of two log_softmax in float32."""
    leaf = student.clone().requires_grad_()
    log_s, log_t = torch.log_softmax(leaf.float(), -1), torch.log_softmax(teacher.float(), -1)
    loss = torch.nn.functional.kl_div(log_s, log_t, reduction="none", log_target=True).sum(-1)
    loss.sum().backward()
    return loss.detach().double(), leaf.grad.double()


@pytest.mark.parametrize("sharpness", [1.0, 3.0, 8.0])
def test_absolute_error_at_1e_5(sharpness):
    """Covers a teacher that puts nearly all probability on one token (sharpness 8) and a flat one (1)."""
    for offset in (0.0, 5.0):
        student, teacher = pair(1e-5, sharpness, offset)
        exact, _ = expected("kl", student, teacher, None, torch.ones(TOKENS))
        assert 0.5e-5 < exact.mean() < 2e-5
        error = (our_kl(student, teacher)[0] - exact).abs().max().item()
        print(f"sharpness {sharpness} offset {offset}: {error:.1e}")
        assert error <= 2e-8


@pytest.mark.parametrize("kl", [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0])
def test_errors_are_no_larger_than_those_of_modelopt(kl):
    for sharpness in (1.0, 3.0):
        student, teacher = pair(kl, sharpness)
        exact, exact_grad = expected("kl", student, teacher, None, torch.ones(TOKENS))
        local, peer = our_kl(student, teacher), modelopt_kl(student, teacher)
        errors = [(loss - exact).square().mean().sqrt().item() for loss, _ in (local, peer)]
        grads = [((grad - exact_grad).norm() / exact_grad.norm()).item() for _, grad in (local, peer)]
        print(f"KL {kl:g} sharpness {sharpness}: loss {errors[0]:.1e}, modelopt {errors[1]:.1e}", end=", ")
        print(f"gradient {grads[0]:.1e}, modelopt {grads[1]:.1e}")
        assert errors[0] <= errors[1]
        assert grads[0] <= grads[1]


def test_kl_is_never_negative():
    for kl in (1e-10, 1e-8):
        loss, _ = our_kl(*pair(kl, 3.0))
        assert (loss >= 0).all() and loss.any()
