"""Compares validation metrics with a float64 computation on one rank."""

import math

import torch

from megatron_qad.distillation import Metrics, VocabShard, compare

COLUMNS, WIDTH, TOKENS = 40, 48, 200


def make_inputs(seed: int, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(4, TOKENS // 4, WIDTH, generator=generator) * 2
    teacher = student + torch.randn(student.shape, generator=generator) * 0.7
    labels = torch.randint(0, COLUMNS, student.shape[:-1], generator=generator)
    mask = (torch.rand(labels.shape, generator=generator) < 0.6).float()
    return student.to(dtype), teacher.to(dtype), labels, mask


def expected_means(student, teacher, labels, mask) -> dict[str, float]:
    log_s, log_t = (torch.log_softmax(z.double()[..., :COLUMNS], dim=-1) for z in (student, teacher))
    values = {
        "kl_to_teacher": (log_t.exp() * (log_t - log_s)).sum(-1),
        "cross_entropy": -log_s.gather(-1, labels[..., None])[..., 0],
        "teacher_cross_entropy": -log_t.gather(-1, labels[..., None])[..., 0],
        "top1_agreement": (log_s.argmax(-1) == log_t.argmax(-1)).double(),
    }
    return {name: ((value * mask).sum() / mask.sum()).item() for name, value in values.items()}


def test_equals_plain_computation():
    for dtype in (torch.float32, torch.bfloat16):
        inputs = make_inputs(0, dtype)
        means = compare(*inputs, VocabShard(0, COLUMNS)).means()
        expected = expected_means(*inputs)
        assert means.pop("num_tokens") == int(inputs[-1].sum())
        assert means.keys() == expected.keys()
        for name, value in expected.items():
            assert abs(means[name] - value) < 2e-6, name  # float32 losses of order one, averaged
        assert 0.1 < means["top1_agreement"] < 0.9


def test_inputs_are_not_modified():
    inputs = make_inputs(1)
    before = [tensor.clone() for tensor in inputs]
    compare(*inputs, VocabShard(0, COLUMNS))
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


def test_means_are_per_token_not_per_microbatch():
    a, b = make_inputs(2), make_inputs(3)
    a[-1][1:] = 0  # one microbatch has fewer tokens
    total = Metrics.zero()
    for inputs in (a, b):
        total += compare(*inputs, VocabShard(0, COLUMNS))
    both = [torch.cat(pair) for pair in zip(a, b, strict=True)]
    means, expected = total.means(), expected_means(*both)
    for name, value in expected.items():
        assert abs(means[name] - value) < 2e-6, name
    assert means["num_tokens"] == int(both[-1].sum())


def test_without_a_teacher():
    student, _, labels, mask = make_inputs(4)
    means = compare(student, None, labels, mask, VocabShard(0, COLUMNS)).means(has_teacher=False)
    assert means.keys() == {"cross_entropy", "num_tokens"}
    assert abs(means["cross_entropy"] - expected_means(student, student, labels, mask)["cross_entropy"]) < 2e-6


def test_lowest_id_wins_ties_and_padding_never_wins():
    student, teacher, labels, mask = (t[:1, :1] for t in make_inputs(5))
    student, teacher = torch.zeros_like(student), torch.zeros_like(teacher)
    mask = torch.ones_like(mask)
    student[..., [3, 7]] = 1.0
    teacher[..., [3, 9]] = 1.0
    student[..., COLUMNS:] = 5.0
    assert compare(student, teacher, labels, mask, VocabShard(0, COLUMNS)).means()["top1_agreement"] == 1.0
    teacher[..., 2] = 1.0
    assert compare(student, teacher, labels, mask, VocabShard(0, COLUMNS)).means()["top1_agreement"] == 0.0


def test_means_without_tokens_are_nan():
    student, teacher, labels, mask = make_inputs(6)
    means = compare(student, teacher, labels, mask * 0, VocabShard(0, COLUMNS)).means()
    assert means.pop("num_tokens") == 0
    assert len(means) == 4 and all(math.isnan(value) for value in means.values())  # 0 would look like a perfect student
