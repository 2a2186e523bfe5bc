"""KL kernels on a GPU at realistic sizes: errors against float64, and memory use."""

import pytest
import torch

from megatron_qad.distillation import LOSSES, VocabShard, logit_losses
from megatron_qad.engine import capabilities

pytestmark = pytest.mark.skipif(capabilities().device != "cuda", reason="needs a GPU: kernels are compared on it")


def logits(tokens, width, noise, dtype, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    teacher = torch.randn(tokens, width, generator=generator, device="cuda") * 3
    student = teacher + noise * torch.randn(tokens, width, generator=generator, device="cuda") + 1
    return student.to(dtype), teacher.to(dtype)


def reference(student, teacher):
    student = student.double().requires_grad_()
    q, p = student.log_softmax(-1), teacher.double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    kl.sum().backward()
    student_less, teacher_less = (z.double() - z.double().amax(-1, keepdim=True) for z in (student, teacher))
    x = student_less - teacher_less
    return kl.detach(), (p.exp() * x.abs()).sum(-1).detach(), student.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("noise", [0.0, 1e-3, 0.1, 3.0])
@pytest.mark.parametrize("width", [16384, 32000, 50257, 131072])
def test_kl_matches_float64(width, noise, dtype):
    student, teacher = logits(64, width, noise, dtype)
    kl, summed, gradient = reference(student, teacher)
    shard = VocabShard(0, width)
    leaf = student.clone().requires_grad_()
    (loss,) = logit_losses([LOSSES["kl"]()], leaf * 1, teacher, None, shard)
    loss.sum().backward()
    # Loss: if one token has most of the probability, its product with x is rounded twice in each of two sums, 2.4e-7 of
    # E_t|x|. The roundings of x itself, minus a maximum at a distance of up to 8, add as much again. Gradient: the
    # roundings of a probability, and that of the dtype.
    assert ((loss.detach() - kl).abs() <= 4.8e-7 * summed + 1e-12).all()
    rounded = gradient.abs() * (2.0**-8 if dtype == torch.bfloat16 else 0)
    assert ((leaf.grad.double() - gradient).abs() <= rounded + 1e-6).all()


def test_kl_allocates_no_tensor_of_logit_size():
    student, teacher = logits(4096, 131072, 0.1, torch.bfloat16)
    base = student.requires_grad_() * 1
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    (loss,) = logit_losses([LOSSES["kl"]()], base, teacher, None, VocabShard(0, 131072))
    gradient = torch.autograd.grad(loss.sum(), base)[0]
    assert gradient.data_ptr() == base.data_ptr()
    assert torch.cuda.max_memory_allocated() - before <= 0.05 * base.numel()
