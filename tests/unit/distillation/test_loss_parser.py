"""Parsing of --qad-loss strings and files, and the errors for invalid ones."""

import pytest

from megatron_qad.distillation import LOSSES, LogitLoss, parse_loss
from megatron_qad.distillation.hidden_states import HiddenLoss
from megatron_qad.distillation.scale_growth import ScaleGrowth
from megatron_qad.engine import QADError


def names(losses):
    return tuple(term.name for term in losses.terms)


def weights(losses, step):
    return [term.weight.at_step(step) for term in losses.terms]


def test_every_name_parses_to_its_loss():
    for name, kind in LOSSES.items():
        losses = parse_loss(name)
        assert names(losses) == (name,) and isinstance(losses.terms[0].loss, kind)
        assert weights(losses, 7) == [1.0]
        assert losses.needs_teacher == (name != "ce")


def test_terms_of_all_types():
    losses = parse_loss(
        "ce + 0.1*hidden_mse(layers=[0, -1], teacher_layers=[1, -1]) + hidden_cosine + 1e-4*scale_growth"
    )
    assert names(losses) == ("ce", "hidden_mse", "hidden_cosine", "scale_growth")
    assert losses.needs_teacher and [term.name for term in losses.terms_of_type(LogitLoss)] == ["ce"]
    mse, cosine = (term.loss for term in losses.terms_of_type(HiddenLoss))
    assert mse.pairs(4, 6) == [(0, 1), (3, 5)] and cosine.pairs(2, 3) == [(0, 0), (1, 1)]
    assert [term.weight.at_step(1) for term in losses.terms_of_type(ScaleGrowth)] == [1e-4]
    assert not parse_loss("ce+scale_growth").needs_teacher


def test_weighted_sum_with_settings():
    losses = parse_loss(
        "kl(temperature=2) + 0.5*ce + 0.25 * jsd(beta=0.1, teacher_temperature=3)+topk(k=8)", temperature=1.5
    )
    kl, ce, jsd, topk = (term.loss for term in losses.terms)
    assert names(losses) == ("kl", "ce", "jsd", "topk")
    assert weights(losses, 1) == [1.0, 0.5, 0.25, 1.0]
    assert (kl.temperature, kl.teacher_temperature) == (2, 2)
    assert (jsd.temperature, jsd.teacher_temperature, jsd.beta) == (1.5, 3, 0.1)
    assert (topk.k, topk.temperature) == (8, 1.5)
    assert ce.temperature == 1.0  # --qad-temperature does not apply to the cross entropy of labels


def test_repeated_losses_get_numbered_names():
    assert names(parse_loss("kl+kl(temperature=4)+ce+kl")) == ("kl", "kl 2", "ce", "kl 3")


@pytest.mark.parametrize(
    "schedule, values",
    [
        ("linear(1, 0, 10, 20)", {1: 1, 10: 1, 15: 0.5, 18: 0.2, 20: 0, 99: 0}),
        ("cosine(0, 2, 10, 20)", {1: 0, 10: 0, 15: 1, 20: 2, 99: 2, 12: 1 - 0.8090169943749475}),
        ("0.3", {1: 0.3, 1000: 0.3}),
        ("-1", {5: -1}),
    ],
)
def test_schedules(schedule, values):
    weight = parse_loss(f"{schedule}*ce").terms[0].weight
    for step, value in values.items():
        assert weight.at_step(step) == pytest.approx(value, abs=1e-12)


def test_yaml_file_equals_string(tmp_path):
    file = tmp_path / "loss.yaml"
    file.write_text(
        "- loss: kl\n  temperature: 2\n"
        "- loss: ce\n  weight: {schedule: linear, start_weight: 1, end_weight: 0, start: 10, end: 20}\n"
        "- {loss: topk, k: 8, weight: 0.5}\n"
    )
    from_file, from_string = parse_loss(str(file)), parse_loss("kl(temperature=2)+linear(1,0,10,20)*ce+0.5*topk(k=8)")
    for a, b in zip(from_file.terms, from_string.terms, strict=True):
        assert (a.name, a.weight, vars(a.loss)) == (b.name, b.weight, vars(b.loss))


@pytest.mark.parametrize(
    "text, message",
    [
        ("mze", "unknown loss 'mze', expected one of kl, reverse_kl"),
        ("kl+0.5*xx", "unknown loss 'xx', expected one of"),
        (
            "jsd(betta=1)",
            "jsd has no setting 'betta', its settings are beta, teacher_temperature, temperature; did you mean 'beta'?",
        ),
        ("ce(temperature=2)", "ce has no setting 'temperature', its settings are none"),
        ("jsd(0.5)", "expected settings with names"),
        ("jsd(beta=2)", "jsd(beta=2): expected a number between 0 and 1"),
        ("topk(k=0.5)", "topk(k=0.5): expected an integer"),
        ("kl(temperature=0)", "temperature 0: expected a finite number above 0"),
        ("kl-ce", "kl - ce: expected [WEIGHT *] LOSS"),
        ("kl+", "expected losses joined by +"),
        ("", "expected losses joined by +"),
        ("cosin(1,0,0,9)*ce", "unknown schedule 'cosin', expected linear or cosine; did you mean 'cosine'?"),
        ("linear(1,0,9)*ce", "expected linear(FROM, TO, START, END)"),
        ("linear(1,0,9,9)*ce", "last step 9 must be after first step 9"),
        ("kl*2", "kl: expected a number"),
        ("ce*kl", "ce: expected a number"),
        ("kl(temperature='hot')", "'hot'"),
        ("none.yaml", "no such file"),
        ("kl(temperature=True)", "kl(temperature=True): expected a finite number"),
        ("kl(temperature=[1])", "kl(temperature=[1]): expected a finite number"),
        ("kl(temperature=1j)", "kl(temperature=1j): expected a finite number"),
        ("kl(temperature=1e400)", "kl(temperature=inf): expected a finite number"),
        ("kl(teacher_temperature='2')", "kl(teacher_temperature='2'): expected a finite number"),
        ("kl(temperature=2, temperature=3)", "expected each setting once"),
        ("kl(**{'temperature': 2})", "expected each setting once"),
        ("topk(k=True)", "topk(k=True): expected an integer"),
        ("mse(centred=1)", "mse(centred=1): expected true or false"),
        ("linear(True, 0, 1, 5)*kl", "expected four finite numbers"),
        ("kl\x00", "expected losses joined by +"),
    ],
)
def test_invalid_strings_raise(text, message):
    with pytest.raises(QADError) as error:
        parse_loss(text)
    assert str(error.value).startswith(f"--qad-loss {text!r}: ") and message in str(error.value)


@pytest.mark.parametrize(
    "content, message",
    [
        ("loss: kl", "expected a list of mappings"),
        ("- {name: kl}", "each with the key 'loss'"),
        ("- {loss: kl, weight: {from: 1}}", "weight has no key 'from', its keys are start_weight, end_weight"),
        ("- {loss: kl, weight: much}", "weight 'much': expected a finite number or a schedule"),
        ("- {loss: kl, weight: {schedule: linear, start_weight: x, end: 4}}", "expected four finite numbers"),
        ("[", "not valid YAML"),
        ("- {loss: [kl]}", "loss ['kl']: expected the name of a loss"),
        ("- {loss: null}", "loss None: expected the name of a loss"),
        ("- {loss: kl, loss: ce}", "the key 'loss' is there twice"),
        ("- {loss: kl, temperature: null}", "kl(temperature=None): expected a finite number"),
        ("- {loss: kl, temperature: 2020-01-01}", "expected a finite number"),
        ("- {loss: kl, weight: 1" + "0" * 400 + "}", "expected a finite number or a schedule"),
        ("- {loss: kl, weight: .nan}", "weight nan: expected a finite number"),
        ("- {loss: kl, weight: {schedule: [linear], start_weight: 1, end: 5}}", "unknown schedule ['linear']"),
        ("- {loss: kl, 1: 2}", "kl has no setting 1"),
    ],
)
def test_invalid_files_raise(tmp_path, content, message):
    file = tmp_path / "loss.yaml"
    file.write_text(content)
    with pytest.raises(QADError) as error:
        parse_loss(str(file))
    assert message in str(error.value)


@pytest.mark.parametrize("text", ["+".join(["kl"] * 20_000), "kl(temperature=" + "-" * 20_000 + "1)", "(" * 500 + "kl"])
def test_hostile_strings_are_one_short_error(text):
    with pytest.raises(QADError, match="--qad-loss ") as error:
        parse_loss(text)
    assert len(str(error.value)) < 1000
