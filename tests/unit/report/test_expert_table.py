"""Expert table of the run report, from expert_load.json."""

from megatron_qad.engine.run_directory import json_records
from megatron_qad.report.collect import Results
from megatron_qad.report.expert_table import Experts, expert_rows
from megatron_qad.report.markdown import markdown
from megatron_qad.report.runs import Run

LAYERS = {
    "3": {"teacher": [30, 10, 20, 20], "student": [32, 8, 20, 20], "compared": 40, "changed": 2},
    "1": {"teacher": None, "student": [0, 0, 8, 0], "compared": 0, "changed": 0},
}


def render_report(experts: Experts) -> str:
    model = {"architecture": "X", "num_hidden_layers": 1, "hidden_size": 1, "vocab_size": 1, "num_weights": 1}
    run = Run("QAD", "somewhere", {}, {}, None, None, experts)
    return markdown(Results("a title", "a teacher", model, [run], [], []))


def test_report_has_expert_load(tmp_path):
    json_records.write(tmp_path / "expert_load.json", {"iteration": 7, "layers": LAYERS})
    experts = Experts.read(tmp_path)
    assert expert_rows("QAD", experts) == [
        ["QAD", "1", "not compared", "not compared", "not compared", "4.00", "0.00"],
        ["QAD", "3", "5.00%", "1.50", "0.50", "1.60", "0.40"],
    ]
    text = render_report(experts)
    assert "| QAD | 3 | 5.00% | 1.50 | 0.50 | 1.60 | 0.40 |" in text


def test_model_without_experts_has_no_section(tmp_path):
    assert Experts.read(tmp_path) == Experts()
    assert "Experts" not in render_report(Experts.read(tmp_path))
