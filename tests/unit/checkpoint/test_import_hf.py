"""Damaged or foreign Hugging Face directories: one clear error each, and nothing written."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megatron_qad.engine import QADError, init_runtime

init_runtime()  # before megatron

ROOT = Path(__file__).parents[3]
sys.path.append(str(ROOT / "tests" / "dist"))  # launch, tiny_models

import tiny_hybrids  # noqa: E402
import tiny_job  # noqa: E402
import tiny_models  # noqa: E402

from megatron_qad.checkpoint.export_hf import export_hf  # noqa: E402
from megatron_qad.checkpoint.hf_reader import HFReader  # noqa: E402
from megatron_qad.checkpoint.import_hf import _read, copy_assets, import_hf  # noqa: E402
from megatron_qad.engine.distributed import init_process_group  # noqa: E402
from megatron_qad.engine.run_directory import json_records, manifest  # noqa: E402
from megatron_qad.models.families import family_of  # noqa: E402

WEIGHTS = "model.safetensors"
NORM = "model.layers.0.input_layernorm.weight"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("hf") / "whole"
    tiny_models.make("llama", directory, torch.bfloat16)
    return directory


@pytest.fixture
def damaged(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "damaged"))


@pytest.fixture
def refuses(tmp_path):
    """``refuses(directory, pattern)``: the import stops with that message and leaves no target behind."""
    init_process_group()

    def check(directory, pattern):
        with pytest.raises(QADError, match=pattern):
            import_hf(directory, tmp_path / "target")
        assert not (tmp_path / "target").exists()

    yield check
    torch.distributed.destroy_process_group()


def change_weights(directory: Path, change) -> None:
    weights = load_file(directory / WEIGHTS)
    change(weights)
    save_file(weights, directory / WEIGHTS)


def change_config(directory: Path, **changes) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **changes}))


def test_a_model_that_can_only_be_inspected(damaged, refuses):
    blocks = [{"attention": {"replace_with_linear": True}, "ffn": {"ffn_mult": 1.0}}]
    change_config(damaged, architectures=["DeciLMForCausalLM"], num_hidden_layers=1, block_configs=blocks)
    refuses(damaged, r"block_configs\[0\] has 'replace_with_linear'. Such blocks can be inspected.*not imported")


def test_no_directory_or_config(damaged, refuses, tmp_path):
    refuses(tmp_path / "nowhere", "nowhere: no config.json")
    (damaged / "config.json").write_text("{")
    refuses(damaged, "config.json: not valid JSON")


def test_no_safetensors(damaged, refuses):
    (damaged / WEIGHTS).rename(damaged / "pytorch_model.bin")
    refuses(damaged, "no .safetensors file")


def test_index_that_names_a_missing_file(damaged, refuses):
    index = {"weight_map": {NORM: "model-00002-of-00002.safetensors"}}
    (damaged / "model.safetensors.index.json").write_text(json.dumps(index))
    refuses(damaged, f"{NORM} is said to be in model-00002-of-00002.safetensors, which is missing")


@pytest.mark.parametrize("keep", [4, 200, -1])
def test_truncated_safetensors(damaged, refuses, keep):
    """Cut in the length of the header, in the header, and one byte short of the end."""
    data = (damaged / WEIGHTS).read_bytes()
    (damaged / WEIGHTS).write_bytes(data[:keep])
    refuses(damaged, "model.safetensors: not a whole safetensors file")


def test_missing_tensor(damaged, refuses):
    change_weights(damaged, lambda weights: weights.pop(NORM))
    refuses(damaged, f"1 tensors are missing, first '{NORM}'")


def test_left_over_tensor(damaged, refuses):
    change_weights(damaged, lambda weights: weights.update({"model.layers.9.extra.weight": torch.ones(2)}))
    refuses(damaged, "1 tensors have no place in the model, first 'model.layers.9.extra.weight'")


def test_wrong_shape(damaged, refuses):
    change_weights(damaged, lambda weights: weights.update({Q_PROJ: weights[Q_PROJ][:-1].contiguous()}))
    refuses(damaged, rf"{Q_PROJ} has shape \[95, 144\], config.json implies \[96, 144\]")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(damaged, refuses, bad):
    change_weights(damaged, lambda weights: weights[Q_PROJ].view(-1)[-1:].fill_(bad))
    refuses(damaged, f"{Q_PROJ} holds NaN or Inf")


def test_unsupported_family_and_rope(damaged, refuses):
    change_config(damaged, architectures=["MambaForCausalLM"])
    refuses(damaged, "'MambaForCausalLM' is not supported. Supported: DeciLMForCausalLM, LlamaForCausalLM, NemotronH")
    change_config(damaged, architectures=["LlamaForCausalLM"], rope_parameters={"rope_type": "yarn", "rope_theta": 1e4})
    refuses(damaged, "rope type 'yarn' is not supported. Expected default or llama3")


def test_target_that_is_not_empty(whole, tmp_path):
    init_process_group()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for target in ("full", "file"):
        with pytest.raises(QADError, match=f"{target}: exists and is not empty"):
            import_hf(whole, tmp_path / target)
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["mine.txt"]
    torch.distributed.destroy_process_group()


def test_a_target_that_is_a_link_or_a_mount_point(whole, tmp_path):
    init_process_group()
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    import_hf(whole, tmp_path / "link")
    with pytest.raises(QADError, match="/proc: is a mount point, .* Give a directory inside it"):
        import_hf(whole, "/proc")
    torch.distributed.destroy_process_group()
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there" / "latest_checkpointed_iteration.txt").read_text() == "release"


@pytest.fixture
def tool(monkeypatch, capsys):
    """``tool("import_hf", *flags)``: what it printed; run here, and not as a process of its own, for the time."""

    def run(name, *flags):
        monkeypatch.setattr(sys, "argv", [name, *map(str, flags)])
        try:
            runpy.run_path(str(ROOT / "tools" / f"{name}.py"))["main"]()
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
        return capsys.readouterr().out

    return run


def test_an_import_is_kept_only_for_the_same_model(damaged, tmp_path, tool):
    target = tmp_path / "target"
    flags = ("--hf-model", damaged, "--output", target, "--reuse-existing")
    assert "wrote" in tool("import_hf", *flags)
    assert tool("import_hf", *flags) == f"{target} is there already\n"
    moved = damaged.rename(tmp_path / "moved")  # what counts is the content
    flags = ("--hf-model", moved, *flags[2:])
    assert "is there already" in tool("import_hf", *flags)
    with pytest.raises(
        QADError, match="was made of .*dtype bfloat16, .* asked for now is .*dtype float32, .* Remove it"
    ):
        tool("import_hf", *flags, "--dtype", "float32")
    config = (target / "hf" / "config.json").read_text()
    (target / "hf" / "config.json").write_text(config.replace("10000", "10001"))
    with pytest.raises(QADError, match="target is damaged: hf/config.json has another SHA-256"):
        tool("import_hf", *flags)
    (target / "hf" / "config.json").write_text(config)
    change_weights(moved, lambda weights: weights[Q_PROJ].view(-1)[:8].neg_())
    with pytest.raises(QADError, match=r"was made of model damaged, .*asked for now is model moved, .* Remove it"):
        tool("import_hf", *flags)
    (target / "qad_import.json").unlink()
    with pytest.raises(QADError, match=r"target has no qad_import.json that says what it was made of"):
        tool("import_hf", *flags)


def test_an_export_is_kept_only_for_the_same_weights(damaged, tmp_path, tool):
    """A run that trains on has another newest iteration; what was exported of it before is old."""
    run, output = tmp_path / "run", tmp_path / "out"

    def train(iteration):
        change_weights(damaged, lambda weights: weights[Q_PROJ].view(-1)[:8].neg_())
        tool("import_hf", "--hf-model", damaged, "--output", tmp_path / "step")
        shutil.copytree(tmp_path / "step" / "hf", run / "hf", dirs_exist_ok=True)
        (tmp_path / "step" / "release").rename(run / f"iter_{iteration:07d}")
        (run / "latest_checkpointed_iteration.txt").write_text(str(iteration))
        shutil.rmtree(tmp_path / "step")

    train(2)
    flags = ("--checkpoint", run, "--output", output, "--layout", "bf16", "--reuse-existing")
    assert "wrote" in tool("export_hf", *flags)
    assert tool("export_hf", *flags) == f"{output} is there already\n"
    transformers.AutoModelForCausalLM.from_pretrained(output)  # does not mind the record
    weights = (output / "model.safetensors").read_bytes()
    (output / "model.safetensors").write_bytes(weights[:-1] + b"\0")
    with pytest.raises(QADError, match="damaged: model.safetensors is not as it was written. Remove it, and it is"):
        tool("export_hf", *flags)
    (output / "model.safetensors").write_bytes(weights)
    train(4)
    with pytest.raises(QADError, match="was made of .*iter_0000002, .* asked for now is .*iter_0000004, .* Remove it"):
        tool("export_hf", *flags)
    assert "is there already" in tool("export_hf", *flags, "--iteration", "2")
    shutil.rmtree(run / "iter_0000002")
    train(2)  # begun anew: the same number, other weights
    with pytest.raises(QADError, match="was made of .*iter_0000002, .* asked for now is .*iter_0000002, .* Remove it"):
        tool("export_hf", *flags, "--iteration", "2")
    config = json.loads((run / "hf" / "config.json").read_text())
    formats = {linear.megatron: "nvfp4" for linear in family_of(config).linears(config)}
    json_records.write(run / "qad.json", {"formats": formats})
    with pytest.raises(QADError, match="layout bf16, .* asked for now is .*layout modelopt"):
        tool("export_hf", *flags, "--layout", "modelopt", "--iteration", "2")
    with pytest.raises(QADError, match="says 2, and iter_0000004 is newer. Name the iteration"):
        tool("export_hf", *flags)


def test_an_import_that_is_interrupted_leaves_no_target(whole, tmp_path, monkeypatch):
    """Interrupted once its weights are written; the next import does not mind what that one left aside."""
    from megatron_qad.checkpoint import import_hf as module

    def interrupt(*_):
        raise KeyboardInterrupt

    init_process_group()
    with monkeypatch.context() as patch:
        patch.setattr(module, "copy_assets", interrupt)
        with pytest.raises(KeyboardInterrupt):
            import_hf(whole, tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == [".target.partial"]
    import_hf(whole, tmp_path / "target")
    torch.distributed.destroy_process_group()
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    assert (tmp_path / "target" / "latest_checkpointed_iteration.txt").read_text() == "release"


@pytest.mark.parametrize(
    ("limit", "said"),
    [(40, "File too large"), (17 << 10, "a rank could not write its files")],
    ids=["start", "weights"],
)
def test_a_full_disk_is_said_and_leaves_nothing(limit, said, tmp_path, server):
    """The disk's place is taken by a limit on the size of a file, in KiB; a save begins with a file of 16 MiB."""
    tiny_job.write_hf(tmp_path / "hf", tiny_job.LLAMA | {"vocab_size": 160_000})
    argv = ["--hf-model", f"{tmp_path}/hf", "--output", f"{tmp_path}/o"]
    arguments = {"path": "tools/import_hf.py", "argv": argv, "file_kib": limit}
    output = server.run("script_jobs:script", 1, arguments, fails=True)
    assert "Traceback" not in output, output
    error = output.splitlines()[-1]
    assert error.startswith(f"error: {tmp_path}/o: not written: ") and said in error, error
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("case", ["nemotron-h", "qwen3-moe"])
def test_what_transformers_saves_is_read_as_the_hubs(case, tmp_path):
    """A model that somebody trained further: transformers 5 renames a tensor of the first and a key of the second."""
    tiny_job.write_hf(tmp_path / "hub", tiny_hybrids.CASES[case])
    tiny_hybrids.by_transformers(tmp_path / "hub").save_pretrained(tmp_path / "saved")
    hub, saved = (_read(tmp_path / name, torch.float32, 0, 1)[0] for name in ("hub", "saved"))
    assert hub.keys() == saved.keys() and len(hub) > 50
    assert all(torch.equal(hub[name].data, saved[name].data) for name in hub)


def test_assets_are_files_and_folders_but_no_weights(whole, tmp_path):
    source = Path(shutil.copytree(whole, tmp_path / "source"))
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "rag.jinja").write_text("x")
    copy_assets(source, tmp_path / "hf")
    copied = {str(p.relative_to(tmp_path / "hf")) for p in (tmp_path / "hf").rglob("*") if p.is_file()}
    given = {str(p.relative_to(source)) for p in source.rglob("*") if p.is_file()}
    assert copied == given - {WEIGHTS}


def test_reader_names_a_tensor_that_is_not_there(whole):
    with pytest.raises(QADError, match="no tensor 'lm_head.bias'"):
        HFReader(whole).read("lm_head.bias")


def test_export_needs_a_checkpoint_that_describes_itself(whole, tmp_path):
    with pytest.raises(QADError, match="no hf/config.json. Expected a checkpoint directory written by import_hf.py"):
        export_hf(whole, tmp_path / "out", "bf16")
    copy_assets(whole, tmp_path / "checkpoint" / "hf")
    manifest.seal(tmp_path / "checkpoint" / "hf")
    with pytest.raises(QADError, match="no qad.json; only what pretrain_qad.py saved"):
        export_hf(tmp_path / "checkpoint", tmp_path / "out", "modelopt")
    with pytest.raises(QADError, match="no latest_checkpointed_iteration.txt"):
        export_hf(tmp_path / "checkpoint", tmp_path / "out", "bf16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tool", ["import_hf", "export_hf"])
def test_the_tools_print_one_line_and_fail(whole, tmp_path, tool, server):
    copy_assets(whole, tmp_path / "checkpoint" / "hf")
    manifest.seal(tmp_path / "checkpoint" / "hf")
    flags = {
        "import_hf": ["--hf-model", str(tmp_path / "checkpoint" / "hf"), "--output", str(tmp_path / "out")],
        "export_hf": ["--checkpoint", str(tmp_path / "checkpoint"), "--output", str(tmp_path / "out")],
    }
    expected = {"import_hf": "no .safetensors file", "export_hf": "no qad.json"}
    arguments = {"path": f"tools/{tool}.py", "argv": flags[tool], "directory": str(tmp_path)}
    output = server.run("script_jobs:script", 1, arguments, fails=True)
    (line,) = [line for line in output.splitlines() if "error" in line.lower() or "Traceback" in line]
    assert line.startswith("error: ") and expected[tool] in line
    assert not (tmp_path / "out").exists()
