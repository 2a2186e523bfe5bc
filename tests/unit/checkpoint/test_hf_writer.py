"""HF checkpoint writer: shards, index, copied files, and no output after a failure."""

import json
import resource
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_qad.checkpoint.hf_writer import write_hf_checkpoint
from megatron_qad.checkpoint.layouts import HFTensor, stored_tensors
from megatron_qad.engine.errors import QADError

sys.path.insert(0, str(Path(__file__).parent))
from exported import CONFIG, items, linears  # noqa: E402  (a helper module in this directory)


def write(directory, layout="modelopt", stream=None, **kwargs):
    stream = items() if stream is None else stream
    return write_hf_checkpoint(stream, directory, config=CONFIG, layout=layout, linear_modules=linears(), **kwargs)


def contents(directory):
    return {k: v for path in Path(directory).glob("*.safetensors") for k, v in load_file(path).items()}


@pytest.mark.parametrize("layout", ["bf16", "modelopt", "compressed-tensors"])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 3000, 1])
def test_stored_tensors_are_read_back(tmp_path, layout, max_shard_bytes):
    written = write(tmp_path / "out", layout, max_shard_bytes=max_shard_bytes)
    expected = {k: v for item in items() for k, v in stored_tensors(item, layout).items()}
    actual = contents(tmp_path / "out")
    assert actual.keys() == expected.keys() and len(expected) == written.num_tensors
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype and actual[name].shape == tensor.shape
        assert torch.equal(
            actual[name].contiguous().view(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)
        ), name
    assert written.num_bytes == sum(t.nbytes for t in expected.values())
    config = json.loads((tmp_path / "out/config.json").read_text())
    if layout == "bf16":
        assert config == CONFIG and written.excluded == ()
    else:
        assert config["quantization_config"]["ignore"] == ["lm_head"] == list(written.excluded)
        assert len(written.quantized) == 14
    assert (tmp_path / "out/hf_quant_config.json").exists() == (layout == "modelopt")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_shards_have_bounded_size_names_and_index(tmp_path):
    written = write(tmp_path / "out", max_shard_bytes=3000)
    total = len(written.shards)
    assert total > 2 and written.shards[-1] == f"model-{total:05d}-of-{total:05d}.safetensors"
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == written.num_bytes
    for shard in written.shards:
        tensors = load_file(tmp_path / "out" / shard)
        assert sum(t.nbytes for t in tensors.values()) <= 3000 or len(tensors) == 1
        assert all(index["weight_map"][name] == shard for name in tensors)
    one = write(tmp_path / "one")
    assert one.shards == ("model.safetensors",) and not (tmp_path / "one/model.safetensors.index.json").exists()


def test_tokenizer_and_generation_files_are_copied_but_not_weights(tmp_path):
    source = tmp_path / "source"
    (source / "additional_chat_templates").mkdir(parents=True)
    (source / "additional_chat_templates/tool.jinja").write_text("t")
    for name in ("tokenizer.json", "tokenizer.model", "generation_config.json", "chat_template.jinja", "merges.txt"):
        (source / name).write_text('{"model": {}}' if name.endswith(".json") else name)
    for name in ("model.safetensors", "config.json", "training_args.bin"):
        (source / name).write_text("old")
    write(tmp_path / "out", source=source)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        *("tokenizer.json", "tokenizer.model", "generation_config.json", "chat_template.jinja", "merges.txt"),
        *("additional_chat_templates", "model.safetensors", "config.json", "hf_quant_config.json"),
    }
    assert json.loads((tmp_path / "out/config.json").read_text())["hidden_size"] == 32
    assert (tmp_path / "out/tokenizer.model").read_text() == "tokenizer.model"


@pytest.mark.parametrize("layout", ["bf16", "modelopt", "compressed-tensors"])
@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight", "model.layers.1.mlp.up_proj.weight"])
@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_non_finite_tensors_are_refused_in_every_layout(tmp_path, layout, name, bad):
    stream = list(items())
    (item,) = [item for item in stream if item.name == name]
    item.tensor.view(-1)[-1] = bad
    with pytest.raises(QADError, match=rf"{name} has NaN or Inf values \(1 of {item.tensor.numel()}\)"):
        write(tmp_path / "out", layout, stream)
    assert list(tmp_path.iterdir()) == []


def test_links_that_lead_out_of_the_source_are_not_copied(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "secret").write_text("private")
    (tmp_path / "source" / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(QADError, match="tokenizer.json: leads to .*secret, which is outside the model directory"):
        write(tmp_path / "out", source=tmp_path / "source")
    assert not (tmp_path / "out").exists()


def test_views_of_one_storage_are_written_separately(tmp_path):
    fused = torch.arange(64, dtype=torch.bfloat16).view(8, 8)
    stream = [HFTensor("q", fused[:4]), HFTensor("k", fused[4:]), HFTensor("same", fused), HFTensor("again", fused)]
    write(tmp_path / "out", "bf16", [*stream, HFTensor("t", fused.t())])
    actual = contents(tmp_path / "out")
    assert (
        torch.equal(actual["k"], fused[4:])
        and torch.equal(actual["again"], fused)
        and torch.equal(actual["t"], fused.t())
    )


def test_non_empty_directory_is_an_error_and_empty_one_is_used(tmp_path):
    used = tmp_path / "used"
    used.mkdir()
    (used / "notes.txt").write_text("mine")
    with pytest.raises(QADError, match="not empty"):
        write(used)
    with pytest.raises(QADError, match="not empty"):
        write(used / "notes.txt")
    assert (used / "notes.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty")
    assert (tmp_path / "empty/config.json").exists()


def test_link_is_followed_and_mount_point_is_an_error(tmp_path):
    """The finished output is renamed, which would replace a link and cannot replace a mount point."""
    (tmp_path / "there").mkdir()
    for name, target in (("empty", tmp_path / "there"), ("dangling", tmp_path / "not" / "yet")):
        link = tmp_path / name
        link.symlink_to(target)
        assert write(link).directory == target.resolve()
        assert link.is_symlink() and (target / "config.json").is_file()
    with pytest.raises(QADError, match="/proc: is a mount point, .* Give a directory inside it"):
        write("/proc")


@pytest.mark.parametrize("target", ["elsewhere", "elsewhere/none"])
def test_planted_link_is_not_followed(tmp_path, target):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "notes.txt").write_text("mine")
    (tmp_path / ".out.partial").symlink_to(tmp_path / target)
    write(tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file() and not (tmp_path / "out").is_symlink()
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["notes.txt"]


def broken_stream():
    for i, item in enumerate(items()):
        if i == 12:
            raise ValueError("a rank was lost")
        yield item


@pytest.mark.parametrize(
    ("stream", "error", "text"),
    [
        (broken_stream, ValueError, "a rank was lost"),
        (lambda: [*items(), next(iter(items()))], QADError, r"model\.embed_tokens\.weight: given twice"),
        (lambda: [], QADError, "No tensor"),
        (lambda: [HFTensor("a", torch.ones(2))], QADError, "no tensor is quantized"),
    ],
)
def test_failure_leaves_no_files(tmp_path, stream, error, text):
    with pytest.raises(error, match=text):
        write(tmp_path / "out", stream=stream(), max_shard_bytes=2000)
    assert list(tmp_path.iterdir()) == []


def test_invalid_arguments_are_errors(tmp_path):
    with pytest.raises(QADError, match="already has a quantization_config"):
        write_hf_checkpoint(
            items(), tmp_path / "o", config={"quantization_config": {}}, layout="modelopt", linear_modules=linears()
        )
    with pytest.raises(QADError, match="awq"):
        write(tmp_path / "o", "awq")
    with pytest.raises(QADError, match="max_shard_bytes"):
        write(tmp_path / "o", max_shard_bytes=0)
    with pytest.raises(QADError, match="not a directory"):
        write(tmp_path / "o", source=tmp_path / "missing")
    assert list(tmp_path.iterdir()) == []


FULL_DISK = """
    import resource, sys
    sys.path[:0] = [{helpers!r}, {tests!r}, {root!r}]
    from test_hf_writer import write
    # No file may grow beyond this size: a write that really fails.
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, resource.RLIM_INFINITY))
    write({target!r})
"""


def test_full_disk_reports_the_needed_bytes_and_leaves_no_files(tmp_path):
    """A limit on file size makes the operating system refuse the write, as a quota or a full disk does."""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    here = Path(__file__).parent
    script = textwrap.dedent(FULL_DISK).format(
        helpers=str(here), tests=str(here.parents[1]), root=str(here.parents[2]), target=str(tmp_path / "out")
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    message = done.stderr.strip().splitlines()[-1]
    assert "QADError" in message and "the disk is full or a quota is reached" in message
    assert f"At least {sum(t.nbytes for i in items() for t in stored_tensors(i, 'modelopt').values())} bytes" in message
    assert list(tmp_path.iterdir()) == []
