"""Compares the metrics of each token with a float64 computation, and with the sums that a validation reports."""

import torch

from megatron_qad.distillation import VocabShard, compare
from megatron_qad.distillation.token_metrics import TOKEN_METRICS, token_metrics

COLUMNS, WIDTH = 40, 48


def make_inputs(dtype=torch.float32, num_tokens: int = 200):
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(2, num_tokens // 2, WIDTH, generator=generator) * 2
    teacher = student + torch.randn(student.shape, generator=generator) * 0.7
    labels = torch.randint(0, COLUMNS, student.shape[:-1], generator=generator)
    return student.to(dtype), teacher.to(dtype), labels


def expected_values(student, teacher, labels) -> dict[str, torch.Tensor]:
    log_s, log_t = (torch.log_softmax(z.double()[..., :COLUMNS], dim=-1).flatten(0, 1) for z in (student, teacher))
    label = labels.reshape(-1, 1)
    # A stable sort puts the lowest id first among equal logits.
    top_s, top_t = (z.sort(dim=-1, descending=True, stable=True).indices[:, :5] for z in (log_s, log_t))
    values = (
        (log_t.exp() * (log_t - log_s)).sum(-1),
        -log_s.gather(-1, label)[:, 0],
        -log_t.gather(-1, label)[:, 0],
        -(log_s.exp() * log_s).sum(-1),
        -(log_t.exp() * log_t).sum(-1),
        (top_s[:, 0] == top_t[:, 0]).double(),
        torch.tensor([len(set(s) & set(t)) / 5 for s, t in zip(top_s.tolist(), top_t.tolist(), strict=True)]),
    )
    return dict(zip(TOKEN_METRICS, values, strict=True)) | {"student_top": top_s[:, 0], "teacher_top": top_t[:, 0]}


def test_equals_plain_computation():
    for dtype in (torch.float32, torch.bfloat16):  # bfloat16 logits have ties
        inputs = make_inputs(dtype)
        metrics, expected = token_metrics(*inputs, VocabShard(0, COLUMNS)), expected_values(*inputs)
        assert torch.equal(metrics.student_top, expected["student_top"])
        assert torch.equal(metrics.teacher_top, expected["teacher_top"])
        assert list(metrics.values) == list(TOKEN_METRICS)
        for name, value in metrics.values.items():
            assert value.dtype == torch.float32
            # float32 sums of 40 terms of order one
            torch.testing.assert_close(value.double(), expected[name].double(), rtol=2e-6, atol=2e-6, msg=name)
    assert 0.5 < metrics.values["top5_agreement"].mean() < 0.9


def test_sums_are_those_of_a_validation():
    student, teacher, labels = make_inputs(torch.bfloat16)
    shard = VocabShard(0, COLUMNS)
    sums = compare(student, teacher, labels, torch.ones(labels.shape), shard).sums
    values = token_metrics(student, teacher, labels, shard).values
    names = ("kl_to_teacher", "cross_entropy", "teacher_cross_entropy", "top1_agreement")
    assert sums.tolist() == [values[name].double().sum().item() for name in names]


def test_inputs_are_not_modified():
    inputs = make_inputs()
    before = [tensor.clone() for tensor in inputs]
    token_metrics(*inputs, VocabShard(0, COLUMNS))
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


def test_lowest_ids_win_ties_and_padding_never_wins():
    student, teacher = torch.zeros(1, 1, WIDTH), torch.zeros(1, 1, WIDTH)
    student[..., COLUMNS:], teacher[..., [9, 20]] = 5.0, 1.0
    metrics = token_metrics(student, teacher, torch.zeros(1, 1, dtype=torch.int64), VocabShard(0, COLUMNS))
    assert (metrics.student_top.item(), metrics.teacher_top.item()) == (0, 9)
    assert metrics.values["top5_agreement"].item() == torch.tensor(3 / 5)  # 0-4 and 9, 20, 0-2


def test_infinite_logits_and_small_vocabularies():
    student, teacher = torch.zeros(1, 1, 3), torch.tensor([[[0.0, -torch.inf, 0.0]]])
    values = token_metrics(student, teacher, torch.zeros(1, 1, dtype=torch.int64), VocabShard(0, 3)).values
    assert values["top5_agreement"].item() == 1.0  # of three tokens
    torch.testing.assert_close(values["teacher_entropy"], torch.tensor([2.0]).log())
