"""Cached indices of samples and blends: damaged, unreadable and unwritable caches, built by Megatron's builder."""

import os
import resource
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
from megatron.core.tokenizers import MegatronTokenizer
from prepared import write_indexed, write_prepared

from megatron_qad.data.blending import QADBlendBuilder
from megatron_qad.data.dataset import QADDataset, QADDatasetConfig
from megatron_qad.data.index_cache import IndexCache, replace_file
from megatron_qad.engine.errors import QADError

SEQUENCE = 16


@pytest.fixture(scope="module")
def megatron_tokenizer(hf_dir):
    return MegatronTokenizer.from_pretrained(tokenizer_path=str(hf_dir), metadata_path={"library": "huggingface"})


def documents(num: int, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(1, 400, size=int(rng.integers(20, 50))) for _ in range(num)]


@pytest.fixture
def blend(tmp_path):
    return [write_prepared(f"{tmp_path}/{name}", documents(30, seed)) for seed, name in enumerate("ab")], [0.6, 0.4]


@pytest.fixture
def read(megatron_tokenizer, blend):
    """``read(cache)``: the samples of a training blend whose indices are cached there."""

    def run(cache, blend=blend, num_samples=40, **flags):
        config = QADDatasetConfig(
            random_seed=7,
            sequence_length=SEQUENCE,
            blend_per_split=[blend, None, None],
            tokenizer=megatron_tokenizer,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
            path_to_cache=cache and str(cache),
            **flags,
        )
        train, _, _ = QADBlendBuilder(QADDataset, [num_samples, 0, 0], lambda: True, config).build()
        return [train[i]["tokens"].tolist() for i in range(num_samples)]

    return run


def zero(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def change(file: Path) -> None:
    """Reverse the values, so that the file is still an array of the same shape."""
    content = file.read_bytes()
    file.write_bytes(content[:128] + content[128:][::-1])


def replace_by_directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize("damage", [zero, truncate, change, Path.unlink, replace_by_directory])
def test_damaged_files_are_built_again(read, tmp_path, capsys, damage):
    cache = tmp_path / "cache"
    expected = read(cache)
    arrays = sorted(cache.glob("*.npy"))
    assert len(arrays) == 2 * 3 + 2 and read(cache) == expected and capsys.readouterr().out == ""
    for file in arrays:
        damage(file)
        assert read(cache) == expected
        (line,) = capsys.readouterr().out.splitlines()[:1]
        assert line.startswith(f"megatron_qad: index cache: {file}: ") and line.endswith(" It is built again.")
        if damage is replace_by_directory:  # cannot be replaced by a file
            file.rmdir()
            assert read(cache) == expected
            capsys.readouterr()
    records = sorted(cache.glob("*-sums.json"))
    assert len(records) == 3
    for record in records:
        zero(record)
        assert read(cache) == expected
        assert f"index cache: {record}: is damaged" in capsys.readouterr().out
    assert read(cache) == expected and capsys.readouterr().out == ""


def test_exchanged_files_are_built_again(read, tmp_path, capsys):
    cache = tmp_path / "cache"
    expected = read(cache)
    one, other = sorted(cache.glob("*shuffle_index.npy"))
    one.rename(cache / "aside")
    other.rename(one)
    (cache / "aside").rename(other)
    assert read(cache) == expected and capsys.readouterr().out.count("It is built again") == 2


def test_cache_that_cannot_be_written_is_reported_once(read, tmp_path, capsys):
    expected = read(tmp_path / "cache")
    (tmp_path / "file").touch()
    assert read(tmp_path / "file") == expected
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"megatron_qad: index cache {tmp_path}/file: cannot be written (")
    assert line.endswith("Every rank keeps the indices in memory. Give a writable --data-cache-path to store them.")


def test_full_disk_leaves_the_indices_in_memory(read, tmp_path, capsys):
    expected, limits = read(tmp_path / "cache"), resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))  # the system refuses writes beyond 200 bytes
        assert read(tmp_path / "full") == expected
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert capsys.readouterr().out.count("cannot be written (") == 1
    assert not list((tmp_path / "full").iterdir())
    assert read(tmp_path / "full") == expected


def test_without_a_path_the_cache_is_next_to_the_data(read, tmp_path, blend):
    expected = read(None)
    assert len(list(Path(blend[0][0]).glob("cache/QADDataset_indices/*.npy"))) == 3
    assert read(None) == expected


def test_data_of_another_tool_that_is_replaced_is_cut_anew(read, tmp_path):
    """Such data has no sums, and Megatron's cache is named after the prefix alone."""
    prefix = write_indexed(f"{tmp_path}/foreign", documents(30, 0), np.uint16)
    read(tmp_path / "cache", ([prefix], None))
    write_indexed(prefix, documents(12, 5), np.uint16)
    assert read(tmp_path / "cache", ([prefix], None)) == read(tmp_path / "other", ([prefix], None))


@pytest.mark.parametrize("flag", ["fast_cache_load", "defer_npy_index_mmap"])
def test_flags_that_only_read_the_cache(read, tmp_path, flag):
    with pytest.raises(QADError, match="sums.json: cannot be read .* Start once without them"):
        read(tmp_path / "cache", **{flag: True})
    expected = read(tmp_path / "cache")
    assert read(tmp_path / "cache", **{flag: True}) == expected
    file = sorted((tmp_path / "cache").glob("*sample_index.npy"))[0]
    change(file)
    with pytest.raises(QADError, match=f"{file}: is damaged .*--dataloader-fast-cache-load and"):
        read(tmp_path / "cache", **{flag: True})


def test_processes_that_store_at_the_same_time(tmp_path):
    arrays = (np.arange(20_000), np.arange(5))
    caches = [IndexCache(tmp_path / "cache" / "x", ("large", "small"), "text", set()) for _ in range(8)]
    failed, loaded = [], []

    def store(cache: IndexCache) -> None:
        try:
            for _ in range(4):
                cache._store(arrays)
        except OSError as error:
            failed.append(error)

    threads = [threading.Thread(target=store, args=(cache,)) for cache in caches]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        loaded.append(caches[0].load_or_build(lambda: arrays, writes=False))
    assert not failed and loaded
    for large, small in (*loaded, caches[0].load()):
        assert np.array_equal(large, arrays[0]) and np.array_equal(small, arrays[1])
    assert len(list((tmp_path / "cache").iterdir())) == 4


def test_failed_replacement_keeps_the_old_file(tmp_path):
    (tmp_path / "file").write_text("old")

    def fail(stream):
        stream.write(b"new")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        replace_file(tmp_path / "file", fail)
    assert [file.name for file in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "old"


def test_blend_that_needs_more_samples_than_were_built_is_an_error(read, tmp_path):
    blend = [write_prepared(f"{tmp_path}/{name}", [np.arange(1, 18)] * 3) for name in "ab"], [0.5, 0.5]
    with pytest.raises(
        QADError, match=r"the train blend of 2 datasets needs more .*--mid-level-dataset-surplus \(now -0.9"
    ):
        read(tmp_path / "cache", blend, mid_level_dataset_surplus=-0.9)
