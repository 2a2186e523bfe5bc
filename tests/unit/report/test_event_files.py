"""Damaged, truncated, missing and swapped event files give the same scalars or an error."""

import hashlib
import json
import random

import pytest
from torch.utils.tensorboard import SummaryWriter

from megatron_qad.engine.errors import QADError
from megatron_qad.engine.event_record import EventRecord
from megatron_qad.report.event_files import read_events
from megatron_qad.report.scalars import read_scalars

LOSS = [(i, 1.0 / i) for i in range(1, 7)]


def write_record(run, target="iter_0000006"):
    (run / target).mkdir(exist_ok=True)
    (run / target / "event_files.json").write_text(EventRecord(run / "tensorboard", run).text())


def event_files(run):
    """Return the event files in the order in which ``write_events`` wrote them (the suffix of their names)."""
    return sorted((run / "tensorboard").glob("events.*"), key=lambda file: int(file.name.rsplit(".", 1)[1]))


@pytest.fixture
def run(tmp_path, write_events):
    """Two starts of one job, the second one resumed at iteration 3, with a checkpoint after each."""
    run = tmp_path / "run"
    write_events(run / "tensorboard", {"job/start": [(0, 0)], "kl loss": LOSS[:4]})
    write_record(run, "iter_0000003")
    write_events(run / "tensorboard", {"job/start": [(3, 1)], "kl loss": LOSS[3:]})
    write_record(run)
    return run


def flip(byte):
    def damage(file):
        content = bytearray(file.read_bytes())
        content[byte] ^= 4
        file.write_bytes(content)

    return damage


def cut(num_bytes):
    return lambda file: file.write_bytes(file.read_bytes()[:num_bytes])


def zero(begin, end=None):
    def damage(file):
        content = bytearray(file.read_bytes())
        content[begin:end] = bytes(len(content[begin:end]))
        file.write_bytes(content)

    return damage


DAMAGE = {
    "length": flip(0),
    "checksum of a length": flip(9),
    "event": flip(30),
    "checksum of an event": flip(-1),
    "middle": flip(150),
    "zeros in the middle": zero(100, 160),
    "zeros at the end": zero(-40),
    "all zeros": zero(0),
    "truncated in a length": cut(-45),
    "truncated in the last record": cut(-7),
    "truncated in the first record": cut(5),
    "empty": cut(0),
    "truncated to half": lambda file: cut(file.stat().st_size // 2)(file),
    "deleted": lambda file: file.unlink(),
}


@pytest.mark.parametrize("index", [0, 1], ids=["first", "last"])
@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_file_is_an_error_unless_gaps_are_accepted(run, case, index):
    file = event_files(run)[index]
    DAMAGE[case](file)
    with pytest.raises(QADError, match=f"{file}: .*Restore the file from a copy, or accept the gap with --accept-gaps"):
        read_scalars(run)
    with pytest.raises(QADError, match=file.name):
        read_scalars(run / "tensorboard")  # the same files, given by their directory
    notes = []
    read_scalars(run, accept_gaps=True, notes=notes)
    assert any(file.name in note and "accepted" in note for note in notes)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("length", "damaged: the length of record 1 at byte 0 does not match its checksum"),
        ("checksum of an event", "damaged: record 6 at byte .* does not match its checksum"),
        ("all zeros", "damaged: the length of record 1"),
    ],
)
def test_checksums_are_verified_without_a_record(tmp_path, write_events, case, message):
    write_events(tmp_path, {"kl loss": LOSS[:5]})
    DAMAGE[case](next(tmp_path.iterdir()))
    with pytest.raises(QADError, match=message):
        read_scalars(tmp_path)


def test_swapped_files_are_an_error(run):
    first, second = event_files(run)
    first.rename(run / "aside")
    second.rename(first)
    (run / "aside").rename(second)
    with pytest.raises(QADError, match="truncated|changed"):
        read_scalars(run)


def test_truncated_record_after_the_newest_checkpoint_is_a_note(run, write_events):
    write_events(run / "tensorboard", {"job/start": [(6, 2)], "kl loss": [(7, 0.5), (8, 0.25)]})
    cut(-7)(event_files(run)[2])
    notes = []
    assert read_scalars(run, notes=notes)["kl loss"][-1] == (7, 0.5)
    assert len(notes) == 1 and notes[0].startswith(f"{event_files(run)[2].name} ends within a record")
    # The next checkpoint records the truncated file, and the job continues.
    write_events(run / "tensorboard", {"job/start": [(6, 3)], "kl loss": [(7, 0.5), (8, 0.25)]})
    write_record(run, "iter_0000008")
    assert read_scalars(run)["kl loss"][-1] == (8, 0.25)
    cut(-1)(event_files(run)[2])
    with pytest.raises(QADError, match=r"truncated: it has .* \(iter_0000008/event_files.json\)"):
        read_scalars(run)


def test_record_of_the_end_of_a_job_is_used(run, write_events):
    write_events(run / "tensorboard", {"job/start": [(6, 2)], "validation/kl_to_teacher": [(6, 0.5)]})
    (run / "event_files.json").write_text(EventRecord(run / "tensorboard", run).text())
    assert read_scalars(run)["validation/kl_to_teacher"] == [(6, 0.5)]
    event_files(run)[2].unlink()
    with pytest.raises(QADError, match=r"missing; expected .* \(event_files.json\)"):
        read_scalars(run)


def test_invalid_record_is_an_error(run):
    (run / "iter_0000006" / "event_files.json").write_text("{")
    with pytest.raises(QADError, match="iter_0000006/event_files.json: not a valid record"):
        read_scalars(run)


def test_moved_run_is_verified(run, tmp_path, write_events):
    moved = run.rename(tmp_path / "moved")
    assert len(read_scalars(moved)["kl loss"]) == 6
    (moved / "tensorboard").rename(moved / "kept")
    write_events(moved / "tensorboard", {"kl loss": LOSS})  # another directory under the recorded name
    with pytest.raises(QADError, match=r"missing; expected .* And 1 more\."):
        read_scalars(moved)


def test_record_of_another_directory_is_a_note(run, write_events):
    (run / "tensorboard").rename(run / "events")
    (run / "iter_0000006" / "event_files.json").write_text(EventRecord(run / "events", run).text())
    write_events(run / "tensorboard", {"kl loss": LOSS})
    notes = []
    read_scalars(run, notes=notes)
    assert len(notes) == 1 and notes[0].startswith("its job wrote its events to events, not to tensorboard")
    assert len(read_scalars(run / "events")["kl loss"]) == 6
    files = sorted((run / "events").iterdir())
    files[0].unlink()
    with pytest.raises(QADError, match=f"{files[0]}: missing"):
        read_scalars(run / "events")


def test_record_hashes_only_new_bytes(run):
    record, file = EventRecord(run / "tensorboard", run), event_files(run)[0]
    record.text()
    old = file.read_bytes()
    file.write_bytes(bytes(len(old)) + b"more")
    entry = json.loads(record.text())["files"][file.name]
    assert entry == {"bytes": len(old) + 4, "sha256": hashlib.sha256(old + b"more").hexdigest()}


def test_random_damage_gives_the_same_scalars_or_an_error(run):
    expected = read_scalars(run)
    (run / "event_files.json").write_text(EventRecord(run / "tensorboard", run).text())
    contents = {file: file.read_bytes() for file in event_files(run)}
    random_ = random.Random(1)
    outcomes = {"same": 0, "error": 0}
    for _ in range(400):
        for file in random_.sample(list(contents), random_.choice((1, 1, 2))):
            size = len(contents[file])
            start, length = random_.randrange(size), random_.randrange(1, 60)
            kind = random_.choice(("bit", "cut", "zeros", "random", "drop", "twice", "delete", "swap", "append"))
            content = bytearray(contents[file])
            if kind == "bit":
                content[start] ^= 1 << random_.randrange(8)
            elif kind == "cut":
                del content[start:]
            elif kind == "zeros":
                content[start : start + length] = bytes(len(content[start : start + length]))
            elif kind == "random":
                content[start : start + length] = random_.randbytes(len(content[start : start + length]))
            elif kind == "drop":
                del content[start : start + length]
            elif kind == "twice":
                content[start:start] = content[start : start + length]
            elif kind == "swap":
                content = random_.choice(list(contents.values()))
            elif kind == "append":
                content += random_.randbytes(length)
            file.write_bytes(content)
            if kind == "delete":
                file.unlink()
        try:
            assert read_scalars(run) == expected
            outcomes["same"] += 1
        except QADError:
            outcomes["error"] += 1
        for file, content in contents.items():
            file.write_bytes(content)
    assert outcomes["error"] > 300 and outcomes["same"] > 0


def write_at(directory, time, scalars, monkeypatch):
    monkeypatch.setattr("time.time", lambda: time)
    writer = SummaryWriter(str(directory), filename_suffix=f".{len(list(directory.glob('*')))}")
    for name, curve in scalars.items():
        for step, value in curve:
            writer.add_scalar(name, value, step)
    writer.close()
    monkeypatch.undo()


def test_abandoned_steps_stay_out_if_the_clock_went_back(tmp_path, monkeypatch):
    first = {"job/start": [(0, 0)], "kl loss": [(i, 1.0) for i in range(1, 9)], "experts/changed": [(4, 1.0), (8, 1.0)]}
    write_at(tmp_path, 2000.0, first, monkeypatch)
    second = {"job/start": [(4, 1)], "kl loss": [(i, 2.0) for i in range(5, 7)], "kl loss vs samples": [(40, 2.0)]}
    write_at(tmp_path, 1000.0, second, monkeypatch)
    scalars = read_scalars(tmp_path)
    assert scalars["kl loss"] == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 1.0), (5, 2.0), (6, 2.0)]
    assert scalars["experts/changed"] == [(4, 1.0)]  # iteration 8 is abandoned although no later value replaces it
    assert scalars["kl loss vs samples"] == [(40, 2.0)]  # its steps are samples
    assert "job/start" not in scalars


def test_files_without_a_start_are_sorted_first_by_time(tmp_path, monkeypatch):
    write_at(tmp_path, 3000.0, {"kl loss": [(1, 1.0), (2, 1.0)]}, monkeypatch)
    write_at(tmp_path, 4000.0, {"kl loss": [(2, 2.0)]}, monkeypatch)
    write_at(tmp_path, 1000.0, {"job/start": [(2, 2)], "kl loss": [(3, 3.0)]}, monkeypatch)
    events = read_events(sorted(tmp_path.iterdir()), tmp_path)
    assert [file.start for file in events.files] == [None, None, (2, 2)]
    assert read_scalars(tmp_path)["kl loss"] == [(1, 1.0), (2, 2.0), (3, 3.0)]
