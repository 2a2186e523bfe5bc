"""Metrics of an evaluation are means over tokens, not over rows or batches."""

import pytest
import torch

from megatron_qad.distillation.kl_loss import kl_loss
from megatron_qad.hf_training.evaluation_sums import EvaluationSums


def test_tokens_of_all_rows_weigh_the_same():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(3, 5, 17, generator=generator) for _ in range(2))
    labels = torch.randint(0, 17, (3, 5), generator=generator)
    labels[0, 1:], labels[2] = -100, -100  # one token, five tokens, none
    sums = EvaluationSums()
    rows = sums.of_rows(student, teacher, labels)
    assert rows[:, -1].tolist() == [1, 5, 0] and rows[2].eq(0).all()
    for part in rows.split(2):
        sums.add(part)
    means, counts = sums.means(), labels >= 0
    assert means["num_tokens"] == 6
    assert means["kl_to_teacher"] == pytest.approx(kl_loss(student, teacher, counts).item(), rel=1e-6)
    agrees = (student.argmax(-1) == teacher.argmax(-1))[counts].double().mean().item()
    assert means["top1_agreement"] == pytest.approx(agrees)
    expected = torch.nn.functional.cross_entropy(student[counts], labels[counts]).item()
    assert means["cross_entropy"] == pytest.approx(expected, rel=1e-6)
