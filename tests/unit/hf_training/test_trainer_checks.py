"""Arguments that QADTrainer refuses, before anything is trained."""

import re

import pytest
import torch
from transformers import TrainingArguments

from megatron_qad.engine.errors import QADError
from megatron_qad.hf_training.input_calibration import calibrating
from megatron_qad.hf_training.qad_trainer import QADTrainer
from megatron_qad.hf_training.quantize_model import quantization_of, quantize_model
from megatron_qad.hf_training.trainer_checks import check_arguments


@pytest.fixture
def arguments(tmp_path):
    return lambda **changes: TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **changes)


@pytest.mark.parametrize(
    "name, value", [("label_smoothing_factor", 0.1), ("neftune_noise_alpha", 5.0), ("use_liger_kernel", True)]
)
def test_arguments_of_the_trainer(arguments, make_model, name, value):
    with pytest.raises(QADError, match=f"TrainingArguments.{name} is {value!r}: QADTrainer does not support it"):
        check_arguments(arguments(**{name: value}), {}, make_model(), make_model())


def test_means_of_means_are_refused(arguments, make_model):
    with pytest.raises(QADError, match="average_tokens_across_devices"):
        check_arguments(arguments(average_tokens_across_devices=False), {}, make_model(), make_model())
    with pytest.raises(QADError, match="compute_loss_func is not supported"):
        check_arguments(arguments(), {"compute_loss_func": print}, make_model(), make_model())


def test_teachers(arguments, make_model):
    model = make_model()
    with pytest.raises(QADError, match="the teacher is the student itself"):
        check_arguments(arguments(), {}, model, model)
    with pytest.raises(QADError, match="the teacher is quantized"):
        check_arguments(arguments(), {}, model, quantize_model(make_model()))
    with pytest.raises(QADError, match="vocabulary of 64, the student of 101"):
        check_arguments(arguments(), {}, model, make_model(vocab_size=64))


def test_settings_of_ddp(arguments, make_model):
    args = arguments()
    check_arguments(args, {}, make_model(), make_model())
    assert args.ddp_broadcast_buffers is False and args.ddp_find_unused_parameters is False


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"loss": "mze"}, "loss 'mze': unknown loss 'mze', expected one of kl, "),
        ({"loss": "hidden_mse"}, "loss 'hidden_mse': no loss of the logits among its terms."),
        ({"temperature": 0.0}, "temperature 0.0: expected a number above 0."),
        ({"calibration_samples": 0}, "calibration_samples 0: expected a number of 1 or more"),
        ({"calibration_percentile": 101.0}, "calibration_percentile 101.0: expected a number above 0 and up to 100."),
        ({"calibration_headroom": float("nan")}, "calibration_headroom nan: expected a finite number."),
        (
            {"calibration_percentile": 99.0, "calibration_headroom": 4.0},
            "calibration_percentile and calibration_headroom both set the amax of inputs.",
        ),
    ],
)
def test_own_arguments_are_named_and_not_flags(arguments, make_model, settings, message):
    with pytest.raises(QADError, match=re.escape(message)) as refused:
        QADTrainer(quantize_model(make_model()), make_model(), arguments(), **settings)
    assert "--" not in str(refused.value)


def test_a_layer_without_inputs_names_arguments(make_model, tokens):
    model = make_model()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.zero_()
        quantize_model(model)
        with pytest.raises(QADError) as refused, calibrating(quantization_of(model)):
            model(tokens)
    error = str(refused.value)
    assert "(calibration_samples of QADTrainer)" in error and "--" not in error
    rule = re.search(r"Policy\.load\(NAME, \['(.+)'\]\)", error)[1]
    assert rule == "decoder.layers.1.mlp.linear_fc2=bf16"
