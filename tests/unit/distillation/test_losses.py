"""Compares every loss with float64 autograd on one rank (several ranks: tests/dist/test_loss_shards.py)."""

import pytest
import torch
from reference_losses import expected

from megatron_qad.distillation import LOSSES, VocabShard, logit_losses, per_token_loss, tiles
from megatron_qad.engine import QADError

BATCH, SEQUENCE, WIDTH = 3, 5, 48
DTYPES = (torch.float32, torch.bfloat16)
# Each loss with default and other settings. k is 1 in "topk" because the narrowest case has one column.
CASES = {
    "kl": {},
    "reverse_kl": {},
    "jsd": {},
    "jsd 0.1": {"beta": 0.1},
    "jsd 0.9": {"beta": 0.9},
    "confidence_kl": {},
    "confidence_kl -0.5": {"power": -0.5},
    "topk": {"k": 1},
    "topk 7": {"k": 7},
    "mse": {},
    "mse plain": {"centred": False},
    "ce": {},
}
WITH_TEMPERATURE = [case for case in CASES if case.split()[0] not in ("mse", "ce")]


def test_every_logit_loss_has_a_case():
    assert {case.split()[0] for case in CASES} == set(LOSSES)


def logits(seed: int, dtype=torch.float32, *, scale: float = 3.0, width: int = WIDTH) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(BATCH, SEQUENCE, width, generator=generator) * scale).to(dtype)


def labels(num_columns: int = WIDTH) -> torch.Tensor:
    return torch.randint(0, num_columns, (BATCH, SEQUENCE), generator=torch.Generator().manual_seed(9))


def weights() -> torch.Tensor:
    return torch.rand(BATCH, SEQUENCE, generator=torch.Generator().manual_seed(4))


def assert_matches(case, student, teacher, *, columns=None, scale=3.0, weight=None, **temperatures):
    name, settings = case.split()[0], CASES[case] | temperatures
    target, weight = labels(columns or WIDTH), weights() if weight is None else weight
    loss_64, grad_64 = expected(name, student, teacher, target, weight, columns=columns, **settings)
    dtype, student = student.dtype, student.clone(memory_format=torch.preserve_format).requires_grad_()
    shard = VocabShard(0, columns or WIDTH)
    out = per_token_loss(name, student * 1, teacher, target, shard, weight=weight, **settings)
    assert out.dtype == torch.float32 and out.shape == (BATCH, SEQUENCE)
    out.sum().backward()
    # float32 rounds logits and their sums at 6e-8 of their magnitude in each of a few operations. Losses are of order
    # scale, and so are gradients that multiply a probability by a difference of logits.
    torch.testing.assert_close(out.double(), loss_64, rtol=2e-6, atol=2e-6 * scale)
    # The relative error of a probability is the error of its exponent. BF16 also rounds the gradient at 2^-9.
    rtol = 2e-6 * scale + (2.0**-8 if dtype == torch.bfloat16 else 0)
    torch.testing.assert_close(student.grad.double(), grad_64, rtol=rtol, atol=2e-6 * scale)
    assert student.grad.dtype == dtype
    assert grad_64.abs().max() > 1e-3 or columns == 1  # a single outcome has no gradient
    return out, student.grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("columns", [None, 33, 1])
def test_equals_float64_autograd(case, dtype, columns):
    if CASES[case].get("k", 1) > (columns or WIDTH):
        case = "topk"
    _, grad = assert_matches(case, logits(0, dtype), logits(1, dtype), columns=columns)
    if columns is not None:
        assert not grad[..., columns:].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", WITH_TEMPERATURE)
@pytest.mark.parametrize("temperatures", [(0.5, None), (3.0, None), (2.0, 0.5)], ids=str)
def test_temperature(case, dtype, temperatures):
    # Dividing by 0.5 doubles the rounding error.
    both = dict(zip(("temperature", "teacher_temperature"), temperatures, strict=True))
    assert_matches(case, logits(0, dtype), logits(1, dtype), scale=6.0, **both)


def test_invalid_temperatures_raise():
    for value in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="expected a finite number above 0"):
            per_token_loss("kl", logits(0), logits(1), None, VocabShard(0, WIDTH), teacher_temperature=value)


@pytest.mark.parametrize("case", CASES)
def test_masked_tokens(case):
    """Masked tokens have zero loss and gradient, whatever their logits are, and do not affect other tokens."""
    weight = torch.zeros(BATCH, SEQUENCE)
    weight[0, 1] = weight[2, 3] = 0.5
    name, settings, shard = case.split()[0], CASES[case], VocabShard(0, WIDTH)
    clean, clean_grad = assert_matches(case, logits(0), logits(1), weight=weight)
    student, teacher, ignored = logits(0), logits(1), labels()
    student[weight == 0], teacher[weight == 0] = torch.nan, torch.inf
    ignored[weight == 0] = -100
    for mask in ({"weight": weight}, {"weight": torch.full_like(weight, 0.5)}):  # by weight, by label
        target = labels() if mask["weight"] is weight else ignored
        leaf = student.clone().requires_grad_()
        out = per_token_loss(name, leaf * 1, teacher, target, shard, **mask, **settings)
        out.sum().backward()
        assert torch.equal(out, clean) and torch.equal(leaf.grad, clean_grad)
        assert not leaf.grad[weight == 0].any() and leaf.grad[weight != 0].any()
    leaf = student.clone().requires_grad_()
    out = per_token_loss(name, leaf * 1, teacher, labels(), shard, weight=weight * 0, **settings)
    out.sum().backward()
    assert not out.any() and not leaf.grad.any()  # any() is true for NaN


@pytest.mark.parametrize("case", CASES)
def test_padding_columns_are_ignored(case):
    name, settings, shard = case.split()[0], CASES[case], VocabShard(0, 40)
    student, teacher = logits(0), logits(1)
    clean = per_token_loss(name, student.clone(), teacher.clone(), labels(40), shard, **settings)
    for tensor, value in ((student, torch.inf), (teacher, torch.nan)):
        tensor[..., 40:] = value
    student.requires_grad_()
    actual = per_token_loss(name, student * 1, teacher, labels(40), shard, **settings)
    assert torch.equal(actual, clean)
    actual.sum().backward()
    assert student.grad.isfinite().all() and not student.grad[..., 40:].any()


@pytest.mark.parametrize("case", CASES)
def test_huge_logits(case):
    """Near 1e4, float32 values are 1e-3 apart. Nothing overflows and the loss keeps six digits."""
    name, settings = case.split()[0], CASES[case]
    student, teacher = logits(0, scale=1e4), logits(1, scale=1e4)
    loss_64, grad_64 = expected(name, student, teacher, labels(), torch.ones(BATCH, SEQUENCE), **settings)
    student.requires_grad_()
    actual = per_token_loss(name, student * 1, teacher, labels(), VocabShard(0, WIDTH), **settings)
    actual.sum().backward()
    assert actual.isfinite().all() and student.grad.isfinite().all()
    if name == "topk":
        return  # the student's tail underflows; the loss is bounded there, the formula is infinite
    torch.testing.assert_close(actual.double(), loss_64, rtol=1e-6, atol=1e-2)
    # Exponents are off by 1e-3; gradients may have a difference of logits, about 1e4, as a factor.
    torch.testing.assert_close(student.grad.double(), grad_64, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if case != "ce"])
def test_equal_logits_have_zero_divergence(case, dtype):
    student = logits(0, dtype).requires_grad_()
    shard = VocabShard(0, WIDTH)
    actual = per_token_loss(case.split()[0], student * 1, student.detach().clone(), labels(), shard, **CASES[case])
    actual.sum().backward()
    assert not actual.any() and not student.grad.any()


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("ce", "mse plain")])
def test_constant_offset_changes_nothing(case):
    """Logits that are multiples of 2^-10 can be shifted by 64 without rounding."""
    student, teacher = (logits(seed).mul(1024).round().div(1024) for seed in (0, 1))
    shard, name = VocabShard(0, WIDTH), case.split()[0]
    results = []
    for offset in (0, 64):
        leaf = student.clone().requires_grad_()
        out = per_token_loss(name, leaf + offset, teacher, None, shard, **CASES[case])
        out.sum().backward()
        results.append((out, leaf.grad))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=2e-6, atol=2e-6)
    # log Z is rounded at 64 * 6e-8, and gradients have differences of logits, up to 20 here, as factors.
    torch.testing.assert_close(results[1][1], results[0][1], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("case", CASES)
def test_non_contiguous_logits(case):
    """[s, b, V] transposed to [b, s, V], and a slice of wider logits."""
    student, teacher = (logits(seed).transpose(0, 1).contiguous().transpose(0, 1) for seed in (0, 1))
    assert not student.is_contiguous()
    assert_matches(case, student, teacher)
    name, settings = case.split()[0], CASES[case]
    wide = logits(0, width=2 * WIDTH).requires_grad_()
    ones = torch.ones(BATCH, SEQUENCE)
    _, grad = expected(name, wide[..., :WIDTH], logits(1), labels(), ones, **settings)
    sliced = (wide * 1)[..., :WIDTH]
    per_token_loss(name, sliced, logits(1), labels(), VocabShard(0, WIDTH), **settings).sum().backward()
    torch.testing.assert_close(wide.grad[..., :WIDTH].double(), grad, rtol=1e-5, atol=1e-5)
    assert not wide.grad[..., WIDTH:].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_tile_size_does_not_change_results(case, dtype, monkeypatch):
    def run():
        student, weight = logits(0, dtype).requires_grad_(), weights()
        weight[0] = weight[1, 1:3] = 0  # one tile fully masked, one partly
        args = (case.split()[0], student * 1, logits(1, dtype), labels(), VocabShard(0, WIDTH))
        out = per_token_loss(*args, weight=weight, **CASES[case])
        out.sum().backward()
        return out, student.grad

    whole = run()
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", 4 * WIDTH)  # 15 tokens in tiles of 4
    slices = tiles.token_tiles(15, WIDTH, tiles.TILE_ELEMENTS)
    assert [rows.stop - rows.start for rows in slices] == [4, 4, 4, 3]
    for a, b in zip(run(), whole, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_losses_at_once(dtype):
    """Each loss equals the same loss computed alone; the gradient is that of the weighted sum, with one weight 0."""
    names, factors = ["kl", "ce", "jsd", "mse", "topk"], [1.0, 0.5, 2.0, 0.0, 0.25]
    settings = [{"temperature": 2.0}, {}, {}, {}, {"k": 5}]
    losses = [LOSSES[name](**options) for name, options in zip(names, settings, strict=True)]
    student, teacher, weight = logits(0, dtype).requires_grad_(), logits(1, dtype), weights()
    actual = logit_losses(losses, student * 1, teacher, labels(), VocabShard(0, WIDTH), weight=weight)
    sum(f * out.sum() for f, out in zip(factors, actual, strict=True)).backward()
    total = 0
    for name, options, factor, out in zip(names, settings, factors, actual, strict=True):
        loss, grad = expected(name, student, teacher, labels(), weight, **options)
        torch.testing.assert_close(out.double(), loss, rtol=2e-6, atol=6e-6)
        total = total + factor * grad
    rtol = 2e-5 if dtype == torch.float32 else 2.0**-8  # float32 sums; BF16 rounds once at the end
    torch.testing.assert_close(student.grad.double(), total, rtol=rtol, atol=6e-6)


def test_invalid_inputs_raise():
    shard = VocabShard(0, WIDTH)
    with pytest.raises(ValueError, match=r"student logits \[3, 5, 48\], teacher logits \[3, 5, 40\]"):
        per_token_loss("kl", logits(0), logits(1)[..., :40], labels(), shard)
    with pytest.raises(ValueError, match="unknown loss 'mso'"):
        per_token_loss("mso", logits(0), logits(1), labels(), shard)
    with pytest.raises(QADError, match=r"topk\(k=49\): k must not exceed the 48 columns of one rank's shard"):
        per_token_loss("topk", logits(0), logits(1), labels(), shard, k=49)
    with pytest.raises(ValueError, match="JSD needs the teacher's logits"):
        per_token_loss("jsd", logits(0), None, labels(), shard)
    with pytest.raises(ValueError, match="CrossEntropy needs labels"):
        per_token_loss("ce", logits(0), None, None, shard)
    with pytest.raises(ValueError, match="beta=1"):
        per_token_loss("jsd", logits(0), logits(1), None, shard, beta=1)


@pytest.mark.parametrize("rank, expected", [(0, (0, 128)), (1, (128, 22)), (2, (256, 0)), (3, (384, 0))])
def test_vocab_shard_for_rank(rank, expected):
    class Group:
        def rank(self):
            return rank

    shard = VocabShard.for_rank(128, 150, Group())
    assert (shard.first_column, shard.num_columns) == expected
    assert VocabShard.for_rank(128, 150).num_columns == 128
