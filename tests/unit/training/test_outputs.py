"""The rule that chooses logits or hidden states, in numbers."""

from types import SimpleNamespace

import pytest

from megatron_qad.config.options import QADOptions
from megatron_qad.distillation import parse_loss
from megatron_qad.engine.errors import QADError
from megatron_qad.training.outputs import Outputs, check_head, choose_outputs, fused_bytes, output_bytes


def job(*, tokens=4096, tp=1, vocabulary=131072, sequence_parallel=False, **qad):
    return SimpleNamespace(
        qad=QADOptions(**qad),
        bf16=True,
        fp16=False,
        micro_batch_size=1,
        seq_length=tokens,
        context_parallel_size=1,
        tensor_model_parallel_size=tp,
        sequence_parallel=sequence_parallel,
        padded_vocab_size=vocabulary,
    )


# Job, loss, teacher's hidden size, outputs. 4096 tokens x 131072 x 2 bytes are 1 GiB of one model.
CASES = {
    "large": (job(), "kl", 4096, Outputs(fused=True, teacher_hidden=True)),
    "large, but jsd": (job(), "kl+jsd", 4096, Outputs(fused=False, teacher_hidden=True)),
    "large, but logits": (job(qad_teacher_output="logits"), "kl", 4096, Outputs(False, False)),
    "exactly 1 GiB": (job(tokens=2048), "kl", 4096, Outputs(False, True)),
    "a token more": (job(tokens=2049), "kl", 4096, Outputs(True, True)),
    "1 GiB of one model": (job(), "ce", None, Outputs(False, False)),
    "few columns a rank": (job(tp=64), "kl", 4096, Outputs(False, False)),
    "few columns, hidden states shared out": (job(tp=64, sequence_parallel=True), "kl", 4096, Outputs(False, True)),
    "asked for": (job(tokens=8, qad_output_layer="fused"), "kl", 1 << 20, Outputs(True, True)),
    "not asked for": (job(qad_output_layer="separate"), "kl", 4096, Outputs(False, True)),
}


@pytest.mark.parametrize("case", CASES)
def test_rule(case):
    args, loss, hidden_size, expected = CASES[case]
    assert choose_outputs(args, parse_loss(loss), hidden_size) == expected


def test_bytes():
    found = output_bytes(job(tokens=100, tp=4, vocabulary=1000, sequence_parallel=True), 64)
    assert found == {"logits": 100 * 250 * 2, "hidden": 100 * 64 // 4 * 2}


def test_bytes_of_a_fused_output_layer():
    """On a GPU a chunk is 2 GiB: 4096 tokens of two models at 131072 columns. One loss of 4096 tokens makes its
    gradient in the forward pass where that is no larger than both models' logits: up to a hidden size of 4096."""
    of_chunk = 2 * 4096 * 131072 * 2
    assert fused_bytes(job(tokens=8192), 1, 4096)["chunk"] == of_chunk == 2 << 30
    assert fused_bytes(job(), 1, 4096) == {"chunk": of_chunk, "gradient": 4 * 131072 * 4096}
    assert fused_bytes(job(), 1, 4097) == {"chunk": of_chunk, "gradient": 0}
    assert fused_bytes(job(), 2, 4096) == {"chunk": of_chunk, "gradient": 0}
    assert fused_bytes(job(tokens=100), 1, 50)["chunk"] == 2 * 100 * 131072 * 2


def test_an_int4_head_is_not_fused():
    """It would be trained, and measured, unquantized."""
    formats = {"output_layer.weight": "int4-w4a16"}
    check_head(Outputs(False, True), formats)
    check_head(Outputs(True, True), {"output_layer.weight": "nvfp4"})
    check_head(Outputs(True, True), {})
    with pytest.raises(QADError, match="INT4 head .* --qad-output-layer separate"):
        check_head(Outputs(True, True), formats)


def test_contradictions():
    with pytest.raises(QADError, match="jsd reads all logits twice"):
        choose_outputs(job(qad_output_layer="fused"), parse_loss("jsd"), 64)
    with pytest.raises(QADError, match="needs the teacher's hidden states"):
        choose_outputs(job(qad_output_layer="fused", qad_teacher_output="logits"), parse_loss("kl"), 64)
