"""Arguments that QADTrainer refuses, before anything is trained."""

import pytest
from transformers import TrainingArguments

from megatron_qad.engine.errors import QADError
from megatron_qad.hf_training.quantize_model import quantize_model
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
