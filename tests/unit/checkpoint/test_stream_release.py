"""Streamed imports: equal to Megatron's own save, continued after a kill, safe from what others leave in the way."""

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

from megatron_qad.engine import QADError, init_runtime

init_runtime()  # before megatron

sys.path.append(str(Path(__file__).parents[2] / "dist"))  # tiny_hybrids

import tiny_hybrids  # noqa: E402
import tiny_job  # noqa: E402
from megatron.core import dist_checkpointing  # noqa: E402
from megatron.core.dist_checkpointing import ShardedTensor  # noqa: E402

from megatron_qad.checkpoint.import_hf import ModelImport, import_hf  # noqa: E402
from megatron_qad.checkpoint.release import write_release  # noqa: E402
from megatron_qad.engine.distributed import init_process_group  # noqa: E402
from megatron_qad.engine.run_directory import manifest  # noqa: E402

PART_BYTES = 60_000
"""Small enough for several parts of the tiny models."""


@pytest.fixture(autouse=True)
def process_group():
    init_process_group()
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A hybrid with Mamba, attention and experts: every way in which Megatron splits a tensor."""
    directory = tmp_path_factory.mktemp("hf") / "hybrid"
    tiny_job.write_hf(directory, tiny_hybrids.CASES["nemotron-h"])
    return directory


@pytest.fixture(scope="module")
def undisturbed(model, tmp_path_factory):
    init_process_group()
    target = tmp_path_factory.mktemp("import") / "target"
    import_hf(model, target, part_bytes=PART_BYTES, num_workers=1)
    return target


def contents(directory: Path) -> dict[str, bytes]:
    return {str(f.relative_to(directory)): f.read_bytes() for f in directory.rglob("*") if f.is_file()}


def leave_partial(undisturbed: Path, output: Path) -> Path:
    """Create what an import leaves that was killed after its last part."""
    return Path(shutil.copytree(undisturbed.parent / "kept", output.parent / f".{output.name}.partial"))


@pytest.fixture(scope="module", autouse=True)
def kept(model, undisturbed):
    """The partial directory of an import that was interrupted after its last part."""

    def interrupt(*_):
        raise KeyboardInterrupt

    init_process_group()
    target = undisturbed.parent / "interrupted"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("megatron_qad.checkpoint.import_hf.copy_assets", interrupt)
        import_hf(model, target, part_bytes=PART_BYTES, num_workers=1)
    (undisturbed.parent / ".interrupted.partial").rename(undisturbed.parent / "kept")


def test_values_and_metadata_equal_those_of_megatrons_own_save(model, undisturbed, tmp_path):
    plan = ModelImport.of(model, torch.bfloat16)
    tensors = dict(pair for tensor_map in plan.maps for pair in plan.convert(tensor_map))
    sharded = {name: ShardedTensor.from_rank_offsets(name, tensor.clone()) for name, tensor in tensors.items()}
    write_release(tmp_path / "saved", sharded, lambda aside: (aside / "hf").mkdir())
    ours, megatrons = (str(directory / "release") for directory in (undisturbed, tmp_path / "saved"))
    assert len(list((undisturbed / "release").glob("*.distcp"))) > 4
    described = [dist_checkpointing.load_tensors_metadata(directory) for directory in (ours, megatrons)]
    assert described[0].keys() == described[1].keys() == tensors.keys() and len(tensors) > 40
    for name in tensors:
        assert described[0][name].global_shape == described[1][name].global_shape == tuple(tensors[name].shape)
        assert described[0][name].dtype == described[1][name].dtype == tensors[name].dtype
    loaded = [dist_checkpointing.load_plain_tensors(directory) for directory in (ours, megatrons)]
    for name, tensor in tensors.items():
        assert torch.equal(loaded[0][name], tensor) and torch.equal(loaded[1][name], tensor), name
    assert dist_checkpointing.load_common_state_dict(ours) == dist_checkpointing.load_common_state_dict(megatrons)
    assert Path(ours, "metadata.json").read_bytes() == Path(megatrons, "metadata.json").read_bytes()


def test_manifest_is_that_of_the_files(undisturbed):
    release = undisturbed / "release"
    assert not manifest.find_problems(release)
    file = next(file for file in release.glob("__*_0.distcp") if file.stat().st_size > 1000)
    assert manifest.read(release)[file.name] == manifest.sum_of(file)


def test_worker_processes_write_the_same_bytes(model, undisturbed, tmp_path):
    import_hf(model, tmp_path / "target", part_bytes=PART_BYTES, num_workers=3)
    assert contents(tmp_path / "target") == contents(undisturbed)
    assert (tmp_path / "target").stat().st_mode == undisturbed.stat().st_mode


def test_finished_parts_are_kept_and_others_written_again(model, undisturbed, tmp_path):
    partial = leave_partial(undisturbed, tmp_path / "target")
    release = partial / "output" / "release"
    (partial / "progress" / "part_00001.json").unlink()
    (release / "__1_0.distcp").write_bytes(b"half a tensor")  # the process was killed while it wrote
    (release / "__2_0.distcp").write_bytes(b"\0" * (release / "__2_0.distcp").stat().st_size)
    (release / ".metadata").write_bytes(b"an index that was not finished")
    for file in release.iterdir():
        os.utime(file, (1, 1))
    import_hf(model, tmp_path / "target", part_bytes=PART_BYTES)
    assert contents(tmp_path / "target") == contents(undisturbed)
    kept = {file.name for file in (tmp_path / "target" / "release").iterdir() if file.stat().st_mtime == 1}
    parts = {file.name for file in (tmp_path / "target" / "release").glob("__[0-9]*.distcp")}
    assert kept == parts - {"__1_0.distcp", "__2_0.distcp"} and len(kept) > 2
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


@pytest.mark.parametrize("change", ["dtype", "part size", "admits others", "damaged record"])
def test_partial_directory_of_another_import_is_not_used(change, model, undisturbed, tmp_path):
    """It has a directory in the place of a file, so the import would fail if it used it."""
    partial = leave_partial(undisturbed, tmp_path / "target")
    (partial / "output" / "release" / ".metadata").unlink(missing_ok=True)
    (partial / "output" / "release" / ".metadata").mkdir()
    if change == "admits others":
        partial.chmod(0o755)
    if change == "damaged record":
        (partial / "progress" / "job.json").write_text("{}")
    dtype = torch.float32 if change == "dtype" else torch.bfloat16
    import_hf(model, tmp_path / "target", dtype, part_bytes=PART_BYTES * (2 if change == "part size" else 1))
    assert not manifest.find_problems(tmp_path / "target" / "release")


def test_planted_links_lead_nowhere(model, undisturbed, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    (tmp_path / ".target.partial").symlink_to(outside)
    import_hf(model, tmp_path / "target", part_bytes=PART_BYTES)
    assert contents(outside) == {"precious": b"x"} and contents(tmp_path / "target") == contents(undisturbed)
    assert not (tmp_path / "target").is_symlink()


def test_error_in_a_worker_process_is_that_of_one_process(model, tmp_path):
    from safetensors.torch import load_file, save_file

    damaged = Path(shutil.copytree(model, tmp_path / "damaged"))
    weights = load_file(damaged / "model.safetensors")
    name = next(name for name in sorted(weights) if name.endswith("up_proj.weight"))
    weights[name].view(-1)[:3] = float("nan")
    save_file(weights, damaged / "model.safetensors")
    with pytest.raises(QADError, match=f"{name} has NaN or Inf values .3 of"):
        import_hf(damaged, tmp_path / "target", part_bytes=PART_BYTES, num_workers=2)
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]
