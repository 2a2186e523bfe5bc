"""read_scalars and last_validation on event files written by torch's SummaryWriter."""

import math

import numpy as np
import pytest

from megatron_qad.engine.errors import QADError
from megatron_qad.report.scalars import last_validation, read_scalars


def float32(curve):
    """Round the values to float32, as TensorBoard stores them."""
    return [(step, float(np.float32(value))) for step, value in curve]


def test_every_value_is_read(tmp_path, write_events):
    # More than 10,000 values: TensorBoard's own reader would keep a random sample.
    loss = [(i, math.sin(i)) for i in range(1, 12_001)]
    write_events(tmp_path, {"kl loss": loss, "learning-rate": [(1, 1e-5)]})
    assert read_scalars(tmp_path) == {"kl loss": float32(loss), "learning-rate": float32([(1, 1e-5)])}


def test_tensorboard_subdirectory_is_preferred(tmp_path, write_events):
    write_events(tmp_path / "tensorboard", {"kl loss": [(1, 0.5)]})
    write_events(tmp_path, {"ce loss": [(1, 2.0)]})
    assert read_scalars(tmp_path) == {"kl loss": [(1, 0.5)]}
    assert read_scalars(str(tmp_path / "tensorboard")) == {"kl loss": [(1, 0.5)]}


def test_resumed_run_replaces_steps_after_its_checkpoint(tmp_path, write_events):
    write_events(tmp_path, {"kl loss": [(i, 1.0) for i in range(1, 8)], "only early": [(3, 7.0)]})
    write_events(tmp_path, {"kl loss": [(i, 2.0) for i in range(4, 6)]})  # resumed at 3, stopped at 5
    write_events(tmp_path, {"kl loss": [(6, 3.0)], "only late": [(6, 8.0)]})
    scalars = read_scalars(tmp_path)
    # Steps 4 to 7 of the first start were abandoned when the second resumed at step 3.
    assert scalars["kl loss"] == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0), (6, 3.0)]
    assert scalars["only early"] == [(3, 7.0)] and scalars["only late"] == [(6, 8.0)]


def test_files_are_ordered_by_time_not_by_name(tmp_path, write_events):
    for name, value in (("events.out.tfevents.9", 1.0), ("events.out.tfevents.1", 2.0)):  # the older one sorts last
        write_events(tmp_path / "w", {"kl loss": [(1, value)]})
        (written,) = (tmp_path / "w").iterdir()
        written.rename(tmp_path / name)
    assert read_scalars(tmp_path) == {"kl loss": [(1, 2.0)]}


def test_truncated_last_record_is_ignored(tmp_path, write_events):
    write_events(tmp_path, {"kl loss": [(1, 0.5), (2, 0.25), (3, 0.125)]})
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-7])  # inside the last record
    assert read_scalars(tmp_path) == {"kl loss": [(1, 0.5), (2, 0.25)]}


def test_last_validation_uses_the_last_value_of_the_last_step(tmp_path, write_events, evaluations):
    scalars = evaluations({3: (0.5, 2.0, 1.75, 0.5, 1024), 6: (0.25, 2.5, 1.75, 0.75, 1024)})
    scalars["validation/kl_to_teacher"].append((6, 0.125))  # Megatron evaluates again when training ends
    write_events(tmp_path, scalars | {"kl loss": [(9, 0.1)]})
    assert last_validation(tmp_path) == {
        "kl_to_teacher": 0.125,
        "cross_entropy": 2.5,
        "teacher_cross_entropy": 1.75,
        "top1_agreement": 0.75,
        "num_tokens": 1024,
        "iteration": 6,
    }


def test_last_validation_omits_metrics_of_earlier_evaluations(tmp_path, write_events):
    write_events(tmp_path, {"validation/kl_to_teacher": [(3, 0.5)], "validation/cross_entropy": [(3, 2.0), (6, 1.5)]})
    assert last_validation(tmp_path) == {"cross_entropy": 1.5, "iteration": 6}


def test_missing_directories_files_and_scalars_are_errors(tmp_path, write_events):
    with pytest.raises(QADError, match="nowhere: no such directory"):
        read_scalars(tmp_path / "nowhere")
    with pytest.raises(QADError, match="no TensorBoard event files.*--tensorboard-dir"):
        read_scalars(tmp_path)
    write_events(tmp_path / "empty", {})
    with pytest.raises(QADError, match="have no scalars"):
        read_scalars(tmp_path / "empty")
    write_events(tmp_path / "trained", {"kl loss": [(1, 0.5)]})
    with pytest.raises(QADError, match="no evaluation is recorded.*--eval-iters"):
        last_validation(tmp_path / "trained")
