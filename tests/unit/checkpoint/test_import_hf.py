"""Import and export: errors for damaged or unsupported models, reuse of outputs, and no output after a failure."""

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

from megatron.core.dist_checkpointing import ShardedTensor  # noqa: E402

ROOT = Path(__file__).parents[3]
sys.path.append(str(ROOT / "tests" / "dist"))  # launch, tiny_models

import tiny_hybrids  # noqa: E402
import tiny_job  # noqa: E402
import tiny_models  # noqa: E402

from megatron_qad.checkpoint import provenance  # noqa: E402
from megatron_qad.checkpoint.export_hf import export_hf  # noqa: E402
from megatron_qad.checkpoint.hf_reader import HFReader  # noqa: E402
from megatron_qad.checkpoint.import_hf import ModelImport, copy_assets, import_hf  # noqa: E402
from megatron_qad.checkpoint.release import write_release  # noqa: E402
from megatron_qad.engine.distributed import init_process_group  # noqa: E402
from megatron_qad.engine.run_directory import json_records, manifest  # noqa: E402
from megatron_qad.models.families import family_of  # noqa: E402

WEIGHTS = "model.safetensors"
NORM = "model.layers.0.input_layernorm.weight"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    directory = tmp_path_factory.mktemp("hf") / "complete"
    tiny_models.make("llama", directory, torch.bfloat16)
    return directory


@pytest.fixture
def damaged(complete, tmp_path):
    return Path(shutil.copytree(complete, tmp_path / "damaged"))


@pytest.fixture
def refuses(tmp_path):
    """``refuses(directory, pattern)``: check that the import fails with that message and leaves no target."""
    init_process_group()

    def check(directory, pattern):
        with pytest.raises(QADError, match=pattern):
            import_hf(directory, tmp_path / "target")
        assert not (tmp_path / "target").exists()

    yield check
    torch.distributed.destroy_process_group()


def converted(directory: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return what an import stores, by name."""
    model = ModelImport.of(directory, dtype)
    return {name: tensor.clone() for tensor_map in model.maps for name, tensor in model.convert(tensor_map)}


def change_weights(directory: Path, change) -> None:
    weights = load_file(directory / WEIGHTS)
    change(weights)
    save_file(weights, directory / WEIGHTS)


def change_config(directory: Path, **changes) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **changes}))


def test_model_with_unsupported_blocks_is_an_error(damaged, refuses):
    blocks = [{"attention": {"replace_with_linear": True}, "ffn": {"ffn_mult": 1.0}}]
    family = {"architectures": ["DeciLMForCausalLM"], "model_type": "nemotron-nas"}
    change_config(damaged, **family, num_hidden_layers=1, block_configs=blocks)
    refuses(damaged, r"block_configs\[0\] has 'replace_with_linear'. Such blocks can be inspected.*not imported")


def test_planted_link_is_not_followed(complete, tmp_path):
    init_process_group()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".target.partial").symlink_to(tmp_path / "elsewhere")
    import_hf(complete, tmp_path / "target")
    assert (tmp_path / "target" / "release" / ".metadata").is_file() and not (tmp_path / "target").is_symlink()
    assert not list((tmp_path / "elsewhere").iterdir())
    torch.distributed.destroy_process_group()


def test_missing_directory_and_invalid_config_are_errors(damaged, refuses, tmp_path):
    refuses(tmp_path / "nowhere", "nowhere: no config.json.*The path does not exist; names on the Hub are not downl")
    (damaged / "config.json").write_text("{")
    refuses(damaged, "config.json: not valid JSON")


def test_missing_safetensors_are_an_error(damaged, refuses):
    (damaged / WEIGHTS).rename(damaged / "pytorch_model.bin")
    refuses(damaged, "no .safetensors file")


def test_index_with_a_missing_file_is_an_error(damaged, refuses):
    index = {"weight_map": {NORM: "model-00002-of-00002.safetensors"}}
    (damaged / "model.safetensors.index.json").write_text(json.dumps(index))
    refuses(damaged, f"{NORM} is listed in model-00002-of-00002.safetensors, which is missing")


@pytest.mark.parametrize("keep", [4, 200, -1])
def test_truncated_safetensors_are_an_error(damaged, refuses, keep):
    """Truncated in the header length, in the header, and by one byte."""
    data = (damaged / WEIGHTS).read_bytes()
    (damaged / WEIGHTS).write_bytes(data[:keep])
    refuses(damaged, "model.safetensors: not a complete safetensors file")


def test_missing_tensor_is_an_error(damaged, refuses):
    change_weights(damaged, lambda weights: weights.pop(NORM))
    refuses(damaged, f"1 tensors are missing, first '{NORM}'")


def test_unexpected_tensor_is_an_error(damaged, refuses):
    change_weights(damaged, lambda weights: weights.update({"model.layers.9.extra.weight": torch.ones(2)}))
    refuses(damaged, "1 tensors are not part of the model, first 'model.layers.9.extra.weight'")


def test_wrong_shape_is_an_error(damaged, refuses):
    change_weights(damaged, lambda weights: weights.update({Q_PROJ: weights[Q_PROJ][:-1].contiguous()}))
    refuses(damaged, rf"{Q_PROJ} has shape \[95, 144\], but config.json implies \[96, 144\]")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_weights_are_an_error(damaged, refuses, bad):
    change_weights(damaged, lambda weights: weights[Q_PROJ].view(-1)[-1:].fill_(bad))
    refuses(damaged, f"{Q_PROJ} has NaN or Inf values")


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.int8, "I8"),
        (torch.uint8, "U8"),
        (torch.int64, "I64"),
        (torch.bool, "BOOL"),
        (torch.float64, "F64"),
        (torch.complex64, "C64"),
    ],
)
def test_dtypes_other_than_those_of_weights_are_errors(damaged, refuses, dtype, name):
    change_weights(damaged, lambda weights: weights.update({Q_PROJ: weights[Q_PROJ].to(dtype)}))
    refuses(damaged, f"{Q_PROJ} has dtype {name}, expected F32, BF16, F16")


def test_float8_weight_is_an_error(damaged, refuses):
    change_weights(damaged, lambda weights: weights.update({Q_PROJ: weights[Q_PROJ].to(torch.float8_e4m3fn)}))
    refuses(damaged, f"is quantized .F8_E4M3., for example {Q_PROJ}")


def test_values_that_overflow_in_bfloat16_are_an_error(damaged, refuses):
    """The largest bfloat16 is 3.39e38, the largest float32 3.40e38."""

    def put(value):
        def change(weights):
            weights[Q_PROJ] = weights[Q_PROJ].float()
            weights[Q_PROJ][0, 0] = value

        change_weights(damaged, change)

    put(-3.4e38)
    refuses(damaged, rf"{Q_PROJ} has values up to 3.4e\+38, which overflow to Inf in bfloat16 .* --dtype float32")
    assert len(converted(damaged, torch.float32)) > 10
    put(3.389e38)
    assert len(converted(damaged, torch.bfloat16)) > 10


def test_passthrough_tensors_may_be_integers_but_not_nan(tmp_path):
    tiny_job.write_hf(tmp_path / "hf", tiny_hybrids.CASES["attention"])
    index, scale = torch.tensor([3, 7]), torch.tensor([1.5], dtype=torch.float64)
    change_weights(tmp_path / "hf", lambda weights: weights.update({"mtp.index": index, "mtp.scale": scale}))
    ModelImport.of(tmp_path / "hf", torch.bfloat16).write_passthrough(tmp_path / "passthrough.safetensors")
    passthrough = load_file(tmp_path / "passthrough.safetensors")
    assert torch.equal(passthrough["mtp.index"], index) and passthrough["mtp.scale"].dtype == torch.float64
    change_weights(tmp_path / "hf", lambda weights: weights["mtp.scale"].fill_(float("inf")))
    with pytest.raises(QADError, match="mtp.scale has NaN or Inf values .1 of 1."):
        ModelImport.of(tmp_path / "hf", torch.bfloat16).write_passthrough(tmp_path / "other.safetensors")


def test_unsupported_family_and_rope_are_errors(damaged, refuses):
    change_config(damaged, architectures=["MambaForCausalLM"])
    refuses(damaged, "'MambaForCausalLM' .* is not supported. Supported: DeciLMForCausalLM, LlamaForCausalLM, ")
    change_config(damaged, architectures=["LlamaForCausalLM"], rope_parameters={"rope_type": "yarn", "rope_theta": 1e4})
    refuses(damaged, "rope type 'yarn' is not supported. Expected default or llama3")


def test_non_empty_target_is_an_error(complete, tmp_path):
    init_process_group()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for target in ("full", "file"):
        with pytest.raises(QADError, match=f"{target}: exists and is not empty"):
            import_hf(complete, tmp_path / target)
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["mine.txt"]
    torch.distributed.destroy_process_group()


def test_target_link_is_followed_and_mount_point_is_an_error(complete, tmp_path):
    init_process_group()
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    import_hf(complete, tmp_path / "link")
    with pytest.raises(QADError, match="/proc: is a mount point, .* Give a directory inside it"):
        import_hf(complete, "/proc")
    torch.distributed.destroy_process_group()
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there" / "latest_checkpointed_iteration.txt").read_text() == "release"


@pytest.fixture
def tool(monkeypatch, capsys):
    """``tool("import_hf", *flags)``: run the tool in this process, to save time, and return its output."""

    def run(name, *flags):
        monkeypatch.setattr(sys, "argv", [name, *map(str, flags)])
        try:
            runpy.run_path(str(ROOT / "tools" / f"{name}.py"))["main"]()
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
        return capsys.readouterr().out

    return run


def test_import_is_reused_only_for_the_same_model(damaged, tmp_path, tool):
    target = tmp_path / "target"
    flags = ("--hf-model", damaged, "--output", target, "--reuse-existing")
    assert "wrote" in tool("import_hf", *flags)
    assert tool("import_hf", *flags) == f"{target} already exists and is up to date\n"
    moved = damaged.rename(tmp_path / "moved")  # only the content is compared
    flags = ("--hf-model", moved, *flags[2:])
    assert "is up to date" in tool("import_hf", *flags)
    with pytest.raises(QADError, match="was made from .*dtype bfloat16, .* expected .*dtype float32, .* Remove it"):
        tool("import_hf", *flags, "--dtype", "float32")
    config = (target / "hf" / "config.json").read_text()
    (target / "hf" / "config.json").write_text(config.replace("10000", "10001"))
    with pytest.raises(QADError, match="target is damaged: hf/config.json has a different SHA-256"):
        tool("import_hf", *flags)
    (target / "hf" / "config.json").write_text(config)
    change_weights(moved, lambda weights: weights[Q_PROJ].view(-1)[:8].mul_(2))
    with pytest.raises(QADError, match=r"was made from model damaged, .*expected model moved, .* Remove it"):
        tool("import_hf", *flags)
    (target / "qad_import.json").unlink()
    with pytest.raises(QADError, match=r"target has no provenance record \(qad_import.json\)"):
        tool("import_hf", *flags)


def test_record_of_an_import_includes_weights_in_a_subdirectory(damaged):
    weights = load_file(damaged / WEIGHTS)
    before = provenance.model_provenance(damaged, "bfloat16")
    (damaged / "weights").mkdir()
    (damaged / WEIGHTS).rename(damaged / "weights" / WEIGHTS)
    index = {"weight_map": dict.fromkeys(weights, f"weights/{WEIGHTS}")}
    (damaged / "model.safetensors.index.json").write_text(json.dumps(index))
    first = provenance.model_provenance(damaged, "bfloat16")
    change_weights(damaged / "weights", lambda weights: weights[Q_PROJ].neg_())
    second = provenance.model_provenance(damaged, "bfloat16")
    assert len({record["sha256"] for record in (before, first, second)}) == 3


def test_export_is_reused_only_for_the_same_weights(damaged, tmp_path, tool):
    """After more training the newest iteration differs, so the earlier export must not be reused."""
    run, output = tmp_path / "run", tmp_path / "out"

    def train(iteration):
        change_weights(damaged, lambda weights: weights[Q_PROJ].view(-1)[:8].mul_(2))
        tool("import_hf", "--hf-model", damaged, "--output", tmp_path / "step")
        shutil.copytree(tmp_path / "step" / "hf", run / "hf", dirs_exist_ok=True)
        (tmp_path / "step" / "release").rename(run / f"iter_{iteration:07d}")
        (run / "latest_checkpointed_iteration.txt").write_text(str(iteration))
        shutil.rmtree(tmp_path / "step")

    train(2)
    flags = ("--checkpoint", run, "--output", output, "--layout", "bf16", "--reuse-existing")
    assert "wrote" in tool("export_hf", *flags)
    assert tool("export_hf", *flags) == f"{output} already exists and is up to date\n"
    transformers.AutoModelForCausalLM.from_pretrained(output)  # ignores the provenance record
    weights = (output / "model.safetensors").read_bytes()
    (output / "model.safetensors").write_bytes(weights[:-1] + b"\0")
    with pytest.raises(
        QADError, match=r"damaged: model.safetensors has changed since it was written \(another SHA-256\)\. Remove it"
    ):
        tool("export_hf", *flags)
    (output / "model.safetensors").write_bytes(weights)
    train(4)
    with pytest.raises(QADError, match="was made from .*iter_0000002, .* expected .*iter_0000004, .* Remove it"):
        tool("export_hf", *flags)
    assert "is up to date" in tool("export_hf", *flags, "--iteration", "2")
    shutil.rmtree(run / "iter_0000002")
    train(2)  # restarted: the same iteration number, other weights
    with pytest.raises(QADError, match="was made from .*iter_0000002, .* expected .*iter_0000002, .* Remove it"):
        tool("export_hf", *flags, "--iteration", "2")
    config = json.loads((run / "hf" / "config.json").read_text())
    formats = {linear.megatron: "nvfp4" for linear in family_of(config).linears(config)}
    json_records.write(run / "qad.json", {"formats": formats})
    with pytest.raises(QADError, match="layout bf16, .* expected .*layout modelopt"):
        tool("export_hf", *flags, "--layout", "modelopt", "--iteration", "2")
    with pytest.raises(QADError, match="names 2, but iter_0000004 is newer. Name the iteration"):
        tool("export_hf", *flags)


def test_link_that_leads_out_is_an_error_before_anything_is_written(damaged, refuses, tmp_path):
    (tmp_path / "secret").write_text("private")
    (damaged / "chat_template.jinja").unlink(missing_ok=True)
    (damaged / "chat_template.jinja").symlink_to(tmp_path / "secret")
    refuses(damaged, "^[^ ]*chat_template.jinja: leads to [^ ]*secret, which is outside the model directory")


def test_fp8_base_model_becomes_a_bfloat16_model(tmp_path, tool):
    """Neither the import's config nor that of an export declares FP8, and both name the architecture with a head."""
    config = tiny_job.LLAMA | {"tie_word_embeddings": True, "torch_dtype": "bfloat16"}
    tiny_job.write_hf(tmp_path / "hf", config, dtype=torch.bfloat16)
    scale, expected = torch.tensor([[0.25, 0.5], [1.0, 3.0]]), {}

    def quantize(weights):
        for name in list(weights):
            tensor = weights.pop(name)
            if name.endswith("q_proj.weight"):
                quantized, blocks = tensor.to(torch.float8_e4m3fn), torch.ones(40, 40)
                weights |= {name: quantized, f"{name}_scale_inv": scale.clone()}
                tensor = (quantized.float() * torch.kron(scale, blocks)[:64, :64]).bfloat16()
            else:
                weights[name] = tensor
            expected[name] = tensor
        for name in list(weights):
            weights[name.removeprefix("model.")] = weights.pop(name)

    change_weights(tmp_path / "hf", quantize)
    declared = {"quant_method": "fp8", "weight_block_size": [40, 40]}
    change_config(tmp_path / "hf", quantization_config=declared, architectures=["LlamaModel"])
    flags = ("--hf-model", tmp_path / "hf", "--output", tmp_path / "import")
    assert "wrote" in tool("import_hf", *flags)
    assert "is up to date" in tool("import_hf", *flags, "--reuse-existing")
    tool("export_hf", "--checkpoint", tmp_path / "import", "--output", tmp_path / "out", "--layout", "bf16")
    for directory in (tmp_path / "import" / "hf", tmp_path / "out"):
        assert json.loads((directory / "config.json").read_text()) == config
    exported = load_file(tmp_path / "out" / WEIGHTS)
    assert exported.keys() == expected.keys() and len(expected) > 10
    assert all(torch.equal(exported[name], expected[name]) for name in expected)
    change_weights(tmp_path / "hf", lambda weights: weights["layers.0.self_attn.q_proj.weight_scale_inv"].neg_())
    with pytest.raises(QADError, match="was made from"):
        tool("import_hf", *flags, "--reuse-existing")


def test_export_of_non_finite_or_too_large_weights_is_an_error(tmp_path, tool):
    tiny_job.write_hf(tmp_path / "hf", tiny_job.LLAMA | {"torch_dtype": "float16"})
    change_weights(tmp_path / "hf", lambda weights: weights[Q_PROJ].view(-1)[:1].fill_(-70000.0))
    tool("import_hf", "--hf-model", tmp_path / "hf", "--output", tmp_path / "import", "--dtype", "float32")
    flags = ("--checkpoint", tmp_path / "import", "--output", tmp_path / "out", "--layout", "bf16")
    with pytest.raises(
        QADError, match=f"{Q_PROJ} has values up to 70000, which overflow to Inf in float16 .largest value"
    ):
        tool("export_hf", *flags)
    weights = converted(tmp_path / "hf", torch.float32)
    diverged = {name: ShardedTensor.from_rank_offsets(name, weight) for name, weight in weights.items()}
    diverged["decoder.layers.0.self_attention.linear_qkv.layer_norm_weight"].data[:3] = float("nan")
    init_process_group()
    write_release(tmp_path / "diverged", diverged, lambda aside: copy_assets(tmp_path / "hf", aside / "hf"))
    torch.distributed.destroy_process_group()
    with pytest.raises(QADError, match=f"{NORM} has NaN or Inf values .3 of 64."):
        tool("export_hf", "--checkpoint", tmp_path / "diverged", *flags[2:])
    assert not (tmp_path / "out").exists()


def test_interrupted_import_leaves_no_target(complete, tmp_path, monkeypatch):
    """Interrupted after writing the weights; the next import removes the temporary directory."""
    from megatron_qad.checkpoint import import_hf as module

    def interrupt(*_):
        raise KeyboardInterrupt

    init_process_group()
    with monkeypatch.context() as patch:
        patch.setattr(module, "copy_assets", interrupt)
        with pytest.raises(KeyboardInterrupt):
            import_hf(complete, tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == [".target.partial"]
    import_hf(complete, tmp_path / "target")
    torch.distributed.destroy_process_group()
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    assert (tmp_path / "target" / "latest_checkpointed_iteration.txt").read_text() == "release"


@pytest.mark.parametrize(
    ("limit", "message"),
    [(17 << 10, "File too large")],
)
def test_full_disk_is_an_error_and_leaves_no_files(limit, message, tmp_path, server):
    """A limit on the file size, in KiB, simulates a full disk; a save starts with a file of 16 MiB."""
    tiny_job.write_hf(tmp_path / "hf", tiny_job.LLAMA | {"vocab_size": 160_000})
    argv = ["--hf-model", f"{tmp_path}/hf", "--output", f"{tmp_path}/o"]
    arguments = {"path": "tools/import_hf.py", "argv": argv, "file_kib": limit}
    output = server.run("script_jobs:script", 1, arguments, fails=True)
    assert "Traceback" not in output, output
    error = output.splitlines()[-1]
    assert error.startswith(f"error: {tmp_path}/o: not written: ") and message in error, error
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("case", ["nemotron-h", "qwen3-moe"])
def test_models_saved_by_transformers_import_like_those_of_the_hub(case, tmp_path):
    """transformers 5 saves the first with a renamed tensor and the second with a renamed config key."""
    tiny_job.write_hf(tmp_path / "hub", tiny_hybrids.CASES[case])
    tiny_hybrids.by_transformers(tmp_path / "hub").save_pretrained(tmp_path / "saved")
    hub, saved = (converted(tmp_path / name, torch.float32) for name in ("hub", "saved"))
    assert hub.keys() == saved.keys() and len(hub) > 50
    assert all(torch.equal(hub[name], saved[name]) for name in hub)


def test_assets_are_copied_without_weights(complete, tmp_path):
    source = Path(shutil.copytree(complete, tmp_path / "source"))
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "rag.jinja").write_text("x")
    copy_assets(source, tmp_path / "hf")
    copied = {str(p.relative_to(tmp_path / "hf")) for p in (tmp_path / "hf").rglob("*") if p.is_file()}
    expected = {str(p.relative_to(source)) for p in source.rglob("*") if p.is_file()}
    assert copied == expected - {WEIGHTS}


def test_reading_a_missing_tensor_is_an_error(complete):
    with pytest.raises(QADError, match="no tensor 'lm_head.bias'"):
        HFReader(complete).read("lm_head.bias")


def test_export_without_config_job_file_or_tracker_is_an_error(complete, refuses, tmp_path):
    with pytest.raises(
        QADError, match="no hf/config.json. Expected a checkpoint directory written by megatron-qad import"
    ):
        export_hf(complete, tmp_path / "out", "bf16")
    copy_assets(complete, tmp_path / "checkpoint" / "hf")
    manifest.write_manifest(tmp_path / "checkpoint" / "hf")
    (tmp_path / "checkpoint" / "iter_0000002").mkdir()
    with pytest.raises(
        QADError, match="iter_0000002: no hf/config.json.* Give .*checkpoint, and --iteration 2 to an export"
    ):
        export_hf(tmp_path / "checkpoint" / "iter_0000002", tmp_path / "out", "modelopt")
    (tmp_path / "checkpoint" / "iter_0000002").rmdir()
    with pytest.raises(QADError, match="no qad.json; only checkpoints of pretrain_qad.py.*the layout bf16"):
        export_hf(tmp_path / "checkpoint", tmp_path / "out", "modelopt")
    with pytest.raises(QADError, match="no latest_checkpointed_iteration.txt"):
        export_hf(tmp_path / "checkpoint", tmp_path / "out", "bf16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tool", ["import_hf", "export_hf"])
def test_command_lines_print_one_error_line(complete, tmp_path, tool, server):
    copy_assets(complete, tmp_path / "checkpoint" / "hf")
    manifest.write_manifest(tmp_path / "checkpoint" / "hf")
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


def test_model_without_tokenizer_is_imported_with_a_warning(complete, tmp_path, capsys):
    copy_assets(complete, tmp_path / "with")
    assert "has no tokenizer" not in capsys.readouterr().out
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text((complete / "config.json").read_text())
    copy_assets(tmp_path / "bare", tmp_path / "without")
    assert f"WARNING: {tmp_path}/bare has no tokenizer (tokenizer.json, " in capsys.readouterr().out
