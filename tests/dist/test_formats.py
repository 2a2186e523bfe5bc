"""Tests of every policy format from training to a validated export, of the FP8 KV cache, and of calibration.

The jobs are those of ``test_training``, with a model wide enough for INT4's groups of 128.
"""

import json
from pathlib import Path

import pytest
import records
import tiny_job
import torch
from fork_server import ForkServer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_qad.checkpoint.validate import validate_nvfp4
from megatron_qad.engine.errors import QADError
from megatron_qad.engine.run_directory import json_records
from megatron_qad.formats import fp8, nvfp4
from megatron_qad.formats.format_registry import FORMATS
from megatron_qad.models.families import family_of
from megatron_qad.quantization import policy as policies
from megatron_qad.report.policy_report import resolve_report
from megatron_qad.report.tensor_inventory import exported_tensors

CONFIG = tiny_job.LLAMA | {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "dtype": "bfloat16"}
KV_SCALES = (".k_scale", ".v_scale")
OPTIMIZER = ["--use-distributed-optimizer"]
TP2 = ["--tensor-model-parallel-size", "2", "--sequence-parallel", *OPTIMIZER]


class Shop:
    def __init__(self, directory: Path, server: ForkServer):
        self.directory, self.server = directory, server
        self._num_runs = 0

    def train(self, *flags: str, nproc: int = 1, num_steps: int = 3, precision=("--bf16",)) -> tuple[list[dict], str]:
        """Train a student that starts from the teacher's weights; return the recorded steps and the output."""
        d = self.directory
        argv = [
            *("--qad-teacher", f"{d}/teacher", "--data-path", f"{d}/data", "--data-cache-path", f"{d}/cache"),
            *(*precision, "--split", "80,20,0", "--seq-length", "32"),
            *("--micro-batch-size", "2", "--global-batch-size", "8", "--train-iters", str(num_steps)),
            *tiny_job.READ_HERE,
            *tiny_job.SCALES_OF_EVERY_STEP,
            *(
                "--lr",
                "1e-3",
                "--min-lr",
                "1e-4",
                "--eval-interval",
                "1000",
                "--eval-iters",
                "2",
                "--log-interval",
                "1",
            ),
            *("--qad-calibration-samples", "16", *flags),
        ]
        self._num_runs += 1
        self.record = d / f"record{self._num_runs}"
        output = self.server.run("training_jobs:train", nproc, {"argv": argv, "record": str(self.record)})
        return records.read(self.record, nproc, vocab_size=CONFIG["vocab_size"]), output


@pytest.fixture(scope="module")
def shop(tmp_path_factory, server):
    return open_shop(tmp_path_factory.mktemp("formats"), server, CONFIG)


def open_shop(directory: Path, server: ForkServer, config: dict, dtype: str = "bfloat16") -> Shop:
    tiny_job.write_hf(directory / "hf", config)
    tiny_job.write_data(directory / "data", vocab_size=config["vocab_size"])
    models = [(str(directory / "hf"), str(directory / "teacher"), dtype)]
    server.run("training_jobs:import_checkpoints", 1, {"models": models})
    return Shop(directory, server)


def reported_kl(output: str) -> float:
    line = [line for line in output.splitlines() if "kl_to_teacher" in line][-1]
    return float(line.split("kl_to_teacher: ")[1].split()[0])


# case -> flags, format of the linears by part of a block, KV cache format
CASES = {
    "mlp only": (["--qad-policy", "nvfp4-mlp-only"], {"attn": "bf16", "mlp": "nvfp4"}, "bf16"),
    "w4a16": (["--qad-policy", "w4a16-all-linear"], {"attn": "nvfp4-w4a16", "mlp": "nvfp4-w4a16"}, "bf16"),
    "fp8": (["--qad-policy", "fp8-all-linear"], {"attn": "fp8", "mlp": "fp8"}, "bf16"),
    "mixed, fp8 cache": (
        ["--qad-policy", "nvfp4-mlp-fp8-attention", "--qad-policy-override", "kv_cache=fp8"],
        {"attn": "fp8", "mlp": "nvfp4"},
        "fp8",
    ),
    "four over six": (
        ["--qad-policy", "nvfp4-all-linear", "--qad-weight-scale-rule", "four_over_six"],
        {"attn": "nvfp4", "mlp": "nvfp4"},
        "bf16",
    ),
    "mse": (
        ["--qad-policy", "nvfp4-all-linear", "--qad-weight-scale-rule", "mse"],
        {"attn": "nvfp4", "mlp": "nvfp4"},
        "bf16",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_train_export_validate(shop, tmp_path, case):
    """At TP2 both export layouts contain the trained weights, bit for bit, and pass validation."""
    flags, by_part, kv_cache = CASES[case]
    steps, output = shop.train(*flags, *TP2, "--save", str(tmp_path / "run"), "--save-interval", "100", nproc=2)
    outputs = {layout: str(tmp_path / layout) for layout in ("modelopt", "compressed-tensors")}
    arguments = {"checkpoint": str(tmp_path / "run"), "outputs": outputs}
    shop.server.run("training_jobs:export_checkpoint", 1, arguments)
    for directory in outputs.values():
        report = validate_nvfp4(directory, against=shop.directory / "hf")
        assert not report.issues, report.issues[:5]
        assert report.kv_cache == kv_cache
        for module in report.quantized:
            assert report.quantized[module] == by_part["attn" if "self_attn" in module else "mlp"]
        assert len(report.quantized) == sum({"attn": 2 * 4, "mlp": 2 * 3}[p] for p, f in by_part.items() if f != "bf16")
    rule = flags[flags.index("--qad-weight-scale-rule") + 1] if "--qad-weight-scale-rule" in flags else "max"
    _check_weights(steps[-1]["params"], load_file(tmp_path / "modelopt" / "model.safetensors"), by_part, rule)
    if kv_cache == "bf16":  # transformers always keeps its cache in BF16
        measured = _kl_in_transformers(shop.directory / "hf", tmp_path / "compressed-tensors")
        # Different random tokens and bf16 rounding change the KL by up to a third; a wrong scale by much more.
        assert measured == pytest.approx(reported_kl(output), rel=1 / 3)


def _check_weights(params: dict, stored: dict, by_part: dict, rule: str) -> None:
    """Check that stored weights decode to the final weights, quantized as the next step would have done in place."""
    for tensor_map in family_of(CONFIG).linears(CONFIG):
        fmt = by_part.get({"attention": "attn", "mlp": "mlp"}.get(tensor_map.kind), "bf16")
        weight = params[tensor_map.megatron].clone()
        if number_format := FORMATS[fmt].weight:
            scale = number_format.scale_from_amax(weight.abs().max().float(), rule=rule)
            number_format.fake_quant_list_([weight], scale.view(1), [tensor_map.megatron], rule)
        for name, part in zip(tensor_map.hf, tensor_map.to_hf(weight), strict=True):
            decoded = stored[name]
            if fmt == "fp8":
                decoded = fp8.dequantize(decoded, stored[f"{name}_scale"], torch.bfloat16)
            elif fmt != "bf16":
                decoded = nvfp4.dequantize(decoded, stored[f"{name}_scale"], stored[f"{name}_scale_2"], torch.bfloat16)
            assert torch.equal(decoded, part), name


def _kl_in_transformers(teacher: Path, student: Path) -> float:
    tokens = torch.randint(0, CONFIG["vocab_size"], (64, 32), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        log_p, log_q = (
            AutoModelForCausalLM.from_pretrained(d, dtype=torch.bfloat16)(tokens).logits.float().log_softmax(-1)
            for d in (teacher, student)
        )
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


@pytest.mark.parametrize("policy", ["nvfp4-all-linear", "nvfp4-mlp-fp8-attention"])
def test_float32_job_exports_in_the_dtype_of_the_config(shop, tmp_path, policy):
    """Unpacked tensors are rounded to bfloat16, the dtype in config.json. Packed ones are quantized from float32."""
    saving = ["--save", str(tmp_path / "run"), "--save-interval", "100"]
    steps, _ = shop.train("--qad-policy", policy, *saving, precision=())
    arguments = {"checkpoint": str(tmp_path / "run"), "outputs": {"modelopt": str(tmp_path / "modelopt")}}
    shop.server.run("training_jobs:export_checkpoint", 1, arguments)
    assert not validate_nvfp4(tmp_path / "modelopt", against=shop.directory / "hf").issues
    stored, params = load_file(tmp_path / "modelopt" / "model.safetensors"), steps[-1]["params"]
    assert torch.equal(stored["model.norm.weight"], params["decoder.final_norm.weight"].bfloat16())
    name = "model.layers.0.mlp.down_proj.weight"
    decoded = nvfp4.dequantize(stored[name], stored[f"{name}_scale"], stored[f"{name}_scale_2"])
    weight = params["decoder.layers.1.mlp.linear_fc2.weight"]
    assert weight.dtype == torch.float32
    assert torch.equal(decoded, nvfp4.fake_quant(weight, nvfp4.global_scale_from_amax(weight.abs().max())))


def test_float32_job_without_a_declared_dtype_exports_float32(server, tmp_path):
    """Unpacked tensors keep the dtype of training, which config.json declares and tools/export_hf.py prints."""
    config = {key: value for key, value in CONFIG.items() if key != "dtype"}
    shop, output = open_shop(tmp_path, server, config, "float32"), tmp_path / "modelopt"
    steps, _ = shop.train("--save", f"{tmp_path}/run", "--save-interval", "100", precision=(), num_steps=1)
    argv = ["--checkpoint", f"{tmp_path}/run", "--output", str(output)]
    printed = server.run("script_jobs:script", 1, {"path": "tools/export_hf.py", "argv": argv})
    assert "1 left in float32" in printed  # the head
    assert json.loads((output / "config.json").read_text())["torch_dtype"] == "float32"
    assert not (report := validate_nvfp4(output, against=tmp_path / "hf")).issues, report.issues[:5]
    stored, params = load_file(output / "model.safetensors"), steps[-1]["params"]
    assert torch.equal(stored["model.norm.weight"], params["decoder.final_norm.weight"])


def int4_policy(directory: Path, attention: str) -> Path:
    """INT4 in the MLPs, the format ``attention`` in the attention layers, the head in BF16."""
    policy = directory / "int4.yaml"
    policy.write_text(
        f"rules:\n- {{kind: attention, format: {attention}}}\n- {{kind: mlp, format: int4-w4a16}}\n"
        "- {kind: [embedding, head], format: bf16}\n"
    )
    return policy


def test_int4_trains_and_ships_what_was_trained(shop, tmp_path):
    """transformers decompresses the export of step 39 to the weights that step 40 trained with, bit for bit."""
    policy, run = int4_policy(tmp_path, "int4-w4a16"), str(tmp_path / "run")
    saving = ["--save", run, "--save-interval", "39"]
    steps, output = shop.train("--qad-policy", str(policy), *OPTIMIZER, *saving, "--lr", "3e-4", num_steps=40)
    losses = [step["loss"]["kl loss"] for step in steps]
    assert losses[0] > 0.1  # the student differs from the teacher only in weight rounding
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    assert not steps[0]["amaxes"]

    for iteration in (39, 40):
        outputs = {layout: str(tmp_path / f"{layout}{iteration}") for layout in ("compressed-tensors", "bf16")}
        arguments = {"checkpoint": run, "outputs": outputs, "iteration": iteration}
        shop.server.run("training_jobs:export_checkpoint", 1, arguments)
    result = validate_nvfp4(tmp_path / "compressed-tensors39", against=shop.directory / "hf")
    assert not result.issues, result.issues[:5]
    assert set(result.quantized.values()) == {"int4-w4a16"} and len(result.quantized) == 2 * 7
    _check_inventory(policy, tmp_path / "compressed-tensors39")

    tokens = torch.arange(CONFIG["vocab_size"]).view(1, -1)[:, :64]
    unpacked, packed = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.bfloat16)
        for name in ("bf1639", "compressed-tensors39")
    )
    with torch.inference_mode():  # the first forward pass decompresses
        assert torch.equal(packed(tokens).logits, unpacked(tokens).logits)  # equal weights in the same BF16 operations
    decompressed = packed.state_dict()
    for mapping in family_of(CONFIG).linears(CONFIG):
        trained = steps[39]["quantized"][mapping.megatron]
        for name, part in zip(mapping.hf, mapping.to_hf(trained), strict=True):
            assert decompressed[name].dtype == torch.bfloat16 and torch.equal(decompressed[name], part), name

    measured = _kl_in_transformers(shop.directory / "hf", tmp_path / "compressed-tensors40")
    assert measured == pytest.approx(reported_kl(output), rel=1 / 3)  # see test_train_export_validate
    arguments = {"checkpoint": run, "outputs": {"modelopt": str(tmp_path / "out")}}
    error = shop.server.run("training_jobs:export_checkpoint", 1, arguments, fails=True)
    assert (
        "a linear of its policy: int4-w4a16 is exported by --layout compressed-tensors only, found --layout modelopt"
        in error
    )


def _check_inventory(policy: Path, directory: Path) -> None:
    """The tensors that ``inspect_policy --tensors`` lists are those that were written."""
    report = resolve_report(CONFIG, policies.load(str(policy)))
    listed = {tensor.name: tensor.num_bytes for tensor in exported_tensors(report, "compressed-tensors")}
    written = load_file(directory / "model.safetensors")
    assert listed == {name: tensor.nbytes for name, tensor in written.items()}
    assert report.bytes_after == sum(listed.values())
    with pytest.raises(QADError, match="int4-w4a16 is exported by --layout compressed-tensors only"):
        exported_tensors(report, "modelopt")


@pytest.mark.parametrize("attention", ["nvfp4", "fp8"])
def test_int4_beside_another_format(shop, tmp_path, attention):
    """A mixed-precision directory: valid, and read by transformers."""
    policy, saving = int4_policy(tmp_path, attention), ["--save", str(tmp_path / "run"), "--save-interval", "100"]
    _, output = shop.train("--qad-policy", str(policy), *OPTIMIZER, *saving, num_steps=1)
    arguments = {"checkpoint": str(tmp_path / "run"), "outputs": {"compressed-tensors": str(tmp_path / "out")}}
    shop.server.run("training_jobs:export_checkpoint", 1, arguments)
    result = validate_nvfp4(tmp_path / "out", against=shop.directory / "hf")
    assert not result.issues, result.issues[:5]
    assert set(result.quantized.values()) == {attention, "int4-w4a16"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["format"] == "mixed-precision"
    measured = _kl_in_transformers(shop.directory / "hf", tmp_path / "out")
    assert measured == pytest.approx(reported_kl(output), rel=1 / 3)  # see test_train_export_validate


def test_fp8_kv_cache_alone_changes_the_loss(shop, tmp_path):
    """Calibrated or cast. The student differs from its teacher in FP8 keys and values, and in one weight, because an
    export needs a quantized one."""
    policy = ["--qad-policy", "bf16", "--qad-policy-override", "decoder.layers.1.mlp.linear_fc2=nvfp4-w4a16"]
    plain, _ = shop.train(*policy, num_steps=1)
    attention = "decoder.layers.{}.self_attention.core_attention.{}_bmm_quantizer"
    scales = {}
    for kv_cache in ("fp8", "fp8_cast"):
        run, out = tmp_path / kv_cache, tmp_path / f"{kv_cache}-out"
        saving = ["--save", str(run), "--save-interval", "100"]
        steps, _ = shop.train(*policy, f"kv_cache={kv_cache}", *saving, num_steps=1)
        assert steps[0]["loss"]["kl loss"] > 1.001 * plain[0]["loss"]["kl loss"]
        assert sorted(steps[0]["amaxes"]) == sorted(attention.format(i, x) for i in (0, 2) for x in "kv")
        assert json_records.read(run / "qad.json")["kv_cache"] == kv_cache
        shop.server.run(
            "training_jobs:export_checkpoint", 1, {"checkpoint": str(run), "outputs": {"modelopt": str(out)}}
        )
        result = validate_nvfp4(out, against=shop.directory / "hf")
        assert not result.issues and result.kv_cache == "fp8", result.issues[:5]
        scales[kv_cache] = [t for name, t in load_file(out / "model.safetensors").items() if name[-8:] in KV_SCALES]
    assert [scale.item() for scale in scales["fp8_cast"]] == [1.0] * 4
    for scale in scales["fp8"]:
        assert torch.equal(scale.bfloat16().float(), scale) and 0 < scale < 1


@pytest.mark.parametrize("policy", ["nvfp4-mlp-fp8-attention", "bf16"])
def test_job_with_quantized_kv_cache_resumes_bit_for_bit(shop, tmp_path, policy):
    flags = ["--qad-policy", policy, "--qad-policy-override", "kv_cache=fp8", *TP2]
    uninterrupted, _ = shop.train(*flags, nproc=2, num_steps=4)
    saving = ["--save", str(tmp_path), "--save-interval", "2"]
    first, _ = shop.train(*flags, *saving, "--exit-interval", "2", nproc=2, num_steps=4)
    second, _ = shop.train(*flags, *saving, "--load", str(tmp_path), nproc=2, num_steps=4)
    for i, (resumed, expected) in enumerate(zip(first + second, uninterrupted, strict=True), 1):
        assert resumed["loss"] == expected["loss"], i
        for key in ("quantized", "grads", "masters", "amaxes"):
            assert all(torch.equal(resumed[key][name], expected[key][name]) for name in expected[key]), (i, key)


@pytest.mark.parametrize(
    "flags",
    [[], ["--qad-calibration-percentile", "99"], ["--qad-calibration-headroom", "64"]],
    ids=["max", "percentile", "headroom"],
)
def test_amaxes_are_equal_for_any_number_of_ranks_and_any_run(shop, flags):
    """Two data-parallel ranks get the amaxes of one rank, bit for bit, and a repeated run gets them again."""
    runs = {}
    for name, nproc in (("one", 1), ("again", 1), ("two", 2)):
        steps, _ = shop.train(*flags, nproc=nproc, num_steps=1)
        runs[name] = steps[0]["amaxes"]
        if nproc == 2:
            runs["rank 1"] = torch.load(f"{shop.record}.rank1")[0]["amaxes"]
    assert len(runs["one"]) == 8
    for name, amaxes in runs.items():
        assert all(torch.equal(amaxes[linear], runs["one"][linear]) for linear in amaxes), name
