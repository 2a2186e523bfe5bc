"""Vision-language models: features merged into embeddings, under all parallelism, from images to an export."""

import pytest
import records
import tiny_job
import tiny_vision
import torch
from safetensors.torch import load_file, save_file
from test_training import TOLERANCE as TOLERANCE_OF_STEPS
from test_training import Workshop

# As in test_model_parity: float32 sums in another order, 3e-6 there. The features are about 1 here.
TOLERANCE = 2e-5
# Gradients of a Mamba layer's decay differ more (test_axes).
MAMBA_TOLERANCE = 3e-5


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
        error = max(abs(a["loss"]["kl loss"] / b["loss"]["kl loss"] - 1) for a, b in zip(actual, expected, strict=True))
        errors = [error, records.largest_error(actual, expected, "grads")[0]]
        print(f"{model} {data} {axis}: loss {errors[0]:.1e}, gradients {errors[1]:.1e}")
        if max(errors) > (MAMBA_TOLERANCE if model == "nemotron" else TOLERANCE_OF_STEPS):
            wrong[axis] = errors
    assert not wrong, wrong
