"""How often a job reads its data: 617 epochs of 100 chats trained without a word."""

import pytest

from megatron_qad.data.data_options import DataOptions
from megatron_qad.data.epochs import describe_epochs, epochs_of
from megatron_qad.data.provider import dataset_config


@pytest.fixture
def describe(args_for):
    def describe(num_samples: int, *flags: str) -> list[str]:
        config = dataset_config(args_for(*flags), DataOptions(calibration_samples=8))
        return describe_epochs(config, num_samples)

    return describe


def test_epochs_of_a_blend():
    assert epochs_of(100, [50, 25], None) == pytest.approx([4 / 3, 4 / 3])
    assert epochs_of(100, [50, 25], [3, 1]) == [1.5, 1.0]


def test_job_says_how_often_it_reads_its_data(describe, write_jsonl, prepared, hf_dir, args_for):
    chat = {"messages": [{"role": "user", "content": "ABC"}, {"role": "assistant", "content": "123"}]}
    prefix, metadata = prepared(write_jsonl([chat] * 100), hf_dir)
    tokens, length = metadata.tokens, args_for("--data-path", prefix).seq_length
    share = ["--data-path", prefix, "--split", "80,20,0"]
    few = int(4 * 0.8 * tokens / length)
    (line,) = describe(few, *share)
    assert line.startswith(f"{few * length:,} training tokens are 4 epochs of the training data ({0.8 * tokens:,.0f}")
    many = int(617 * 0.8 * tokens / length)
    _, warning = describe(many, *share)
    assert warning.startswith(f"WARNING: {prefix} is read 617 times. From about 16 epochs on")
    assert "at most 3% of these" in warning


def test_repeated_part_of_a_blend(describe, write_jsonl, prepared, hf_dir, args_for):
    """A small part with a large weight is read often, although the blend as a whole is not."""
    lines = [[{"text": "ABC 123"}] * 30, [{"text": "ABC 123"}] * 3000]
    parts = zip(lines, ("small", "large"), strict=True)
    (small, metadata), (large, _) = (prepared(write_jsonl(part), hf_dir, name) for part, name in parts)
    length = args_for("--data-path", small).seq_length
    num_samples = round(20 * metadata.tokens / 0.9 / length)
    flags = ["--train-data-path", "0.9", small, "0.1", large, "--valid-data-path", large]
    line, warning = describe(num_samples, *flags)
    assert f"; with the weights of the blend up to {20:.3g} of {small}" in line and " are 0.22 epochs" in line
    assert warning.startswith(f"WARNING: {small} is read 20 times.")


def test_job_without_training_data_reads_no_epochs(describe, write_jsonl, prepared, hf_dir):
    prefix, _ = prepared(write_jsonl([{"text": "ABC 123"}] * 30), hf_dir)
    assert describe(8, "--data-path", prefix, "--split", "0,100,0", "--skip-train") == []
