"""Runs the code of docs/howto/add_a_loss.md step by step."""

import dataclasses

import pytest
import reference_losses
import torch
from guides import code_of, run

from megatron_qad.distillation import VocabShard, logit_losses, parse_loss
from megatron_qad.distillation.fused_linear import fused_linear_losses
from megatron_qad.distillation.loss_registry import REGISTRY, Entry, training_losses
from megatron_qad.distillation.tiles import Tile
from megatron_qad.engine import QADError
from megatron_qad.report.runs import Run

CODE = code_of("add_a_loss.md")
NAME = "alpha_divergence"
TEXT = f"{NAME}(alpha=0.3, temperature=2)"
TOKENS, HIDDEN, VOCAB = 12, 8, 40


@pytest.fixture
def loss_class():
    """Step 1."""
    return run(CODE["megatron_qad/distillation/alpha_divergence.py"], NAME)["AlphaDivergence"]


@pytest.fixture
def registered(loss_class, monkeypatch):
    """Steps 1 and 2."""
    names = {"Entry": Entry, "AlphaDivergence": loss_class}
    entry = eval(CODE["megatron_qad/distillation/loss_registry.py"], names)
    monkeypatch.setitem(REGISTRY, entry.name, entry)
    return entry


@pytest.fixture
def reference(monkeypatch):
    """Step 4."""
    monkeypatch.setattr(reference_losses, "_PLAIN", dict(reference_losses._PLAIN))
    run(CODE["tests/reference_losses.py"], "reference", _PLAIN=reference_losses._PLAIN)
    return reference_losses.expected


def inputs():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator)
    weight, teacher = (torch.randn(VOCAB, HIDDEN, generator=generator) for _ in range(2))
    labels = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    token_weight = torch.rand(TOKENS, generator=generator)
    token_weight[3] = 0
    return hidden, weight, teacher, labels, token_weight


def test_loss_is_unknown_before_registration(loss_class):
    with pytest.raises(QADError, match=f"unknown loss '{NAME}'"):
        parse_loss(TEXT)
    assert training_losses([f"{NAME} loss"]) == []


def test_parser_accepts_registered_loss(registered):
    (term,) = parse_loss(TEXT).terms
    assert (term.name, term.loss) == (NAME, registered.loss(alpha=0.3, temperature=2))
    assert [t.name for t in parse_loss(f"{NAME} + 0.5*ce + {TEXT}").terms] == [NAME, "ce", f"{NAME} 2"]
    assert parse_loss(NAME, temperature=3.0).terms[0].loss.teacher_temperature == 3.0
    with pytest.raises(QADError, match=r"no setting 'alfa', its settings are .*; did you mean 'alpha'\?"):
        parse_loss(f"{NAME}(alfa=0.3)")
    with pytest.raises(QADError, match="expected a number between 0 and 1"):
        parse_loss(f"{NAME}(alpha=1)")


@pytest.mark.parametrize("fused", [False, True], ids=["logits", "fused output layer"])
def test_one_training_step(registered, reference, fused):
    """Compare the output weight after one SGD step with float64 autograd over the full vocabulary."""
    hidden, start, teacher, labels, token_weight = inputs()
    losses, shard = [term.loss for term in parse_loss(TEXT).terms], VocabShard(0, VOCAB)
    weight = torch.nn.Parameter(start.clone())
    if fused:
        arguments = (losses, hidden, weight, hidden, teacher, labels, shard)
        (actual,) = fused_linear_losses(*arguments, token_weight=token_weight)
    else:
        logits = hidden @ weight.t()
        (actual,) = logit_losses(losses, logits, hidden @ teacher.t(), labels, shard, weight=token_weight)
    actual.sum().backward()
    torch.optim.SGD([weight], lr=0.5).step()

    settings = {"alpha": 0.3, "temperature": 2.0}
    loss, grad = reference(NAME, hidden @ start.t(), hidden @ teacher.t(), labels, token_weight, **settings)
    expected = start.double() - 0.5 * grad.t() @ hidden.double()
    # float32 rounds probabilities and their products, of order one, at 6e-8 in each of a few operations.
    torch.testing.assert_close(actual.double(), loss, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(weight.detach().double(), expected, rtol=2e-6, atol=2e-6)
    assert (weight.detach() - start).abs().max() > 1e-2


def test_merged_shards_equal_full_vocabulary(registered):
    """Simulates three ranks: two with half of the vocabulary each, one with only padding."""
    loss = registered.loss(alpha=0.3)
    student, teacher = (torch.randn(2, TOKENS, VOCAB, generator=torch.Generator().manual_seed(1)) * 3).unbind()

    def tile(columns: slice) -> Tile:
        z_s, z_t = student[:, columns].clone(), teacher[:, columns].clone()
        return Tile(z_s, z_t, torch.empty_like(z_s), torch.empty_like(z_s), None)

    shards = [slice(0, VOCAB // 2), slice(VOCAB // 2, VOCAB), slice(VOCAB, VOCAB)]
    factor = torch.rand(TOKENS)
    whole, saved = loss.merge(loss.shard_stats(tile(slice(None)))[0][None], (), 0)
    merged, parts = loss.merge(torch.stack([loss.shard_stats(tile(s))[0] for s in shards]), (), 0)
    torch.testing.assert_close(merged, whole, rtol=0, atol=2e-6)
    gradients = torch.cat([loss.gradient(tile(s), parts, factor) for s in shards], dim=1)
    torch.testing.assert_close(gradients, loss.gradient(tile(slice(None)), saved, factor), rtol=0, atol=2e-6)


def test_run_report_lists_registered_loss(registered):
    run = Run("run", "/run", {f"{NAME} loss": [(1, 0.5)], "learning-rate": [(1, 1e-5)]}, {}, None, None)
    assert run.training_loss == (f"{NAME} loss", [(1, 0.5)]) and run.is_trained
    assert training_losses(["ce loss", f"{NAME} 2 loss", f"{NAME} loss", "total loss"])[0] == "total loss"


def test_docs_and_help_lack_the_loss_before_step_3(registered, documented_losses, parse_loss_table, help_texts):
    """The docs table and the help differ from the registry only by the new loss; the page's row adds it."""
    assert list(REGISTRY) == [*documented_losses, NAME]
    assert f"'{NAME}'" not in help_texts
    ((name, (settings, description)),) = parse_loss_table(CODE["markdown"]).items()
    assert name == NAME and description.startswith(registered.description)
    assert sorted(settings) == sorted(field.name for field in dataclasses.fields(registered.loss))


def test_reference_lacks_the_loss_before_step_4(registered):
    with pytest.raises(KeyError, match=NAME):
        reference_losses.expected(NAME, *torch.zeros(2, 1, 4), torch.zeros(1, dtype=torch.int64), torch.ones(1))
