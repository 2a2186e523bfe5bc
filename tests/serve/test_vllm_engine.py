"""vLLM's engine serves exports with the log-probabilities of the students in Megatron, at every position."""

import pytest
import students
from agreement import Agreement
from vllm_engine import serve

# Both sides compute in float32, with sums in another order: measured 2.9e-6 (Llama) to 1.9e-5 (Qwen2). A float32 input
# next to a rounding boundary could take another NVFP4 code; with these seeds none does.
LARGEST = 1e-4
SERVED = [(name, layout) for name in students.FAMILIES for layout in students.LAYOUTS]


@pytest.fixture(scope="module")
def served(serving_python, serving_env, random_students, tmp_path_factory):
    """(student, log-probabilities in vLLM) by (name, layout)."""
    known = {student.name: student for student in random_students}
    models = {f"{n}-{layout}": (known[n].export(layout), known[n].prompts) for n, layout in SERVED}
    logprobs = serve(serving_python, serving_env, models, tmp_path_factory.mktemp("vllm"))
    return {(name, layout): (known[name], logprobs[f"{name}-{layout}"]) for name, layout in SERVED}


@pytest.mark.parametrize("name, layout", SERVED)
def test_engine_has_the_log_probabilities_of_the_student(served, record_property, name, layout):
    student, logprobs = served[name, layout]
    assert logprobs.shape == (*student.prompts.shape, student.logprobs.shape[-1])
    agreement = Agreement.of(student.logprobs, logprobs)
    record_property("served", agreement.row(name, layout, "vLLM 0.32 engine"))
    assert agreement.largest <= LARGEST
    assert student.logprobs.std() > 0.3, "log-probabilities too flat to tell models apart"


def test_engine_would_show_a_wrong_export(served):
    """Another student, and the same one with its inputs shifted by one position, are far outside the limit."""
    llama, qwen3 = (served[name, "modelopt"][0].logprobs for name in ("llama", "qwen3"))
    engine = served["llama", "modelopt"][1]
    assert Agreement.of(qwen3, engine).largest > 100 * LARGEST
    assert Agreement.of(llama[:, 1:], engine[:, :-1]).largest > 100 * LARGEST
