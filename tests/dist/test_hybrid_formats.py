"""Tests of quantized hybrid, NAS and vision-language models: training, export, validation, loading in transformers."""

import json
import shutil
from itertools import product

import pytest
import tiny_hybrids
import tiny_job
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_training import Workshop

from megatron_qad.checkpoint.validate import validate_nvfp4
from megatron_qad.engine.run_directory import json_records
from megatron_qad.formats import nvfp4
from megatron_qad.quantization import policy as policies
from megatron_qad.report.policy_report import resolve_report
from megatron_qad.report.tensor_inventory import exported_tensors

PATTERN = "MEMEM*EE"
CONFIG = tiny_hybrids.NEMOTRON_H | {"hybrid_override_pattern": PATTERN, "num_hidden_layers": len(PATTERN)}
BF16 = ["--bf16"]
TP2EP2 = ["--tensor-model-parallel-size", "2", "--sequence-parallel", "--expert-model-parallel-size", "2"]
EP4 = ["--expert-model-parallel-size", "4"]
POLICY = ["--qad-policy", "nemotron-3-nano-30b-a3b"]
BF16_LAYERS = (4, 5)
"""The attention layer and the Mamba layer before it, which the policy keeps in BF16."""


@pytest.fixture(scope="module")
def workshop(tmp_path_factory, server):
    directory = tmp_path_factory.mktemp("hybrid_formats")
    models = []
    for kind, dtype in (("bf16", torch.bfloat16), ("f32", torch.float32)):
        name = str(dtype).removeprefix("torch.")
        for role, noise in (("teacher", 0.0), ("student", 0.1)):
            config = CONFIG | {"torch_dtype": name}
            source = tiny_job.write_hf(directory / f"hf_{kind}_{role}", config, noise=noise, dtype=dtype)
            models.append((str(source), f"{directory}/{kind}_{role}", name))
    tiny_job.write_data(directory / "data", vocab_size=120)
    server.run("training_jobs:import_checkpoints", 1, {"models": models})
    return Workshop(directory, server)


def export(workshop, run, output) -> dict[str, torch.Tensor]:
    arguments = {"checkpoint": str(run), "outputs": {"modelopt": str(output)}}
    workshop.server.run("training_jobs:export_checkpoint", 1, arguments)
    return load_file(output / "model.safetensors")


@pytest.fixture(scope="module")
def trained(workshop, tmp_path_factory):
    """Train two steps at TP2 x EP2 in BF16 and export. Returns the steps, exported tensors, directory and output."""
    directory = tmp_path_factory.mktemp("trained")
    flags = [*BF16, *TP2EP2, *POLICY, "--save", str(directory / "run"), "--lr", "1e-2"]
    steps, output = workshop.train(workshop.argv(*flags, kind="bf16", num_steps=2), 4)
    return steps, export(workshop, directory / "run", directory / "out"), directory, output


def test_policy_keeps_the_layers_of_the_paper_in_bf16(trained):
    """During a step experts, shared experts and Mamba layers are quantized. Attention, the Mamba layer before it, the
    router, the head and all modules other than GEMMs are not."""
    steps, *_ = trained
    num_weights = {True: 0, False: 0}
    for name, weight in steps[1]["quantized"].items():
        layer = int(name.split(".")[2]) if name.startswith("decoder.layers") else None
        is_gemm = name.endswith(("in_proj.weight", "out_proj.weight", "linear_fc1.weight", "linear_fc2.weight"))
        is_quantized = is_gemm and layer not in BF16_LAYERS
        if weight.dim() == 2:
            # E2M1 has 15 values, so 16 quantized values always repeat. Some unquantized block has no repeats.
            blocks = weight.reshape(-1, 16).sort(-1).values
            quantized = bool((blocks.diff(dim=-1) == 0).any(-1).all())
            assert quantized == is_quantized, name
            num_weights[is_quantized] += 1
    assert num_weights[True] == 4 * (8 * 2 + 2) + 2 * 2 and num_weights[False] > 8


def test_export_is_valid_and_complete(workshop, trained):
    _, stored, directory, _ = trained
    report = validate_nvfp4(directory / "out", against=workshop.directory / "hf_bf16_student")
    assert not report.issues, report.issues[:5]
    assert (report.kv_cache, set(report.quantized.values())) == ("fp8", {"nvfp4"})
    assert len(report.quantized) == 4 * (8 * 2 + 2) + 2 * 2
    excluded = json.loads((directory / "out" / "hf_quant_config.json").read_text())["quantization"]["exclude_modules"]
    layers = [f"backbone.layers.{i}.mixer" for i in range(len(PATTERN))]
    kept = [f"{layers[5]}.{x}_proj" for x in "qkvo"] + [f"{layers[4]}.{x}_proj" for x in ("in", "out")]
    assert set(excluded) == {"lm_head", *kept, *(f"{layers[i]}.conv1d" for i in (0, 2, 4))}
    assert {f"{layers[5]}.k_proj.k_scale", f"{layers[5]}.v_proj.v_scale"} <= stored.keys()
    for i, symbol in enumerate(PATTERN):
        bias = stored.get(f"{layers[i]}.gate.e_score_correction_bias")
        assert (bias is not None and bias.dtype == torch.float32) == (symbol == "E")


def test_dry_run_lists_the_exported_tensors(trained):
    _, _, directory, _ = trained
    config = json.loads((directory / "out" / "config.json").read_text())
    report = resolve_report(config, policies.load(POLICY[1]))
    listed = {tensor.name: tensor for tensor in exported_tensors(report, "modelopt")}
    with safe_open(directory / "out" / "model.safetensors", framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}
        written = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in listed.items()} == written
    sizes = {name: tensor.nbytes for name, tensor in load_file(directory / "out" / "model.safetensors").items()}
    assert {name: tensor.num_bytes for name, tensor in listed.items()} == sizes


def measured_load(workshop, run, nproc: int, *flags: str) -> tuple[dict, str]:
    flags = [*flags, "--save", str(run), "--eval-iters", "2", "--qad-ptq"]
    _, output = workshop.train(workshop.argv(*flags, kind="f32"), nproc, whole=False)
    return json_records.read(run / "expert_load.json")["layers"], output


def test_expert_load_compared_with_the_teacher(workshop, tmp_path):
    """The counts cover every token of an evaluation, for any parallelism, and agree if the student is the teacher."""
    same = ["--qad-policy", "bf16", "--qad-student", f"{workshop.directory}/f32_teacher"]
    unquantized, _ = measured_load(workshop, tmp_path / "same", 1, *same)
    quantized, output = measured_load(workshop, tmp_path / "nvfp4", 1, *POLICY, *same[2:])
    assert list(unquantized) == list(quantized) == [str(i) for i, symbol in enumerate(PATTERN) if symbol == "E"]
    tokens = 2 * 8 * 32  # evaluation iterations, sequences, sequence length
    for layer, counts in unquantized.items():
        assert (counts["changed"], counts["compared"]) == (0, tokens)
        assert counts["teacher"] == counts["student"] == quantized[layer]["teacher"]
        assert sum(counts["teacher"]) == 3 * tokens
        assert 0 < quantized[layer]["changed"] < tokens
        assert sum(quantized[layer]["student"]) == 3 * tokens
    assert "experts at iteration" in output and "tokens whose experts changed: " in output
    # The same tokens, split over ranks and stages, or with two microbatches per teacher pass.
    flags = ["--qad-policy", "bf16"]
    expected, _ = measured_load(workshop, tmp_path / "one", 1, *flags)
    assert all(0 < counts["changed"] < tokens for counts in expected.values())
    runs = {"tp2ep2": (4, TP2EP2), "pp2": (2, ["--pipeline-model-parallel-size", "2"])}
    runs["teacher"] = (1, ["--qad-teacher-micro-batch-size", "4"])
    for name, (nproc, more_flags) in runs.items():
        assert measured_load(workshop, tmp_path / name, nproc, *flags, *more_flags)[0] == expected, name


def test_router_is_frozen_unless_trained(workshop, trained, tmp_path):
    """Router weights and biases (updated without a gradient) keep their bits without ``--qad-train-router``."""
    _, frozen, _, _ = trained
    flags = [*BF16, *POLICY, "--qad-train-router", "--save", str(tmp_path / "run"), "--lr", "1e-2"]
    workshop.train(workshop.argv(*flags, kind="bf16", num_steps=2), whole=False)
    learned = export(workshop, tmp_path / "run", tmp_path / "out")
    given = load_file(workshop.directory / "hf_bf16_student" / "model.safetensors")
    routers = [name for name in given if ".gate." in name]
    assert len(routers) == 2 * 4
    for name in routers:
        assert torch.equal(frozen[name], given[name]), name
        assert not torch.equal(learned[name], given[name]), name
    assert not torch.equal(frozen["backbone.layers.0.norm.weight"], given["backbone.layers.0.norm.weight"])


def test_export_at_ep4_contains_every_expert(workshop, tmp_path):
    """The export equals that of one process, including input amaxes of tokens from other ranks."""
    exported = {}
    for name, nproc, parallelism in (("one", 1, []), ("ep4", 4, EP4)):
        flags = [
            "--qad-ptq",
            "--bf16",
            *parallelism,
            *POLICY,
            "--save",
            str(tmp_path / name),
            "--micro-batch-size",
            "1",
        ]
        workshop.train(workshop.argv(*flags, kind="bf16"), nproc, whole=False)
        exported[name] = export(workshop, tmp_path / name, tmp_path / f"out_{name}")
    assert exported["one"].keys() == exported["ep4"].keys()
    experts = [name for name in exported["ep4"] if ".experts." in name and name.endswith("_proj.weight")]
    assert len(experts) == len(set(experts)) == 4 * 8 * 2
    for name, tensor in exported["one"].items():
        if name.endswith("input_scale"):
            # Microbatches differ, so BF16 sums differ: an amax may be the next bfloat16.
            assert exported["ep4"][name].item() == pytest.approx(tensor.item(), rel=2**-6), name
        elif not name.endswith("_scale"):
            ep4_tensor = exported["ep4"][name]
            assert torch.equal(ep4_tensor.view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8)), name


def test_experts_of_a_layer_are_exported_with_one_input_scale(workshop, tmp_path):
    """Two sequences of 32 tokens leave some of the 8 experts without a token; they have the scale of the others."""
    flags = [*POLICY, "--qad-ptq", "--qad-calibration-samples", "2", "--save", str(tmp_path / "run")]
    workshop.train(workshop.argv(*flags, kind="f32"), 2, whole=False)
    exported = export(workshop, tmp_path / "run", tmp_path / "out")
    for layer, projection in product((1, 3, 6, 7), ("up_proj", "down_proj")):
        names = [f"backbone.layers.{layer}.mixer.experts.{i}.{projection}" for i in range(8)]
        assert len({exported[f"{name}.input_scale"].item() for name in names}) == 1
        assert len({exported[f"{name}.weight_scale_2"].item() for name in names}) == 8  # each expert has its own


def test_transformers_logits_match_weight_only_quantization(workshop, tmp_path):
    """A float32 student, trained at TP2 x EP2, is exported, decoded to float32 and loaded in transformers. The logits
    match Megatron's with quantized weights and unquantized inputs."""
    run = tmp_path / "run"
    workshop.train(workshop.argv(*TP2EP2, *POLICY, "--save", str(run), kind="f32", num_steps=2), 4, whole=False)
    packed = export(workshop, run, tmp_path / "out")
    plain = {}
    for name, tensor in packed.items():
        if name.endswith(".weight") and tensor.dtype == torch.uint8:
            scale, scale_2 = packed[f"{name}_scale"], packed[f"{name}_scale_2"]
            plain[name] = nvfp4.dequantize(tensor, scale, scale_2, torch.float32)
        elif not name.endswith(("_scale", "_scale_2")):
            plain[name] = tensor
    loaded = tmp_path / "decoded"
    loaded.mkdir()
    save_file(plain, loaded / "model.safetensors", metadata={"format": "pt"})
    (loaded / "config.json").write_text(json.dumps(CONFIG))
    tokens = tiny_hybrids.tokens("nemotron-h", rows=4)
    with torch.no_grad():
        logits = tiny_hybrids.by_transformers(loaded)(tokens, use_cache=False).logits
    save_file({"tokens": tokens, "logits": logits}, tmp_path / "expected.safetensors")
    arguments = {"checkpoint": str(run), "expected": str(tmp_path / "expected.safetensors"), "flags": POLICY}
    for quantizes in (True, False):
        workshop.server.run(
            "hybrid_jobs:weight_only", 1, arguments | {"quantizes": quantizes, "result": str(tmp_path / "result")}
        )
        result = torch.load(tmp_path / "result")
        print(f"{quantizes=}: error {result['error']:.1e}, standard deviation {result['std']:.2f}")
        # float32 sums in another order, as in test_hybrids; unquantized weights change logits by 1e-1.
        assert (result["error"] <= 1e-4) == quantizes


def test_latent_projections_of_experts_are_quantized(workshop, tmp_path):
    """With ``moe_latent_size`` at TP2 x EP2 the two latent projections are trained with quantized weights and inputs,
    and exported like other linears."""
    config = CONFIG | {"moe_latent_size": 32, "torch_dtype": "bfloat16"}
    source = tiny_job.write_hf(tmp_path / "hf", config, dtype=torch.bfloat16)
    arguments = {"models": [(str(source), str(tmp_path / "imported"), "bfloat16")]}
    workshop.server.run("training_jobs:import_checkpoints", 1, arguments)
    model = ["--qad-teacher", str(tmp_path / "imported"), "--qad-student", str(tmp_path / "imported")]
    flags = [*BF16, *TP2EP2, *POLICY, *model, "--save", str(tmp_path / "run"), "--lr", "1e-2"]
    steps, _ = workshop.train(workshop.argv(*flags, kind="bf16", num_steps=2), 4)
    stored = export(workshop, tmp_path / "run", tmp_path / "out")
    report = validate_nvfp4(tmp_path / "out", against=source)
    assert not report.issues, report.issues[:5]
    given = load_file(source / "model.safetensors")
    for i in (1, 3, 6, 7):
        for name, outputs, inputs in (("fc1_latent_proj", 32, 64), ("fc2_latent_proj", 64, 32)):
            weight = f"backbone.layers.{i}.mixer.{name}.weight"
            packed, scale = stored[weight], stored[f"{weight}_scale"]
            assert packed.shape == (outputs, inputs // 2)
            assert stored[weight.replace("weight", "input_scale")] > 0
            learned = nvfp4.dequantize(packed, scale, stored[f"{weight}_scale_2"], torch.bfloat16)
            untrained_scale = nvfp4.global_scale_from_amax(given[weight].abs().amax().float())
            assert not torch.equal(learned, nvfp4.fake_quant(given[weight], untrained_scale))
            quantized = steps[1]["quantized"][f"decoder.layers.{i}.mlp.{name}.weight"].reshape(-1, 16).sort(-1).values
            assert bool((quantized.diff(dim=-1) == 0).any(-1).all())


def test_nas_llama_in_nvfp4(workshop, tmp_path):
    """A NAS model, whose blocks differ in width or lack attention or MLP, trains at TP2 x PP2. Both export layouts are
    valid and have the same codes."""
    source = tiny_job.write_hf(
        tmp_path / "hf", tiny_hybrids.NEMOTRON_NAS | {"torch_dtype": "bfloat16"}, dtype=torch.bfloat16
    )
    arguments = {"models": [(str(source), str(tmp_path / "imported"), "bfloat16")]}
    workshop.server.run("training_jobs:import_checkpoints", 1, arguments)
    model = ["--qad-teacher", str(tmp_path / "imported"), "--qad-student", str(tmp_path / "imported")]
    flags = [*BF16, *model, "--qad-policy", "llama-nemotron-super-49b", "--save", str(tmp_path / "run"), "--lr", "1e-2"]
    parallelism = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]
    steps, _ = workshop.train(workshop.argv(*flags, *parallelism, kind="bf16", num_steps=2), 4)
    assert steps[0]["loss"]["kl loss"] > 0
    outputs = {layout: str(tmp_path / layout) for layout in ("modelopt", "compressed-tensors")}
    workshop.server.run("training_jobs:export_checkpoint", 1, {"checkpoint": str(tmp_path / "run"), "outputs": outputs})
    codes = []
    for layout, output in outputs.items():
        report = validate_nvfp4(output, against=source)
        assert not report.issues, (layout, report.issues[:5])
        assert len(report.quantized) == 3 * 4 + 4 * 3  # attention in three blocks, MLPs in four
        stored = load_file(f"{output}/model.safetensors")
        ending = ".weight_packed" if layout == "compressed-tensors" else ".weight"
        codes.append({name.removesuffix(ending): t for name, t in stored.items() if t.dtype == torch.uint8})
    assert codes[0].keys() == codes[1].keys()
    assert all(torch.equal(codes[0][name], codes[1][name]) for name in codes[0])
    assert codes[0]["model.layers.1.mlp.up_proj"].shape == (512, 32)
    assert codes[0]["model.layers.3.mlp.up_proj"].shape == (256, 32)


def test_multi_token_prediction_layers_pass_through_unchanged(workshop, tmp_path):
    """The export has their names, bits and exclusion; the import log says that they are not trained."""
    source = tmp_path / "hf"
    shutil.copytree(workshop.directory / "hf_bf16_student", source)
    config = json.loads((source / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (source / "config.json").write_text(json.dumps(config))
    heads = {
        "mtp.layers.0.eh_proj.weight": torch.randn(64, 128).bfloat16(),
        "mtp.layers.0.enorm.weight": torch.randn(64).bfloat16(),
        "mtp.layers.1.mixer.gate.weight": torch.randn(8, 64).bfloat16(),
        "mtp.layers.1.mixer.gate.e_score_correction_bias": torch.randn(8),
    }
    save_file(load_file(source / "model.safetensors") | heads, source / "model.safetensors")
    arguments = {"models": [(str(source), str(tmp_path / "imported"), "bfloat16")]}
    output = workshop.server.run("training_jobs:import_checkpoints", 1, arguments)
    assert (
        "4 tensors (mtp.layers.0.eh_proj.weight, ...) are passed through unchanged, not trained or quantized" in output
    )
    flags = [*BF16, *POLICY, "--save", str(tmp_path / "run"), "--qad-teacher", str(tmp_path / "imported")]
    flags += ["--qad-student", str(tmp_path / "imported"), "--qad-ptq"]
    workshop.train(workshop.argv(*flags, kind="bf16"), whole=False)
    stored = export(workshop, tmp_path / "run", tmp_path / "out")
    for name, tensor in heads.items():
        assert stored[name].dtype == tensor.dtype and torch.equal(stored[name], tensor), name
    report = validate_nvfp4(tmp_path / "out", against=source)
    assert not report.issues, report.issues[:5]
    excluded = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]["exclude_modules"]
    assert [name for name in excluded if name.startswith("mtp.")] == ["mtp.layers.0.eh_proj"]


VISION_LANGUAGE = {
    "architectures": ["NemotronH_Nano_VL_V2"],
    "model_type": "NemotronH_Nano_VL_V2",
    "vit_hidden_size": 32,
    "projector_hidden_size": 48,
    "downsample_ratio": 0.5,
    "vision_config": {"num_hidden_layers": 1, "intermediate_size": 64, "patch_size": 2, "max_resolution": 8},
    "torch_dtype": "bfloat16",
}


def test_language_model_of_a_vision_language_model(workshop, trained, tmp_path):
    """It trains as it does alone, bit for bit, and the vision tensors pass through unchanged."""
    models = []
    for role, noise in (("teacher", 0.0), ("student", 0.1)):
        config = VISION_LANGUAGE | {"llm_config": CONFIG | {"torch_dtype": "bfloat16"}}
        source = tiny_job.write_hf(tmp_path / f"hf_{role}", config, noise=noise, dtype=torch.bfloat16)
        models.append((str(source), str(tmp_path / role), "bfloat16"))
    output = workshop.server.run("training_jobs:import_checkpoints", 1, {"models": models})
    # Class token, positions, patch linear; a block's four linears with biases and two norms; the projector.
    assert "18 tensors (mlp1.0.weight, ...) are passed through unchanged, not trained or quantized" in output
    model = ["--qad-teacher", str(tmp_path / "teacher"), "--qad-student", str(tmp_path / "student")]
    flags = [*BF16, *TP2EP2, *POLICY, *model, "--save", str(tmp_path / "run"), "--lr", "1e-2"]
    steps, _ = workshop.train(workshop.argv(*flags, kind="bf16", num_steps=2), 4)
    alone, stored_alone, *_ = trained
    assert [step["loss"] for step in steps] == [step["loss"] for step in alone]
    stored = export(workshop, tmp_path / "run", tmp_path / "out")
    given = load_file(tmp_path / "hf_student" / "model.safetensors")
    vision = {name for name in given if name.startswith(("vision_model.", "mlp1."))}
    assert stored.keys() == {f"language_model.{name}" for name in stored_alone} | vision
    for name, tensor in stored.items():
        expected = given[name] if name in vision else stored_alone[name.removeprefix("language_model.")]
        assert tensor.dtype == expected.dtype, name
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8)), name
    report = validate_nvfp4(tmp_path / "out", against=tmp_path / "hf_student")
    assert not report.issues, report.issues[:5]
    assert len(report.quantized) == 4 * (8 * 2 + 2) + 2 * 2
    excluded = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]["exclude_modules"]
    assert {"lm_head", "language_model.lm_head"} <= set(excluded)  # servers look for one or the other
    linears = {f"{name}.weight" for name in excluded if not name.startswith("language_model.")} - {"lm_head.weight"}
    assert linears == {name for name in vision if name.endswith(".weight") and given[name].dim() == 2}
    # Import, export and validation fail if vision tensors are missing or a server would take them for quantized.
    without = tmp_path / "hf_blind"
    shutil.copytree(tmp_path / "hf_student", without)
    text = {name: tensor for name, tensor in given.items() if not name.startswith("vision_model.")}
    save_file(text, without / "model.safetensors")
    arguments = {"models": [(str(without), str(tmp_path / "blind"), "bfloat16")]}
    output = workshop.server.run("training_jobs:import_checkpoints", 1, arguments, fails=True)
    assert "no tensor name starts with 'vision_model.'" in output
    (tmp_path / "run" / "hf" / "passthrough.safetensors").unlink()
    arguments = {"checkpoint": str(tmp_path / "run"), "outputs": {"modelopt": str(tmp_path / "blind")}}
    output = workshop.server.run("training_jobs:export_checkpoint", 1, arguments, fails=True)
    assert "hf/passthrough.safetensors is missing" in output
    qkv = "vision_model.radio_model.model.blocks.0.attn.qkv"
    for name in ("config.json", "hf_quant_config.json"):
        file = tmp_path / "out" / name
        file.write_text(file.read_text().replace(f'"{qkv}",', ""))
    save_file({n: t for n, t in stored.items() if not n.startswith("mlp1.")}, tmp_path / "out" / "model.safetensors")
    problems = "\n".join(map(str, validate_nvfp4(tmp_path / "out").issues))
    assert f"{qkv}: is not quantized, but missing from" in problems and "mlp1.*: is missing" in problems


def test_invalid_jobs_and_checkpoints_are_errors(workshop, tmp_path):
    error = workshop.fail(workshop.argv("--moe-aux-loss-coeff", "1e-2", kind="f32"))
    assert "--moe-aux-loss-coeff 0.01 with a frozen router" in error or "[0.01] with a frozen router" in error
    error = workshop.fail(workshop.argv("--expert-model-parallel-size", "3", kind="f32"), 3)
    assert (
        "--expert-model-parallel-size 3 does not divide the experts of the student (8); possible: 1, 2, 4, 8" in error
    )
    source = tmp_path / "hf"
    shutil.copytree(workshop.directory / "hf_f32_teacher", source)
    tensors = load_file(source / "model.safetensors")
    missing = [name for name in tensors if ".experts.5." in name]
    save_file({name: t for name, t in tensors.items() if name not in missing}, source / "model.safetensors")
    arguments = {"models": [(str(source), str(tmp_path / "imported"), "float32")]}
    output = workshop.server.run("training_jobs:import_checkpoints", 1, arguments, fails=True)
    assert f"{len(missing)} tensors are missing, first {min(missing)!r}" in output


def test_packed_documents_are_independent(workshop, tmp_path):
    """Each document of a packed row has the logits that it has alone: Mamba's convolution and state are reset."""
    result = str(tmp_path / "packed.pt")
    arguments = {"checkpoint": f"{workshop.directory}/f32_teacher", "lengths": [12, 5, 1, 142], "result": result}
    workshop.server.run("axes_jobs:packed_logits", 1, arguments)
    logits = torch.load(result)
    assert logits["spread"] > 0.3
    assert max(logits["errors"]) < 1e-4, logits  # float32 sums of different chunks; a leak gives 1e-1
