"""The parts of streaming conversions: safetensors files, shards, worker processes, progress."""

import os
import signal
from collections import deque

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_qad.checkpoint import safetensors_file, worker_pool
from megatron_qad.checkpoint.partial_directory import PartialDirectory
from megatron_qad.checkpoint.progress import Progress
from megatron_qad.checkpoint.safetensors_file import Layout, spec_of
from megatron_qad.checkpoint.stream_shards import Piece, ShardPlan, ShardWriter
from megatron_qad.engine import QADError

TENSORS = {
    "b.weight": torch.randn(3, 5).bfloat16(),
    "a.weight": torch.randint(0, 255, (7, 3), dtype=torch.uint8),
    "a.weight_scale": torch.randn(7, 1).to(torch.float8_e4m3fn),
    "a.weight_scale_2": torch.tensor(0.5),
    "shape": torch.tensor([3, 7]),
    "half": torch.randn(4).half(),
    "int32": torch.arange(3, dtype=torch.int32),
    "ünïcode": torch.zeros(0, 4),
    "flag": torch.tensor([True]),
    "double": torch.randn(2).double(),
    "int8": torch.arange(5, dtype=torch.int8),
    "e5m2": torch.randn(3).to(torch.float8_e5m2),
}


def test_file_has_the_bytes_of_save_file(tmp_path):
    specs = {name: spec_of(tensor) for name, tensor in TENSORS.items()}
    safetensors_file.write_file(tmp_path / "ours", specs, reversed(TENSORS.items()))
    save_file(TENSORS, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_file_is_created_exclusively(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "precious")
    with pytest.raises(FileExistsError):
        Layout.of({"a": ("F32", (1,))}).create(tmp_path / "link")
    assert not (tmp_path / "precious").exists()


@pytest.mark.parametrize("num_workers", [1, 3])
def test_tasks_run_once_and_may_be_added(num_workers):
    queue = deque(range(20))
    done = []
    for task, (result, threads) in worker_pool.run(queue, lambda n: (n * n, torch.get_num_threads()), num_workers):
        assert (result, threads) == (task * task, 1)
        done.append(task)
        if task == 3:
            queue.appendleft(100)
    assert sorted(done) == [*range(20), 100]
    assert num_workers > 1 or done.index(100) == done.index(3) + 1  # several workers may finish others before it


def test_killed_worker_is_an_error():
    with pytest.raises(QADError, match="a worker process was killed, probably because memory ran out"):
        list(worker_pool.run([1, 2], lambda n: os.kill(os.getpid(), signal.SIGKILL), 2))


def test_error_of_a_worker_is_raised_with_its_type():
    def work(n):
        raise QADError(f"tensor {n}") if n else OSError(28, "No space left on device")

    with pytest.raises(OSError) as raised:
        list(worker_pool.run([0, 0, 0], work, 2))
    assert raised.value.errno == 28
    with pytest.raises(QADError, match="^tensor 7$"):
        list(worker_pool.run([7, 7], work, 2))


def test_progress_has_rate_and_time_left(capsys):
    progress = Progress("importing", 8_000_000_000, is_shown=True)
    progress.add(2_000_000_000)
    expected = "megatron_qad: importing: 25% of 8 GB, 200 MB/s, 0:00:30 left"
    assert progress.line(seconds=10) == expected
    progress.finish()
    assert not capsys.readouterr().out  # a conversion of less than half a minute prints no line in a log
    progress._start = progress._last = progress._start - 31
    progress.add(0)
    progress.finish()
    assert [line.split(",")[0] for line in capsys.readouterr().out.splitlines()] == [expected.split(",")[0]] * 2


class Source:
    """Tensors of several pieces; counts how often each is converted."""

    def __init__(self, log):
        self.log = log
        self.pieces = {
            piece: {f"{piece}.{i}": torch.full((10,), float(10 * piece + i)) for i in range(3)} for piece in range(8)
        }

    def plan(self) -> ShardPlan:
        specs = {piece: {name: spec_of(t) for name, t in tensors.items()} for piece, tensors in self.pieces.items()}
        return ShardPlan.of([Piece(piece, 120, specs[piece]) for piece in specs], max_shard_bytes=200)  # 5 tensors

    def convert(self, piece: int):
        with open(self.log, "a") as log:
            log.write(f"{piece} ")
        yield from self.pieces[piece].items()

    def converted(self) -> list[int]:
        return sorted(map(int, self.log.read_text().split())) if self.log.exists() else []


@pytest.mark.parametrize("num_workers", [1, 2])
def test_shards_hold_their_tensors_and_pieces_are_converted_once(num_workers, tmp_path):
    source = Source(tmp_path / "log")
    plan, partial = source.plan(), PartialDirectory(tmp_path / "out", {})
    partial.open()
    ShardWriter(plan, partial, source.convert).write(range(len(plan.names)), num_workers, is_shown=False)
    assert source.converted() == list(range(8)) and len(plan.names) == 5
    stored = {file: load_file(partial.path / file) for file in plan.names}
    assert [len(stored[file]) for file in plan.names] == [5, 5, 5, 5, 4]
    found = {name: tensor for tensors in stored.values() for name, tensor in tensors.items()}
    expected = {name: tensor for tensors in source.pieces.values() for name, tensor in tensors.items()}
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_ranks_write_their_own_shards(tmp_path):
    """A piece in the shards of two ranks is converted by both, and each writes its part."""
    source = Source(tmp_path / "log")
    plan = source.plan()
    partial = PartialDirectory(tmp_path / "out", {})
    partial.open()
    for rank in range(2):
        ShardWriter(plan, partial, source.convert).write(range(rank, len(plan.names), 2), 1, is_shown=False)
    assert len(source.converted()) == 8 + 3  # pieces 1, 3 and 6 have tensors in two shards
    stored = {name: t for file in plan.names for name, t in load_file(partial.path / file).items()}
    assert all(torch.equal(stored[name], t) for tensors in source.pieces.values() for name, t in tensors.items())


def test_finished_shards_are_kept_and_damaged_ones_written_again(tmp_path):
    source = Source(tmp_path / "log")
    plan, partial = source.plan(), PartialDirectory(tmp_path / "out", {"a": 1})
    partial.open()
    ShardWriter(plan, partial, source.convert).write(range(len(plan.names)), 1, is_shown=False)
    before = {name: (partial.path / name).read_bytes() for name in plan.names}
    (tmp_path / "log").unlink()
    (partial.path / plan.names[1]).write_bytes(before[plan.names[1]][:-1] + b"x")
    again = PartialDirectory(tmp_path / "out", {"a": 1})
    again.open()
    writer = ShardWriter(plan, again, source.convert)
    writer.write(range(len(plan.names)), 1, is_shown=False)
    assert source.converted() == [1, 2, 3]  # those with tensors in the second shard: 5 to 9 of 24
    assert {name: (partial.path / name).read_bytes() for name in plan.names} == before
    assert writer.sums().keys() == before.keys()
    other = PartialDirectory(tmp_path / "out", {"a": 2})
    other.open()
    assert not list(other.path.iterdir())


def test_name_that_occurs_twice_is_an_error():
    piece = Piece("a", 4, {"x": ("F32", (1,))})
    with pytest.raises(QADError, match="x: is exported twice"):
        ShardPlan.of([piece, piece], 100)
