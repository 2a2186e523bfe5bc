"""vLLM's engine serves a student trained on text as Megatron computes it, and what the tie-free factor is for."""

import pytest
import students
from agreement import Agreement
from vllm_engine import serve

ENGINE = "vLLM 0.32 engine"


@pytest.fixture(scope="module")
def served(serving_python, serving_env, text_student, tmp_path_factory):
    """Log-probabilities in vLLM by layout."""
    models = {layout: (text_student.export(layout), text_student.prompts) for layout in students.LAYOUTS}
    return serve(serving_python, serving_env, models, tmp_path_factory.mktemp("vllm"))


@pytest.mark.parametrize("layout", students.LAYOUTS)
def test_engine_serves_a_trained_student(served, text_student, record_property, layout):
    """More tokens and a larger vocabulary than in test_vllm_engine: some float32 input may be next to a rounding
    boundary, where sums in another order give it the next code. Measured: KL 3.5e-5, from 22 of 512 positions.
    """
    agreement = Agreement.of(text_student.logprobs, served[layout])
    record_property("served", agreement.row("text", layout, ENGINE))
    assert agreement.kl <= 1e-3 and agreement.top1 >= 0.97


@pytest.mark.all  # measures what the factor is for; docs/lab_log.md has the figures
def test_tie_free_factor(serving_python, serving_env, text_student, tmp_path, record_property):
    """Without the factor of input scales, bfloat16 inputs at ties get other codes in vLLM than in training.

    Measured: KL 3.4e-9 with the factor, 3.2e-3 without. In float32 it is 3.5e-5. Float32 inputs
    are not at ties, so without bfloat16 the factor changes nothing that is not chance.
    """
    models, variants = {}, ("ties", "bf16", "bf16-ties")
    for variant in variants:
        text_student.export_all(["modelopt"], variant)
        models[variant] = text_student.export("modelopt", variant), text_student.prompts
    engine = serve(serving_python, serving_env, models, tmp_path, bf16_inputs=variants[1:])
    agreements = {}
    for variant in variants:
        student = text_student.logprobs_of(text_student.prompts, variant)
        agreements[variant] = Agreement.of(student, engine[variant])
        record_property("served", agreements[variant].row(f"text, {variant}", "modelopt", ENGINE))
    assert agreements["bf16-ties"].kl > 10 * agreements["bf16"].kl
