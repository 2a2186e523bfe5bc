"""The settings for the paper's models: each passes a dry run and has the paper's tokens and learning rate."""

import re
from pathlib import Path

import pytest
import tiny_job
import yaml

from megatron_qad.engine import init_runtime

init_runtime()
from megatron_qad.engine.run_directory import manifest  # noqa: E402
from megatron_qad.training.plan import MAX_LINES  # noqa: E402

ROOT = Path(__file__).parents[3]
RECIPES = sorted((ROOT / "examples" / "paper_models").glob("*.yaml"))
CONFIGS = ROOT / "tests" / "unit" / "quantization" / "configs"
# Tokens in billions and learning rate, from the paper's table; number of ranks, from the file's comment.
PAPER = {
    "acereason_nemotron_7b": (0.8, 1e-5, 8),
    "llama_nemotron_super_49b": (0.3, 1e-6, 32),
    "nemotron_3_nano_30b_a3b": (2.5, 1e-5, 32),
    "nemotron_nano_12b_v2_vl": (0.5, 2e-6, 8),
    "nemotron_nano_9b_v2": (6.0, 1e-6, 8),
}


def config_of(recipe: Path) -> Path:
    return CONFIGS / f"{recipe.stem.replace('_', '-')}.json"


@pytest.fixture(scope="module")
def plans(tmp_path_factory, server):
    """Output of a dry run of each recipe, which only needs the config.json of its model, and data."""
    directory, outputs = tmp_path_factory.mktemp("recipes"), {}
    tiny_job.write_data(directory / "d", vocab_size=1000)
    for recipe in RECIPES:
        checkpoint = directory / recipe.stem
        (checkpoint / "hf").mkdir(parents=True)
        (checkpoint / "hf" / "config.json").write_text(config_of(recipe).read_text())
        manifest.write_manifest(checkpoint / "hf")
        argv = ["--config", str(recipe), "--qad-teacher", str(checkpoint), "--data-path", "d", "--save", "run"]
        arguments = {"path": "pretrain_qad.py", "argv": [*argv, "--qad-dry-run"], "directory": str(directory)}
        outputs[recipe.stem] = server.run("script_jobs:script", 1, arguments | {"ranks": PAPER[recipe.stem][2]})
    return outputs


def test_each_model_of_the_paper_has_a_recipe():
    assert {recipe.stem for recipe in RECIPES} == set(PAPER)
    assert {config_of(recipe) for recipe in RECIPES} == set(CONFIGS.glob("*.json"))


@pytest.mark.parametrize("name", PAPER)
def test_recipe_equals_the_papers(plans, name):
    tokens, lr, ranks = PAPER[name]
    settings, plan = yaml.safe_load((ROOT / "examples" / "paper_models" / f"{name}.yaml").read_text()), plans[name]
    assert float(settings["lr"]) == lr and settings["qad-policy"] == name.replace("_", "-")
    trained = int(re.search(r"iterations = ([\d,]+) tokens", plan)[1].replace(",", ""))
    assert trained == pytest.approx(tokens * 1e9, rel=0.01)
    assert re.search(rf"parallelism +{ranks} ranks", plan)
    assert re.search(r"data +[\d,]+ training tokens are [\d.e+]+ epochs", plan) and "is read" in plan
    assert "end of arguments" not in plan and "INFO:" not in plan  # 750 lines of Megatron's
    # Weights, gradients and optimizer states leave a fifth of 80 GB for activations.
    assert int(re.search(r"  sum without activations +([\d,]+)", plan)[1].replace(",", "")) < 64e9


@pytest.mark.parametrize("name", PAPER)
def test_plan_fits_on_a_screen(plans, name):
    """Also that of Llama Nemotron Super, whose layers have a dozen widths."""
    lines = plans[name].strip().splitlines()
    assert len(lines) <= MAX_LINES + 4, len(lines)  # four lines about the machine precede the plan
    text = "\n".join(lines)
    assert "activations kept for backward" in text and "with Transformer Engine" in text and "GPU-hours" in text
