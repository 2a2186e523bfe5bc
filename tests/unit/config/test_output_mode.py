"""The output mode of a job: logits or hidden states, chosen by their sizes."""

import pytest

from megatron_qad.config.megatron_flags import MegatronFlags
from megatron_qad.config.output_mode import OutputMode, OutputSizes, resolve_output_mode
from megatron_qad.config.qad_options import QADOptions
from megatron_qad.distillation import parse_loss
from megatron_qad.engine.errors import QADError


def job(*, tokens=4096, tp=1, vocabulary=131072, sequence_parallel=False, **qad) -> tuple[QADOptions, OutputSizes]:
    flags = MegatronFlags(
        bf16=True,
        micro_batch_size=1,
        seq_length=tokens,
        tensor_model_parallel_size=tp,
        sequence_parallel=sequence_parallel,
    )
    return QADOptions(**qad), OutputSizes.from_flags(flags, vocabulary)


def sizes(**changes) -> OutputSizes:
    return job(**changes)[1]


# Job, loss, hidden size of the teacher, expected mode. The logits of one model are 4096 x 131072 x 2 bytes = 1 GiB.
CASES = {
    "large": (job(), "kl", 4096, OutputMode(fused=True, teacher_hidden=True)),
    "large, but jsd": (job(), "kl+jsd", 4096, OutputMode(fused=False, teacher_hidden=True)),
    "large, but logits": (job(qad_teacher_output="logits"), "kl", 4096, OutputMode(False, False)),
    "exactly 1 GiB": (job(tokens=2048), "kl", 4096, OutputMode(False, True)),
    "one token more": (job(tokens=2049), "kl", 4096, OutputMode(True, True)),
    "1 GiB of one model": (job(), "ce", None, OutputMode(False, False)),
    "few columns per rank": (job(tp=64), "kl", 4096, OutputMode(False, False)),
    "few columns, split hidden states": (job(tp=64, sequence_parallel=True), "kl", 4096, OutputMode(False, True)),
    "always": (job(tokens=8, qad_fused_linear_loss="always"), "kl", 1 << 20, OutputMode(True, True)),
    "never": (job(qad_fused_linear_loss="never"), "kl", 4096, OutputMode(False, True)),
}


@pytest.mark.parametrize("case", CASES)
def test_output_mode(case):
    options_and_sizes, loss, hidden_size, expected = CASES[case]
    assert resolve_output_mode(*options_and_sizes, parse_loss(loss), hidden_size) == expected


def test_bytes_of_logits_and_hidden_states():
    """1000 columns are padded to 1024, so that each of the four ranks has a multiple of 128."""
    output_sizes = sizes(tokens=100, tp=4, vocabulary=1000, sequence_parallel=True)
    assert (output_sizes.logits(), output_sizes.hidden(64)) == (100 * 256 * 2, 100 * 64 // 4 * 2)


def test_fused_output_layer_computes_a_small_gradient_in_the_forward_pass():
    """For one loss and 4096 tokens it does so up to a hidden size of 4096: the gradient is as large as both logits."""
    assert sizes().fused(1, 4096)["gradient"] == 4 * 131072 * 4096
    assert sizes().fused(1, 4097)["gradient"] == sizes().fused(2, 4096)["gradient"] == 0


def test_contradicting_flags_are_rejected():
    with pytest.raises(QADError, match="jsd reads all logits twice"):
        resolve_output_mode(*job(qad_fused_linear_loss="always"), parse_loss("jsd"), 64)
    with pytest.raises(QADError, match="needs the teacher's hidden states"):
        resolve_output_mode(*job(qad_fused_linear_loss="always", qad_teacher_output="logits"), parse_loss("kl"), 64)
