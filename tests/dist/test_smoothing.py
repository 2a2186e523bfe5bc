"""tools/smooth.py on all kinds of layers: the function of the model does not change, with any parallelism."""

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path

import pytest
import tiny_hybrids
import tiny_job
import torch
from safetensors.torch import load_file, save_file

from megatron_qad.engine.run_directory import json_records

OUTLIER = 64.0
LLAMA = tiny_job.LLAMA | {"torch_dtype": "bfloat16"}
MODELS = {
    "llama": LLAMA,
    "qwen2": LLAMA | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},  # biases of q, k, v
    "nemotron-h": tiny_hybrids.NEMOTRON_H,
    "nemotron-h, latent experts": tiny_hybrids.WHOLE["nemotron-h, latent experts"],
    "qwen3-moe": tiny_hybrids.QWEN3_MOE,
    "nemotron-nas": tiny_hybrids.NEMOTRON_NAS,
}
DTYPES = ("bfloat16", "float32")
# Tensors that smoothing must change.
CHANGED = ("*.[qkv]_proj.weight", "*.o_proj.weight", "*.up_proj.weight", "*.down_proj.weight")
_MAMBA = ("*.layers.*.norm.weight", "*.mixer.norm.weight", "*.in_proj.weight", "*.out_proj.weight", "*.gate.weight")
CHANGED_IN = {
    "qwen2": ("*.v_proj.bias", "*.gate_proj.weight"),
    "nemotron-h": (*_MAMBA, "*.experts.*.down_proj.weight", "*.shared_experts.down_proj.weight"),
    "nemotron-h, latent experts": (*_MAMBA, "*.fc1_latent_proj.weight", "*.shared_experts.up_proj.weight"),
    "qwen3-moe": ("*.mlp.gate.weight", "*.experts.*.down_proj.weight"),
}
TP2 = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
EP2 = ["--expert-model-parallel-size", "2"]
# Ranks, flags and models of each case. All models run in BF16 on one rank. Parallelism is tested in float32, in which
# sums in another order do not change a power-of-two factor.
PARALLELISM = {
    "bf16": (1, ["--bf16"], list(MODELS)),
    "tp1": (1, [], list(MODELS)),
    "tp2": (2, TP2, ["qwen2", "nemotron-h", "nemotron-nas"]),
    "pp2": (2, ["--pipeline-model-parallel-size", "2"], ["llama"]),
    "virtual": (2, ["--pipeline-model-parallel-size", "2", "--num-virtual-stages-per-pipeline-rank", "2"], ["llama"]),
    "dp2": (2, [], ["llama", "nemotron-h", "qwen3-moe"]),
    "cp2": (2, ["--context-parallel-size", "2"], ["llama"]),
    "tp2ep2": (4, TP2 + EP2, ["nemotron-h", "nemotron-h, latent experts", "qwen3-moe"]),
}


def plant_outliers(directory: Path) -> None:
    """Scale one channel of each block in the outputs of norms, values and up projections, as in post-trained models."""
    tensors = load_file(directory / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(("layernorm.weight", ".norm.weight", "v_proj.weight", "up_proj.weight")) and "layers" in name:
            tensor[5::16] *= OUTLIER if "norm" in name else OUTLIER / 4
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def shop(tmp_path_factory, server):
    directory = tmp_path_factory.mktemp("smoothing")
    imports = []
    for name, config in MODELS.items():
        config = config | {"torch_dtype": "bfloat16"}
        plant_outliers(tiny_job.write_hf(directory / f"hf {name}", config, dtype=torch.bfloat16))
        imports += [(f"{directory}/hf {name}", f"{directory}/{name} {dtype}", dtype) for dtype in DTYPES]
    tiny_job.write_data(directory / "data", vocab_size=120)
    server.run("training_jobs:import_checkpoints", 1, {"models": imports})

    def run(tool: str, output: Path, model: str, *flags, parallelism="bf16", **more):
        nproc, parallel_flags, _ = PARALLELISM[parallelism]
        argv = [
            *("--output", str(output), "--qad-teacher", f"{directory}/{model}", "--data-path", f"{directory}/data"),
            *("--data-cache-path", f"{directory}/cache", "--split", "50,50,0", "--seq-length", "32"),
            *("--micro-batch-size", "2", "--global-batch-size", "8"),
            *(*tiny_job.READ_HERE, *parallel_flags, *flags),
        ]
        return server.run("training_jobs:tool", nproc, {"name": tool, "argv": argv}, **more)

    run.directory, run.server = directory, server
    return run


@pytest.fixture(scope="module")
def smoothed(shop):
    """Hugging Face directories of all smoothed models, exported: parallelism -> model -> directory."""
    directories, exports = {}, []
    for parallelism, (_, _, models) in PARALLELISM.items():
        directories[parallelism] = {}
        for model in models:
            output = shop.directory / f"{model} {parallelism}"
            source = f"{model} {DTYPES[parallelism != 'bf16']}"
            log = shop("smooth", output, source, "--qad-calibration-samples", "8", parallelism=parallelism)
            assert "unchanged, bit for bit" in log, log[-2000:]
            directories[parallelism][model] = shop.directory / f"hf {model} {parallelism}"
            exports.append([str(output), str(directories[parallelism][model]), "bf16"])
    shop.server.run("hybrid_jobs:export", 1, {"exports": exports})
    return directories


@pytest.mark.parametrize("model", MODELS)
def test_logits_in_transformers_are_equal_bit_for_bit(shop, smoothed, model):
    original_dir, smoothed_dir = shop.directory / f"hf {model}", smoothed["bf16"][model]
    original, result = (load_file(path / "model.safetensors") for path in (original_dir, smoothed_dir))
    changed = {name for name in original if not torch.equal(original[name], result[name])}
    for name in changed:  # only by powers of two
        ratio = (result[name].double() / original[name].double()).nan_to_num(nan=1.0)
        assert torch.equal(ratio.log2(), ratio.log2().round()), name
    print(f"{model}: {len(changed)} of {len(original)} tensors changed")
    for pattern in CHANGED + CHANGED_IN.get(model, ()):
        matching = [name for name in original if fnmatch(name, pattern)]
        unchanged = [name for name in matching if name not in changed]
        assert matching and not [name for name in unchanged if ".experts." not in name], pattern
        assert len(unchanged) < len(matching) / 2, pattern  # experts that saw few tokens do not change
    fixed = ("embed", "lm_head", "norm_f", "model.norm", "conv1d", "q_norm", "dt_bias", "A_log", "e_score_correction")
    assert not [name for name in changed if any(part in name for part in fixed)]
    tokens = torch.randint(0, 120, (2, 48), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        paths = (original_dir, smoothed_dir)
        logits = [tiny_hybrids.by_transformers(path)(tokens, use_cache=False).logits for path in paths]
    assert logits[0].std() > 0.3
    assert torch.equal(logits[0], logits[1])


@pytest.mark.parametrize("parallelism", [name for name in PARALLELISM if name not in ("bf16", "tp1")])
def test_factors_do_not_depend_on_parallelism(smoothed, parallelism):
    for model, directory in smoothed[parallelism].items():
        actual, expected = (load_file(d / "model.safetensors") for d in (directory, smoothed["tp1"][model]))
        assert actual.keys() == expected.keys()
        for name in expected:
            assert torch.equal(actual[name], expected[name]), f"{model}: {name}"


def test_virtual_stages_round_microbatches_up(shop, tmp_path):
    """Two stages need an even number of microbatches: three microbatches of two sequences become four."""
    log = shop("smooth", tmp_path / "a", "llama float32", "--qad-calibration-samples", "6", parallelism="virtual")
    assert "smoothed on 8 sequences" in log


def test_smoothing_lowers_the_kl_of_nvfp4(shop, smoothed, tmp_path):
    """Compares the KL of everything in NVFP4 before and after. A sixteenth of the channels are outliers, so that the
    others in their blocks lose precision."""
    kls = []
    for model in ("llama bfloat16", "llama bf16"):
        shop("sensitivity", tmp_path / model, model)
        kls.append(json.loads((tmp_path / model / "sensitivity.json").read_text())["everything"]["nvfp4"])
    print(f"KL {kls[0]:.4f} -> {kls[1]:.4f}")
    assert kls[1] < 0.75 * kls[0]


def test_job_records_how_its_weights_were_smoothed(shop, smoothed, tmp_path):
    record = json_records.read(shop.directory / "llama bf16" / "qad_smoothing.json")
    assert record["checkpoint"] == "llama bfloat16" and record["alpha"] == 0.5 and record["sequences"] == 8
    assert record["text"][-1] == "bfloat16"
    where = shop.directory
    argv = [
        *("--qad-teacher", f"{where}/llama bf16", "--data-path", f"{where}/data"),
        *("--data-cache-path", f"{where}/cache"),
        *("--split", "50,50,0", "--bf16", "--seq-length", "32", "--micro-batch-size", "2", "--global-batch-size", "4"),
        *("--qad-ptq", "--save", str(tmp_path), "--eval-iters", "1"),
    ]
    shop.server.run("training_jobs:train", 1, {"argv": argv})
    assert json_records.read(tmp_path / "qad_smoothing.json") == record
    argv[1] = f"{where}/llama bfloat16"  # what is made anew begins with the weights that it is given
    shop.server.run("training_jobs:train", 1, {"argv": argv})
    assert not (tmp_path / "qad_smoothing.json").exists()
    trained = [flag for flag in argv if flag != "--qad-ptq"] + ["--train-iters", "2", "--lr", "1e-4"]
    trained[trained.index("--save") + 1] = str(tmp_path / "trained")
    shop.server.run("training_jobs:train", 1, {"argv": trained})
    trained[1] = f"{where}/llama bf16"
    error = shop.server.run("training_jobs:train", 1, {"argv": trained}, fails=True)
    assert "its job started from weights that were smoothed differently from" in error


def test_training_flags_are_ignored(shop, tmp_path):
    """The smoothing stage of the job pipeline gets the flags of the training job that follows."""
    job = ["--train-samples", "64", "--lr", "1e-4", "--lr-decay-samples", "64", "--qad-keep-best", "2"]
    job += ["--qad-spike-factor", "5", "--wandb-project", "none", "--save", str(tmp_path / "run")]
    assert "bit for bit" in shop("smooth", tmp_path / "smoothed", "llama bfloat16", *job)
    assert [path.name for path in tmp_path.iterdir()] == ["smoothed"]


def test_reuse_existing_keeps_an_equal_output(shop, smoothed):
    output = shop.directory / "llama bf16"
    before = (output / "latest_checkpointed_iteration.txt").stat().st_mtime_ns
    flags = ["--qad-calibration-samples", "8", "--reuse-existing"]
    assert "already exists and is up to date" in shop("smooth", output, "llama bfloat16", *flags)
    assert "was made from checkpoint llama bfloat16" in shop("smooth", output, "llama float32", *flags, fails=True)
    assert "alpha 0.25" in shop("smooth", output, "llama bfloat16", *flags, "--alpha", "0.25", fails=True)
    assert "--reuse-existing" in shop("smooth", output, "llama bfloat16", *flags, "--seed", "7", fails=True)
    assert (output / "latest_checkpointed_iteration.txt").stat().st_mtime_ns == before


def test_invalid_flags_are_rejected(shop, tmp_path):
    def error(output: Path, *flags: str) -> str:
        return shop("smooth", output, "llama bfloat16", *flags, fails=True)

    assert "--alpha 1.5: expected a number above 0 and up to 1" in error(tmp_path / "a", "--alpha", "1.5")
    assert "quantizes no activation to NVFP4" in error(tmp_path / "a", "--qad-policy", "bf16")
    assert "no --qad-student" in error(tmp_path / "a", "--qad-student", f"{shop.directory}/llama bfloat16")
    shutil.copytree(shop.directory / "hf llama", tmp_path / "b")
    assert "exists and is not empty" in error(tmp_path / "b")
    assert not (tmp_path / "a").exists()
