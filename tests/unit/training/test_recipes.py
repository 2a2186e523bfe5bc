"""The recipes of examples/recipes: dry run, memory by the planner, published tokens and learning rates, the table."""

import importlib.util
import re
from pathlib import Path

import pytest
import tiny_job

from megatron_qad.engine import init_runtime

init_runtime()
from megatron_qad.engine.run_directory import manifest  # noqa: E402
from megatron_qad.planning.memory import ACTIVATIONS  # noqa: E402
from megatron_qad.training.plan import MAX_LINES  # noqa: E402

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "examples" / "recipes"
spec = importlib.util.spec_from_file_location("recipe_table", FOLDER / "table.py")
table = importlib.util.module_from_spec(spec)
spec.loader.exec_module(table)

RECIPES = {f"{file.parent.name}/{file.stem}": file for file in table.recipes()}
# Tokens in billions, learning rate and final learning rate (None: not published); the paper's table first, then the
# sources that the files name. Qwen3-30B-A3B: no run is published, so its tokens are ours.
PUBLISHED = {
    "acereason_nemotron_7b": (0.8, 1e-5, None),
    "llama_nemotron_super_49b": (0.3, 1e-6, None),
    "nemotron_3_nano_30b_a3b": (2.5, 1e-5, None),
    "nemotron_nano_12b_v2_vl": (0.5, 2e-6, None),
    "nemotron_nano_9b_v2": (6.0, 1e-6, None),
    "nemotron_3_super_120b_a12b": (5.0, 1e-5, None),
    "nemotron_3_5_lightning_30b_a3b": (0.419, 2e-5, 5e-6),
    "qwen3_8b": (6.29, 1e-5, 5e-6),
    "qwen3_30b_a3b": (1.05, 1e-5, 1e-6),
}


@pytest.fixture(scope="module")
def dry_runs(tmp_path_factory, server):
    """``dry_runs(name)``: output of a recipe's dry run, which needs only the config.json of its model, and data."""
    directory = tmp_path_factory.mktemp("recipes")
    tiny_job.write_data(directory / "d", vocab_size=1000)
    for folder in table.MODELS:
        (directory / folder / "hf").mkdir(parents=True)
        (directory / folder / "hf" / "config.json").write_text(table.config_of(folder).read_text())
        manifest.write_manifest(directory / folder / "hf")

    def dry_run(name: str) -> str:
        file = RECIPES[name]
        files = (FOLDER / "common.yaml", file.parent / "training.yaml", file)
        argv = [word for path in files for word in ("--config", str(path))]
        argv += ["--qad-teacher", file.parent.name, "--train-data-path", "d", "--valid-data-path", "d", "--save", "run"]
        arguments = {"path": "pretrain_qad.py", "argv": [*argv, "--qad-dry-run"], "directory": str(directory)}
        return server.run("script_jobs:script", 1, arguments | {"ranks": table.num_gpus(file)}, timeout=600)

    return dry_run


def test_every_model_has_a_recipe_for_the_fewest_gpus_and_for_many():
    assert set(PUBLISHED) == set(table.MODELS) == {file.parent.name for file in FOLDER.glob("*/training.yaml")}
    for folder in PUBLISHED:
        sizes = sorted(table.num_gpus(file) for file in RECIPES.values() if file.parent.name == folder)
        assert sizes in ([8, 32], [16, 32], [48, 64]), (folder, sizes)


@pytest.mark.parametrize("folder", PUBLISHED)
def test_training_has_the_published_tokens_and_learning_rate(folder):
    tokens, lr, min_lr = PUBLISHED[folder]
    settings = table.settings_of(FOLDER / folder / "training.yaml")
    assert table.num_tokens(settings) == pytest.approx(tokens * 1e9, rel=0.01)
    assert settings["lr"] == lr and settings["min-lr"] == pytest.approx(min_lr or lr / 10)
    assert settings["save-interval"] % settings["eval-interval"] == 0  # --qad-keep-best validates what it keeps
    assert settings["train-iters"] >= 10 * settings["save-interval"]  # ten checkpoints to choose from


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_fits_by_the_planner(name):
    proposal = table.plan(RECIPES[name])
    assert proposal.bytes <= table.GPU_MEMORY * (1 - table.RESERVE)
    assert proposal.layout.world_size == table.num_gpus(RECIPES[name])


# make test runs the dry run of the smallest recipe of each model but Super, whose 41,000 linears take a minute or more.
SMALLEST = {file.parent.name: name for name, file in reversed(RECIPES.items()) if "super_120b" not in name}.values()


@pytest.mark.parametrize("name", [n if n in SMALLEST else pytest.param(n, marks=pytest.mark.all) for n in RECIPES])
def test_dry_run_has_the_planners_bytes(dry_runs, name):
    proposal, text = table.plan(RECIPES[name]), dry_runs(name)
    assert re.search(rf"parallelism +{table.num_gpus(RECIPES[name])} ranks", text)
    assert f"policy {table.settings_of(RECIPES[name])['qad-policy']}" in text
    # The dry run on a CPU counts local layers, and names the bytes with Transformer Engine, which the planner counts.
    rows = {key: int(value.replace(",", "")) for key, value in re.findall(r"^  (\w.*?) +([\d,]+)$", text, re.MULTILINE)}
    with_te = re.search(r"with Transformer Engine ([\d,]+)", text)[1]
    assert int(with_te.replace(",", "")) == proposal.rows[ACTIVATIONS]
    assert rows["sum without activations"] == proposal.bytes - proposal.rows[ACTIVATIONS]
    assert re.search(r"data +[\d,]+ training tokens are [\d.e+]+ epochs", text) and "is read" in text
    assert "end of arguments" not in text and "INFO:" not in text  # 750 lines of Megatron's
    assert len(text.strip().splitlines()) <= MAX_LINES + 4  # four lines about the machine precede the plan


def test_readme_has_the_planners_tables():
    """After a change: ``python examples/recipes/table.py`` prints the tables to copy."""
    text = (FOLDER / "README.md").read_text()
    for part in (table.model_table(), table.recipe_table(list(RECIPES.values())), table.assumptions()):
        assert part in text, part
