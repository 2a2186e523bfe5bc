"""Worker: every loss over a vocabulary cut across 1, 2 and 4 ranks, beside float64 autograd over the whole."""

import sys
from pathlib import Path

import torch

from megatron_qad.engine import QADError, init_runtime

init_runtime()

sys.path.insert(0, str(Path(__file__).parents[1]))
from reference_losses import expected  # noqa: E402
from worker_sharded import _Counts  # noqa: E402

from megatron_qad.distillation import LOSSES, VocabShard, logit_losses  # noqa: E402
from megatron_qad.distillation.fused_linear import fused_linear_losses  # noqa: E402

PADDED, REAL, SHAPE = 64, 30, (3, 7)  # the second half of the ranks has no real column, one has some
CASES = {
    "kl": [("kl", {})],
    "kl, temperatures": [("kl", {"temperature": 2.0, "teacher_temperature": 0.5})],
    "reverse_kl": [("reverse_kl", {})],
    "jsd": [("jsd", {"beta": 0.3})],
    "confidence_kl": [("confidence_kl", {"power": -0.5})],
    "topk": [("topk", {"k": 5})],
    "topk, all of a shard": [("topk", {"k": 16})],
    "mse": [("mse", {})],
    "mse, not centred": [("mse", {"centred": False})],
    "ce": [("ce", {})],
    "five": [("kl", {"temperature": 2.0}), ("ce", {}), ("topk", {"k": 4}), ("mse", {}), ("reverse_kl", {})],
    "two of two rounds": [("jsd", {}), ("ce", {}), ("jsd", {"beta": 0.9})],
}


def given(dtype, closeness: float):
    generator = torch.Generator().manual_seed(0)
    # Multiples of 1/4, all different, also in BF16: which of two equal logits is among the top k is nobody's business.
    order = torch.rand(*SHAPE, PADDED, generator=generator).argsort(dim=-1)
    teacher = (order - PADDED / 2) / 4.0
    student = teacher + torch.randn(*SHAPE, PADDED, generator=generator) * closeness + 2
    student[..., REAL:], teacher[..., REAL:] = torch.nan, torch.inf  # padding
    labels = torch.randint(0, REAL, SHAPE, generator=generator)
    labels[0, 0] = -100
    weight = torch.rand(SHAPE, generator=generator)
    weight[1, :3] = 0
    return student.to(dtype), teacher.to(dtype), labels, weight


def case(name: str, dtype, closeness: float, group) -> dict:
    """The loss's and gradient's largest errors against float64, this rank's share of the gradient in the whole."""
    student, teacher, labels, weight = given(dtype, closeness)
    width = PADDED // group.size()
    mine = slice(group.rank() * width, (group.rank() + 1) * width)
    shard = VocabShard.for_rank(width, REAL, group)
    losses = [LOSSES[part](**settings) for part, settings in CASES[name]]
    leaf = student[..., mine].clone().requires_grad_()
    with _Counts() as forward:
        found = logit_losses(losses, leaf * 1, teacher[..., mine].clone(), labels, shard, weight=weight)
    with _Counts() as backward:
        sum((i + 1) * out.sum() for i, out in enumerate(found)).backward()
    counted = weight * (labels != -100)
    wanted, gradient = [], 0
    for i, (part, settings) in enumerate(CASES[name]):
        loss, grad = expected(part, student, teacher, labels.clamp(min=0), counted, columns=REAL, **settings)
        wanted.append(loss)
        gradient = gradient + (i + 1) * grad
    gradient = gradient[..., mine]
    error = (leaf.grad.double() - gradient).abs()
    return {
        "loss_error": max((a.double() - b).abs().max().item() for a, b in zip(found, wanted, strict=True)),
        "loss": wanted[0].sum().item(),
        # What BF16 itself rounds is no error of ours.
        "grad_error": (error - gradient.abs() * (2.0**-8 if dtype == torch.bfloat16 else 0)).max().item(),
        "grad": gradient.abs().max().item(),
        "dead": leaf.grad[counted == 0].count_nonzero().item()
        + leaf.grad[..., shard.num_columns :].count_nonzero().item(),
        "finite": bool(leaf.grad.isfinite().all()),
        "forward": forward,
        "backward": backward,
        "columns": shard.num_columns,
    }


def fused(name: str, group, in_forward: bool) -> dict:
    """The fused output layer: errors of losses, hidden states' gradient and this rank's part of the weights'."""
    generator = torch.Generator().manual_seed(1)
    hidden, teacher_hidden = (torch.randn(*SHAPE, size, generator=generator) for size in (8, 12))
    weight, teacher_weight = (torch.randn(PADDED, size, generator=generator) for size in (8, 12))
    *_, labels, token_weight = given(torch.float32, 1.0)
    h, w = (t.double().requires_grad_() for t in (hidden, weight))
    logits, teacher = h @ w.t(), teacher_hidden.double() @ teacher_weight.double().t()
    counted, gradient, wanted = token_weight * (labels != -100), 0, []
    for i, (part, settings) in enumerate(CASES[name]):
        loss, grad = expected(part, logits, teacher, labels.clamp(min=0), counted, columns=REAL, **settings)
        wanted.append(loss)
        gradient = gradient + (i + 1) * grad
    logits.backward(gradient)

    width = PADDED // group.size()
    mine = slice(group.rank() * width, (group.rank() + 1) * width)
    shard = VocabShard.for_rank(width, REAL, group)
    losses = [LOSSES[part](**settings) for part, settings in CASES[name]]
    hidden.requires_grad_()
    weight = weight[mine].clone().requires_grad_()
    inputs = (hidden, weight, teacher_hidden, teacher_weight[mine], labels, shard)
    with _Counts() as forward:
        settings = {"token_weight": token_weight, "chunk_tokens": 5, "gradient_in_forward": in_forward}
        found = fused_linear_losses(losses, *inputs, **settings)
    with _Counts() as backward:
        sum((i + 1) * out.sum() for i, out in enumerate(found)).backward()
    whole = hidden.grad.clone()
    hidden.grad = None
    partial = fused_linear_losses(losses, *inputs, **settings, reduce_hidden_grad=False)
    sum((i + 1) * out.sum() for i, out in enumerate(partial)).backward()
    torch.distributed.all_reduce(hidden.grad, group=group)
    return {
        "loss_error": max((a.double() - b).abs().max().item() for a, b in zip(found, wanted, strict=True)),
        "hidden_error": (whole.double() - h.grad).abs().max().item(),
        "weight_error": (weight.grad.double() / 2 - w.grad[mine]).abs().max().item(),  # of both calls
        "partial_error": (hidden.grad - whole).abs().max().item(),
        "scale": h.grad.abs().max().item(),
        "chunks": -(-int((counted != 0).sum()) // 5),
        "forward": forward,
        "backward": backward,
    }


def nothing_counts(name: str, group) -> dict:
    student, teacher, labels, weight = given(torch.float32, 1.0)
    width = PADDED // group.size()
    mine = slice(group.rank() * width, (group.rank() + 1) * width)
    losses = [LOSSES[part](**settings) for part, settings in CASES[name]]
    leaf = student[..., mine].clone().requires_grad_()
    shard = VocabShard.for_rank(width, REAL, group)
    found = logit_losses(losses, leaf * 1, teacher[..., mine].clone(), labels, shard, weight=weight * 0)
    sum(out.sum() for out in found).backward()
    return {"loss": sum(out.abs().sum().item() for out in found), "grad": leaf.grad.abs().sum().item()}


def refusals(group) -> list[str]:
    student, teacher, labels, _ = given(torch.float32, 1.0)
    width = PADDED // group.size()
    shard = VocabShard.for_rank(width, REAL, group)
    try:
        logit_losses([LOSSES["topk"](k=17)], student[..., :width], teacher[..., :width], labels, shard)
    except QADError as error:
        return [str(error)]
    return []


def cases(arguments: dict) -> list:
    torch.distributed.init_process_group("gloo")
    rank, results = torch.distributed.get_rank(), []
    for size in (1, 2, 4):
        group = torch.distributed.new_group(list(range(size)))
        if rank < size:
            for name in CASES:
                for dtype in (torch.float32, torch.bfloat16):
                    for closeness in (1.0, 0.01):
                        what = {"what": "loss", "name": name, "size": size, "dtype": str(dtype), "closeness": closeness}
                        results.append(what | case(name, dtype, closeness, group))
                results.append({"what": "nothing", "name": name, "size": size} | nothing_counts(name, group))
            for name in ("kl", "ce", "five"):
                for in_forward in (False, True):
                    what = {"what": "fused", "name": name, "size": size, "in_forward": in_forward}
                    results.append(what | fused(name, group, in_forward))
            results.append({"what": "refusals", "size": size, "texts": refusals(group)})
    everyone = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, results)
    return [result | {"rank": r} for r, found in enumerate(everyone) for result in found]
