"""Reference implementations of all losses in float64 over the full vocabulary, with gradients by autograd."""

import math

import torch
from torch import Tensor


def expected(
    name: str,
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    weight: Tensor,
    *,
    columns: int | None = None,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    **settings,
) -> tuple[Tensor, Tensor]:
    """Return the weighted loss of each token [...] and the gradient of the sum, both float64.

    The gradient is with respect to the student's logits [..., V]. ``columns``: vocabulary size without padding.
    """
    z = student.detach().double().requires_grad_()
    z_s, z_t = z[..., :columns], teacher.detach().double()[..., :columns]
    if name in ("ce", "mse"):
        loss = _PLAIN[name](z_s, z_t, labels, **settings)
    else:
        log_s = torch.log_softmax(z_s / temperature, dim=-1)
        log_t = torch.log_softmax(z_t / (teacher_temperature or temperature), dim=-1)
        loss = _PLAIN[name](log_s, log_t, **settings)
    loss = loss * weight
    loss.sum().backward()
    return loss.detach(), z.grad


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def jsd(log_s: Tensor, log_t: Tensor, beta: float = 0.5) -> Tensor:
    log_m = torch.logaddexp(log_t + math.log(beta), log_s + math.log(1 - beta))
    return beta * kl(log_t, log_m) + (1 - beta) * kl(log_s, log_m)


def topk(log_s: Tensor, log_t: Tensor, k: int = 64) -> Tensor:
    index = log_t.topk(k, dim=-1).indices
    kept_s, kept_t = log_s.gather(-1, index), log_t.gather(-1, index)
    if k == log_s.shape[-1]:
        return kl(kept_t, kept_s)
    is_tail = torch.ones_like(log_s).scatter(-1, index, 0.0)
    tail_s, tail_t = ((log.exp() * is_tail).sum(-1, keepdim=True).log() for log in (log_s, log_t))
    return kl(torch.cat((kept_t, tail_t), -1), torch.cat((kept_s, tail_s), -1))


def mse(z_s: Tensor, z_t: Tensor, labels: Tensor, centred: bool = True) -> Tensor:
    difference = z_s - z_t
    if centred:
        difference = difference - difference.mean(-1, keepdim=True)
    return difference.square().mean(-1)


_PLAIN = {
    "kl": lambda s, t: kl(t, s),
    "reverse_kl": lambda s, t: kl(s, t),
    "confidence_kl": lambda s, t, power=1.0: kl(t, s) * t.exp().amax(-1) ** power,
    "jsd": jsd,
    "topk": topk,
    "mse": mse,
    "ce": lambda z, _, labels: -torch.log_softmax(z, dim=-1).gather(-1, labels[..., None])[..., 0],
}
