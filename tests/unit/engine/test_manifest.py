"""The manifest of a checkpoint directory detects and names every kind of damage, and Megatron can read it."""

import json

import pytest

from megatron_qad.engine import QADError
from megatron_qad.engine.run_directory import manifest

FILES = {"__0_0.distcp": b"weights" * 1000, "__1_0.distcp": b"", ".metadata": b"names", "metadata.json": b"{}"}


@pytest.fixture
def checkpoint(tmp_path):
    directory = tmp_path / "iter_0000010"
    directory.mkdir()
    for name, content in FILES.items():
        (directory / name).write_bytes(content)
    manifest.write_sums(directory, {name: manifest.sum_of(directory / name) for name in FILES})
    return directory


def test_valid_checkpoint_has_no_problems(checkpoint):
    assert manifest.find_problems(checkpoint) == []
    manifest.verify_checkpoint(checkpoint)
    assert manifest.num_bytes(checkpoint) == sum(file.stat().st_size for file in checkpoint.iterdir())


def test_manifest_of_megatron_is_read(checkpoint):
    from megatron.core.dist_checkpointing.validation import save_integrity_manifest

    save_integrity_manifest(str(checkpoint))
    assert manifest.find_problems(checkpoint) == []
    (checkpoint / ".metadata").write_bytes(b"NAMES")
    assert manifest.find_problems(checkpoint) == [
        "iter_0000010/.metadata has a different SHA-256 from when it was written"
    ]


def test_megatron_reads_our_manifest(checkpoint):
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from megatron.core.dist_checkpointing.validation import verify_integrity_manifest

    verify_integrity_manifest(str(checkpoint))
    (checkpoint / "__0_0.distcp").write_bytes(b"x" * 7000)
    with pytest.raises(CheckpointingException, match="hash mismatch"):
        verify_integrity_manifest(str(checkpoint))


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_ranks_together_check_every_file(checkpoint, size):
    for name in FILES:
        if not FILES[name]:
            continue
        content = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(content[:-1] + b"?")
        problems = [problem for rank in range(size) for problem in manifest.find_problems(checkpoint, rank, size)]
        assert problems == [f"iter_0000010/{name} has a different SHA-256 from when it was written"]
        (checkpoint / name).write_bytes(content)


def test_each_kind_of_damage_is_named(checkpoint):
    (checkpoint / "__1_0.distcp").write_bytes(b"more")
    with pytest.raises(QADError, match=r"damaged: iter_0000010/__1_0\.distcp has 4 bytes, not 0.*Use another"):
        manifest.verify_checkpoint(checkpoint)
    (checkpoint / "__1_0.distcp").unlink()
    assert manifest.find_problems(checkpoint) == ["iter_0000010/__1_0.distcp is missing"]
    (checkpoint / "integrity.json").write_text(json.dumps([]))
    assert manifest.find_problems(checkpoint) == ["iter_0000010/integrity.json is not readable"]
    (checkpoint / "integrity.json").unlink()
    assert manifest.find_problems(checkpoint) == ["iter_0000010 has no integrity.json, so damage cannot be detected"]
    (checkpoint / "metadata.json").unlink()
    assert manifest.find_problems(checkpoint) == ["iter_0000010 has no metadata.json: the save never finished"]


def test_file_is_replaced_atomically(tmp_path):
    file = tmp_path / "latest"
    manifest.write_atomically(file, "1")
    manifest.write_atomically(file, "2")
    assert file.read_text() == "2" and list(tmp_path.iterdir()) == [file]


def test_file_outside_of_the_checkpoint_is_a_problem(checkpoint, tmp_path):
    outside = tmp_path / "other.distcp"
    (checkpoint / "__0_0.distcp").rename(outside)
    (checkpoint / "__0_0.distcp").symlink_to(outside)  # the same bytes
    problem = "is outside of the directory, or a link that leads out of it"
    assert manifest.find_problems(checkpoint) == [f"iter_0000010/__0_0.distcp {problem}"]
    (checkpoint / "__0_0.distcp").unlink()
    for name in ("../other.distcp", str(outside)):
        sums = {key: manifest.sum_of(checkpoint / key) for key in (*FILES, name) if key != "__0_0.distcp"}
        manifest.write_sums(checkpoint, sums)
        assert manifest.find_problems(checkpoint) == [f"iter_0000010/{name} {problem}"]


def test_directory_may_be_a_link_and_files_may_be_links_in_it(checkpoint, tmp_path):
    (checkpoint / "__0_0.distcp").rename(checkpoint / "shared")
    (checkpoint / "__0_0.distcp").symlink_to("shared")
    manifest.write_sums(checkpoint, {name: manifest.sum_of(checkpoint / name) for name in (*FILES, "shared")})
    link = tmp_path / "run" / "iter_0000010"
    link.parent.mkdir()
    link.symlink_to(checkpoint)
    assert manifest.find_problems(link) == [] == manifest.find_problems(checkpoint)
