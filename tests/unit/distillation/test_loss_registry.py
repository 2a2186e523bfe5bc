"""The loss registry agrees with the parser, the run report, the help texts and the docs."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

import megatron_qad
from megatron_qad.distillation import LOSSES, LogitLoss, parse_loss
from megatron_qad.distillation.hidden_states import HiddenLoss
from megatron_qad.distillation.loss_registry import REGISTRY, training_losses
from megatron_qad.distillation.scale_growth import ScaleGrowth
from megatron_qad.report.runs import Run

PACKAGE = Path(megatron_qad.__file__).parent


def test_every_loss_has_one_type_and_a_name_that_parses():
    for name, entry in REGISTRY.items():
        assert name == entry.name and name.isidentifier() and name != "total"
        assert sum(issubclass(entry.loss, kind) for kind in (LogitLoss, HiddenLoss, ScaleGrowth)) == 1
        assert parse_loss(f"kl + {name}").terms[1].loss == entry.loss()
    assert LOSSES == {name: e.loss for name, e in REGISTRY.items() if issubclass(e.loss, LogitLoss)}


@pytest.mark.parametrize("name", REGISTRY)
def test_parsed_loss_is_frozen(name):
    losses = parse_loss(f"kl + 0.5*{name}")
    loss = losses.terms[1].loss
    settings = [field.name for field in dataclasses.fields(loss)]
    for changed, attribute in ((loss, "new"), *((loss, s) for s in settings), (losses.terms[1], "loss")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(changed, attribute, 1)
    assert losses == parse_loss(f"kl + 0.5*{name}") and hash(losses) == hash(parse_loss(f"kl + 0.5*{name}"))


def test_list_settings_become_tuples():
    (_, term) = parse_loss("kl + hidden_mse(layers=[0, -1], teacher_layers=[1, 2])").terms
    assert (term.loss.layers, term.loss.teacher_layers) == ((0, -1), (1, 2))


def test_docs_table_matches_registry(documented_losses):
    assert list(documented_losses) == list(REGISTRY)
    for name, (settings, description) in documented_losses.items():
        entry = REGISTRY[name]
        assert sorted(settings) == sorted(field.name for field in dataclasses.fields(entry.loss) if field.init), name
        assert description.startswith(entry.description), name


def test_help_names_every_loss(help_texts):
    assert [name for name in REGISTRY if f"'{name}'" not in help_texts] == []


@pytest.mark.parametrize(
    ("scalars", "expected"),
    [
        (["learning-rate", "kl loss", "kl loss vs samples", "lm loss", "validation/kl_to_teacher"], ["kl loss"]),
        (["kl 2 loss", "hidden_mse loss", "kl loss"], ["kl loss", "kl 2 loss", "hidden_mse loss"]),
        (["ce loss", "kl 10 loss", "kl 2 loss", "total loss"], ["total loss", "kl 2 loss", "kl 10 loss", "ce loss"]),
        (["scale_growth loss", "hidden_cosine loss"], ["hidden_cosine loss", "scale_growth loss"]),
        (["loss", " loss", "kl  loss", "my kl loss"], []),
    ],
)
def test_training_losses_among_scalars(scalars, expected):
    assert training_losses(scalars) == expected


@pytest.mark.parametrize("name", REGISTRY)
def test_run_report_recognizes_every_loss(name):
    run = Run("run", "/run", {f"{name} 2 loss": [(1, 0.5), (2, 0.4)]}, {}, None, None)
    assert run.training_loss == (f"{name} 2 loss", [(1, 0.5), (2, 0.4)]) and run.is_trained
    assert run.num_iterations == 2
    run.scalars["total loss"] = [(3, 0.7)]
    assert run.training_loss == ("total loss", [(3, 0.7)])


def test_losses_import_without_megatron():
    code = "import sys; sys.modules['megatron'] = None\n"
    code += "from megatron_qad.distillation import parse_loss; print(parse_loss('kl + ce').terms[1].name)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert (result.returncode, result.stdout) == (0, "ce\n"), result.stderr
