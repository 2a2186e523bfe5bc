"""Worker: compares every loss on a vocabulary sharded over 1, 2 and 4 ranks with float64 autograd without shards."""

import sys
from pathlib import Path

import torch

from megatron_qad.engine import QADError, init_runtime

init_runtime()

sys.path.insert(0, str(Path(__file__).parents[1]))
from reference_losses import expected  # noqa: E402
from worker_sharded import CollectiveCounter  # noqa: E402

from megatron_qad.distillation import LOSSES, VocabShard, logit_losses  # noqa: E402
from megatron_qad.distillation.fused_linear import fused_linear_losses  # noqa: E402
from megatron_qad.distillation.token_metrics import token_metrics  # noqa: E402

PADDED, REAL, SHAPE = 64, 30, (3, 7)  # of 4 ranks, two have only padding, one has some
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


def make_inputs(dtype, closeness: float):
    generator = torch.Generator().manual_seed(0)
    # Distinct multiples of 1/4, which are exact in BF16, so that there are no ties in the top k.
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
    """Return the largest errors of loss and gradient against float64, for this rank's shard, and the collectives."""
    student, teacher, labels, weight = make_inputs(dtype, closeness)
    width = PADDED // group.size()
    columns = slice(group.rank() * width, (group.rank() + 1) * width)
    shard = VocabShard.for_rank(width, REAL, group)
    losses = [LOSSES[part](**settings) for part, settings in CASES[name]]
    leaf = student[..., columns].clone().requires_grad_()
    with CollectiveCounter() as forward:
        actual = logit_losses(losses, leaf * 1, teacher[..., columns].clone(), labels, shard, weight=weight)
    with CollectiveCounter() as backward:
        sum((i + 1) * out.sum() for i, out in enumerate(actual)).backward()
    counted = weight * (labels != -100)
    expected_losses, gradient = [], 0
    for i, (part, settings) in enumerate(CASES[name]):
        loss, grad = expected(part, student, teacher, labels.clamp(min=0), counted, columns=REAL, **settings)
        expected_losses.append(loss)
        gradient = gradient + (i + 1) * grad
    gradient = gradient[..., columns]
    error = (leaf.grad.double() - gradient).abs()
    return {
        "loss_error": max((a.double() - b).abs().max().item() for a, b in zip(actual, expected_losses, strict=True)),
        "loss": expected_losses[0].sum().item(),
        # Without the rounding of the gradient to BF16.
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
    """Return the errors of the fused output layer: losses, and gradients of hidden states and of this rank's weight."""
    generator = torch.Generator().manual_seed(1)
    hidden, teacher_hidden = (torch.randn(*SHAPE, size, generator=generator) for size in (8, 12))
    weight, teacher_weight = (torch.randn(PADDED, size, generator=generator) for size in (8, 12))
    *_, labels, token_weight = make_inputs(torch.float32, 1.0)
    h, w = (t.double().requires_grad_() for t in (hidden, weight))
    logits, teacher = h @ w.t(), teacher_hidden.double() @ teacher_weight.double().t()
    counted, gradient, expected_losses = token_weight * (labels != -100), 0, []
    for i, (part, settings) in enumerate(CASES[name]):
        loss, grad = expected(part, logits, teacher, labels.clamp(min=0), counted, columns=REAL, **settings)
        expected_losses.append(loss)
        gradient = gradient + (i + 1) * grad
    logits.backward(gradient)

    width = PADDED // group.size()
    columns = slice(group.rank() * width, (group.rank() + 1) * width)
    shard = VocabShard.for_rank(width, REAL, group)
    losses = [LOSSES[part](**settings) for part, settings in CASES[name]]
    hidden.requires_grad_()
    weight = weight[columns].clone().requires_grad_()
    inputs = (hidden, weight, teacher_hidden, teacher_weight[columns], labels, shard)
    with CollectiveCounter() as forward:
        settings = {"token_weight": token_weight, "chunk_tokens": 5, "gradient_in_forward": in_forward}
        actual = fused_linear_losses(losses, *inputs, **settings)
    with CollectiveCounter() as backward:
        sum((i + 1) * out.sum() for i, out in enumerate(actual)).backward()
    hidden_grad = hidden.grad.clone()
    hidden.grad = None
    partial = fused_linear_losses(losses, *inputs, **settings, reduce_hidden_grad=False)
    sum((i + 1) * out.sum() for i, out in enumerate(partial)).backward()
    torch.distributed.all_reduce(hidden.grad, group=group)
    return {
        "loss_error": max((a.double() - b).abs().max().item() for a, b in zip(actual, expected_losses, strict=True)),
        "hidden_error": (hidden_grad.double() - h.grad).abs().max().item(),
        "weight_error": (weight.grad.double() / 2 - w.grad[columns]).abs().max().item(),  # accumulated over both calls
        "partial_error": (hidden.grad - hidden_grad).abs().max().item(),
        "scale": h.grad.abs().max().item(),
        "chunks": -(-int((counted != 0).sum()) // 5),
        "forward": forward,
        "backward": backward,
    }


def all_masked(name: str, group) -> dict:
    """Return the sums of the losses and of the gradient if all tokens have weight 0."""
    student, teacher, labels, weight = make_inputs(torch.float32, 1.0)
    width = PADDED // group.size()
    columns = slice(group.rank() * width, (group.rank() + 1) * width)
    losses = [LOSSES[part](**settings) for part, settings in CASES[name]]
    leaf = student[..., columns].clone().requires_grad_()
    shard = VocabShard.for_rank(width, REAL, group)
    actual = logit_losses(losses, leaf * 1, teacher[..., columns].clone(), labels, shard, weight=weight * 0)
    sum(out.sum() for out in actual).backward()
    return {"loss": sum(out.abs().sum().item() for out in actual), "grad": leaf.grad.abs().sum().item()}


def top_k_errors(group) -> list[str]:
    """Return the error of a top-k loss with k larger than a shard, if there is one."""
    student, teacher, labels, _ = make_inputs(torch.float32, 1.0)
    width = PADDED // group.size()
    shard = VocabShard.for_rank(width, REAL, group)
    try:
        logit_losses([LOSSES["topk"](k=17)], student[..., :width], teacher[..., :width], labels, shard)
    except QADError as error:
        return [str(error)]
    return []


def token_errors(dtype, group) -> dict:
    """Return the largest difference between the metrics of tokens of a sharded vocabulary and those without shards."""
    student, teacher, labels, _ = make_inputs(dtype, 1.0)
    student, labels = (student * 2).round() / 2, labels.clamp(min=0)  # with ties
    width = PADDED // group.size()
    columns = slice(group.rank() * width, (group.rank() + 1) * width)
    inputs = (student[..., columns].clone(), teacher[..., columns].clone(), labels)
    with CollectiveCounter() as collectives:
        actual = token_metrics(*inputs, VocabShard.for_rank(width, REAL, group))
    expected_metrics = token_metrics(student, teacher, labels, VocabShard(0, REAL))
    pairs = zip(actual.values.values(), expected_metrics.values.values(), strict=True)
    return {
        "error": max((a - b).abs().max().item() for a, b in pairs),
        "same_top": torch.equal(actual.student_top, expected_metrics.student_top)
        and torch.equal(actual.teacher_top, expected_metrics.teacher_top),
        "same_top5": torch.equal(actual.values["top5_agreement"], expected_metrics.values["top5_agreement"]),
        "top5": actual.values["top5_agreement"].mean().item(),
        "collectives": collectives,
    }


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
                results.append({"what": "nothing", "name": name, "size": size} | all_masked(name, group))
            for name in ("kl", "ce", "five"):
                for in_forward in (False, True):
                    what = {"what": "fused", "name": name, "size": size, "in_forward": in_forward}
                    results.append(what | fused(name, group, in_forward))
            for dtype in (torch.float32, torch.bfloat16):
                results.append({"what": "tokens", "size": size} | token_errors(dtype, group))
            results.append({"what": "refusals", "size": size, "texts": top_k_errors(group)})
    all_results = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(all_results, results)
    return [result | {"rank": r} for r, rank_results in enumerate(all_results) for result in rank_results]
