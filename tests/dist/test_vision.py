"""Vision-language models: features merged into embeddings, under all parallelism, from images to an export."""

import re

import pytest
import records
import tiny_job
import tiny_vision
import torch
from safetensors.torch import load_file, save_file
from test_training import TOLERANCE as TOLERANCE_OF_STEPS
from test_training import Workshop

from megatron_qad.checkpoint.validate import validate_nvfp4

# As in test_model_parity: float32 sums in another order, 3e-6 there. The features are about 1 here.
TOLERANCE = 2e-5
# With Mamba layers, the gradients of the first step differ by up to 7.4e-6. Adam divides small gradients by their own
# size, so the differences grow, to 3.5e-5 in the fifth step. One wrong feature in a microbatch gives 0.1 or more.
MAMBA_TOLERANCES = [2e-5] + 4 * [1e-4]


@pytest.mark.parametrize("model", tiny_vision.CONFIGS)
def test_logits_equal_transformers(server, tmp_path, model):
    """The encoder, the projector and the merge equal RadioModel, a projector written out, and inputs_embeds."""
    source = tiny_job.write_hf(tmp_path / "hf", tiny_vision.CONFIGS[model])
    server.run("training_jobs:import_checkpoints", 1, {"models": [(str(source), str(tmp_path / "model"), "float32")]})
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, tiny_vision.IMAGE_TOKEN, (4, 24), generator=generator)
    for row, start, num_tiles in ((0, 2, 1), (1, 0, 2), (1, 12, 3)):  # the last two rows have no image
        tokens[row, start : start + 4 * num_tiles] = tiny_vision.IMAGE_TOKEN
    tiles = torch.randint(0, 256, (6, 3, tiny_vision.TILE, tiny_vision.TILE), dtype=torch.uint8, generator=generator)
    torch.save({"tokens": tokens, "tiles": tiles}, tmp_path / "inputs")
    arguments = {"checkpoint": f"{tmp_path}/model", "inputs": f"{tmp_path}/inputs", "result": f"{tmp_path}/logits"}
    server.run("vision_jobs:logits", 1, arguments)
    actual = torch.load(tmp_path / "logits")[..., :120]
    expected = tiny_vision.reference_logits(source, tmp_path / "text", tokens, tiles)
    assert expected.std() > 0.3 and (actual - expected).abs().max() < TOLERANCE
    blind = tiny_vision.reference_logits(source, tmp_path / "blind", tokens, tiles.flip(0))
    assert (blind[:2] - expected[:2]).abs().max() > 0.05, "the images do not change the logits"


TP2_SP = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
PP2 = ["--pipeline-model-parallel-size", "2"]
CP2 = ["--context-parallel-size", "2"]
PACKED = ["--dataloader-inter-document-masking", "--qad-pad-documents-to", "4"]
# Ranks and flags.
AXES = {
    "tp2 sp": (2, TP2_SP),
    "pp2": (2, PP2),
    "pp2 virtual2": (2, [*PP2, "--num-virtual-stages-per-pipeline-rank", "2"]),
    "cp2": (2, CP2),
    "dp2": (2, []),
    "tp2cp2": (4, [*TP2_SP, *CP2]),
    "recompute": (
        1,
        ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"],
    ),
    "teacher microbatch": (1, ["--qad-teacher-micro-batch-size", "4"]),
    "offloaded teacher": (1, ["--qad-teacher-cpu-offload"]),
}
PACKED_AXES = {name: AXES[name] for name in ("tp2 sp", "pp2", "cp2", "dp2", "teacher microbatch")}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory, server):
    directory = tmp_path_factory.mktemp("vision")
    models = []
    for name, config in tiny_vision.CONFIGS.items():
        for role, noise in (("teacher", 0.0), ("student", 0.3)):
            source = tiny_job.write_hf(directory / f"hf_{name}_{role}", config, noise=noise)
            if role == "student":  # one encoder a job
                copy_vision(directory / f"hf_{name}_teacher", source)
            models.append((str(source), f"{directory}/{name}_{role}", "float32"))
        tiny_vision.write_data(directory / f"data_{name}", name)
    server.run("training_jobs:import_checkpoints", 1, {"models": models})
    return Workshop(directory, server)


def copy_vision(source, target) -> None:
    """Give a model the vision tensors of another one."""
    theirs, ours = (load_file(directory / "model.safetensors") for directory in (source, target))
    ours |= {name: tensor for name, tensor in theirs.items() if not name.startswith("language_model.")}
    save_file(ours, target / "model.safetensors", metadata={"format": "pt"})


def argv(workshop, model: str, *flags: str, num_steps: int) -> list[str]:
    data = ["--data-path", f"{workshop.directory}/data_{model}"]
    return workshop.argv("--qad-policy", "bf16", "--adam-eps", "1e-5", *data, *flags, kind=model, num_steps=num_steps)


@pytest.mark.parametrize(("model", "data"), [("nemotron", "rows"), ("nemotron", "packed"), ("llama", "rows")])
def test_axes_agree(workshop, model, data):
    """Losses and gradients of five steps on rows with and without images equal those of one process."""
    axes, flags = (PACKED_AXES, PACKED) if data == "packed" else (AXES, [])
    if model == "llama":
        axes = {name: axes[name] for name in ("tp2 sp", "pp2 virtual2", "cp2")}
    job = argv(workshop, model, *flags, num_steps=5)
    expected, _ = workshop.train(job)
    assert expected[0]["loss"]["kl loss"] > 0.1
    wrong = {}
    for axis, (nproc, axis_flags) in axes.items():
        actual, _ = workshop.train(job + axis_flags, nproc)
        steps = list(zip(actual, expected, strict=True))
        loss = max(abs(a["loss"]["kl loss"] / b["loss"]["kl loss"] - 1) for a, b in steps)
        errors = [records.largest_error([a], [b], "grads") for a, b in steps]
        print(f"{model} {data} {axis}: loss {loss:.1e}, gradients {', '.join(f'{error:.1e}' for error, _ in errors)}")
        tolerances = MAMBA_TOLERANCES if model == "nemotron" else 5 * [TOLERANCE_OF_STEPS]
        if loss > tolerances[0] or any(e > limit for (e, _), limit in zip(errors, tolerances, strict=True)):
            wrong[axis] = (loss, errors)
    assert not wrong, wrong


POLICY = ["--qad-policy", "nemotron-nano-12b-v2-vl", "--bf16"]


@pytest.fixture(scope="module")
def trained(workshop):
    """A run of two steps on two tensor-parallel ranks, with validations, and its output."""
    run = workshop.directory / "run"
    flags = [*POLICY, "--save", str(run), "--save-interval", "1", "--eval-interval", "1", "--eval-iters", "2"]
    job = [*argv(workshop, "nemotron", num_steps=2), *flags]
    steps, output = workshop.train([*job, *TP2_SP], 2, whole=False)
    return job, steps, output


def test_validation_has_the_metrics_after_images_apart(trained):
    _, _, output = trained
    (line,) = [line for line in output.splitlines() if "validation at iteration 1 |" in line]
    values = dict(part.split(": ") for part in line.split(" | ")[1:])
    parts = {
        s: (float(values[f"kl_to_teacher_{s}"]), int(values[f"num_tokens_{s}"])) for s in ("after_image", "text_only")
    }
    assert all(count > 5 and kl > 0 for kl, count in parts.values()), parts
    assert sum(count for _, count in parts.values()) == int(values["num_tokens"])
    mean = sum(kl * count for kl, count in parts.values()) / int(values["num_tokens"])
    assert mean == pytest.approx(float(values["kl_to_teacher"]), rel=1e-5)  # six digits are printed
    assert parts["after_image"][0] != parts["text_only"][0]


def test_resume_with_other_parallelism(workshop, trained, tmp_path):
    """The second step, resumed on two pipeline stages, has the loss of the uninterrupted run."""
    job, steps, _ = trained
    job = [word if word != f"{workshop.directory}/run" else f"{tmp_path}/run" for word in job]
    workshop.train([*job, *TP2_SP, "--exit-interval", "1"], 2, whole=False)
    (step,), _ = workshop.train([*job, *PP2], 2, whole=False)
    # The last bit may decide the code of an input (test_training); wrong images change the loss by more than a tenth.
    assert step["loss"]["kl loss"] == pytest.approx(steps[1]["loss"]["kl loss"], rel=0.02)


@pytest.mark.parametrize("model", tiny_vision.CONFIGS)
def test_export_is_valid_and_carries_the_vision_tensors(workshop, trained, tmp_path, model):
    run, source = workshop.directory / "run", workshop.directory / f"hf_{model}_student"
    if model == "llama":
        run = tmp_path / "run"
        job = [*argv(workshop, model, num_steps=1), "--bf16", "--qad-policy", "nvfp4-all-linear"]
        workshop.train([*job, "--save", str(run), "--save-interval", "1"], whole=False)
    arguments = {"checkpoint": str(run), "outputs": {"modelopt": f"{tmp_path}/out"}}
    workshop.server.run("training_jobs:export_checkpoint", 1, arguments)
    report = validate_nvfp4(tmp_path / "out", against=source)
    assert not report.issues, report.issues[:5]
    assert report.quantized and all(name.startswith("language_model.") for name in report.quantized)
    ours, theirs = (load_file(directory / "model.safetensors") for directory in (tmp_path / "out", source))
    vision = {name for name in theirs if not name.startswith("language_model.")}
    assert len(vision) == {"nemotron": 30, "llama": 33}[model]
    assert all(torch.equal(ours[name].view(torch.uint8), theirs[name].view(torch.uint8)) for name in vision)


def test_calibration_sees_the_images(workshop):
    """The amaxes depend on how the encoder's positions are resized, and the log says how much of it is images."""
    amaxes = []
    for flags in ([], ["--qad-vision-align-corners"]):
        steps, output = workshop.train([*argv(workshop, "nemotron", num_steps=1), *POLICY, *flags], whole=False)
        amaxes.append(steps[0]["amaxes"])
        share = int(re.search(r"(\d+)% of the calibration's tokens are images", output)[1])
        assert 5 < share < 60
    assert amaxes[0].keys() == amaxes[1].keys()
    assert any(not torch.equal(amax, amaxes[1][name]) for name, amax in amaxes[0].items())


def test_dry_run_counts_the_encoder(workshop):
    job = [*argv(workshop, "nemotron", num_steps=2), *POLICY, "--qad-dry-run"]
    output = workshop.server.run("training_jobs:train", 1, {"argv": job})
    tensors = load_file(workshop.directory / "hf_nemotron_student" / "model.safetensors")
    numel = sum(tensor.numel() for name, tensor in tensors.items() if not name.startswith("language_model."))
    assert f"vision encoder and projector       {2 * numel:>18,}" in output
    assert f"image features, if all tokens are  {2 * 64 * 32 * 8:>18,}" in output


def test_wrong_models_are_errors(workshop, tmp_path):
    d = workshop.directory
    job = argv(workshop, "llama", "--data-path", f"{d}/data_nemotron", num_steps=1)
    assert "its images have grid_rule 'closest_ratio', but the student" in workshop.fail(job)
    config = tiny_vision.CONFIGS["llama"]
    other = tiny_job.write_hf(tmp_path / "hf", config, seed=5)
    workshop.server.run(
        "training_jobs:import_checkpoints", 1, {"models": [(str(other), f"{tmp_path}/other", "float32")]}
    )
    error = workshop.fail(argv(workshop, "llama", "--qad-teacher", f"{tmp_path}/other", num_steps=1))
    assert "One vision encoder serves both models: give a teacher and a student with the same one." in error
    (tmp_path / "other" / "hf" / "passthrough.safetensors").unlink()
    same = ["--qad-teacher", f"{tmp_path}/other", "--qad-student", f"{tmp_path}/other"]
    assert "passthrough.safetensors is missing: the vision encoder" in workshop.fail(
        argv(workshop, "llama", *same, num_steps=1)
    )
    text = tiny_job.write_hf(tmp_path / "text", tiny_job.LLAMA)
    workshop.server.run(
        "training_jobs:import_checkpoints", 1, {"models": [(str(text), f"{tmp_path}/llama", "float32")]}
    )
    plain = ["--qad-teacher", f"{tmp_path}/llama", "--qad-student", f"{tmp_path}/llama"]
    assert "(LlamaForCausalLM) has no vision encoder" in workshop.fail(argv(workshop, "llama", *plain, num_steps=1))


def test_layer_by_layer_ptq_is_that_of_the_whole_model(workshop, tmp_path):
    """Amaxes and exported tensors are equal, so that the first layers have seen the images in both."""
    exports = []
    for name, flags in (("whole", ["--qad-ptq"]), ("layers", ["--qad-ptq", "--qad-ptq-sequential"])):
        flags = ["--qad-policy", "nemotron-nano-12b-v2-vl", "--save", f"{tmp_path}/{name}", "--eval-iters", "1", *flags]
        job = [*argv(workshop, "nemotron", num_steps=1), *flags]
        workshop.server.run("training_jobs:train", 1, {"argv": job})
        arguments = {"checkpoint": f"{tmp_path}/{name}", "outputs": {"modelopt": f"{tmp_path}/{name}_out"}}
        workshop.server.run("training_jobs:export_checkpoint", 1, arguments)
        exports.append(load_file(tmp_path / f"{name}_out" / "model.safetensors"))
    whole, layers = exports
    assert whole.keys() == layers.keys()
    different = [n for n in whole if not torch.equal(*(t[n].reshape(-1).view(torch.uint8) for t in (whole, layers)))]
    assert not different, different[:5]
