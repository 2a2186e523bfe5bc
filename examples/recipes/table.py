"""Prints the tables of README.md, with memory and hours from the planner.

    python examples/recipes/table.py [MODEL/FILE.yaml ...]

It runs in a checkout of the project: the shapes are the config.json files of the tests.
"""

import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import yaml

from megatron_qad.engine import init_runtime

HERE = Path(__file__).parent
CONFIGS = HERE.parents[1] / "tests" / "unit" / "quantization"
GPU_MEMORY, RESERVE = 80e9, 0.15
PAPER = "[paper](https://arxiv.org/abs/2601.20088)"
NEMOTRON = "NVIDIA-NeMo/Nemotron"
MODELS = {
    "acereason_nemotron_7b": ("acereason-nemotron-7b", "head", PAPER),
    "nemotron_nano_9b_v2": ("nemotron-nano-9b-v2", "attention, first 2 and last 2 layers, head", PAPER),
    "nemotron_nano_12b_v2_vl": ("nemotron-nano-12b-v2-vl", "vision encoder, head", PAPER),
    "nemotron_3_nano_30b_a3b": ("nemotron-3-nano-30b-a3b", "attention, the Mamba layer before each, head", PAPER),
    "llama_nemotron_super_49b": ("llama-nemotron-super-49b", "head", PAPER),
    "nemotron_3_super_120b_a12b": (
        "nemotron-3-super-120b-a12b",
        "attention, latent projections, head, MTP; FP8: Mamba, shared experts",
        f"{NEMOTRON}, docs/nemotron/super3",
    ),
    "nemotron_3_5_lightning_30b_a3b": (
        "nemotron-3.5-lightning-30b-a3b",
        "attention, MTP; FP8: Mamba; unquantized inputs: experts, head",
        f"{NEMOTRON}, docs/nemotron/lightning35",
    ),
    "qwen3_8b": ("qwen3-8b", "head", "NVIDIA/Model-Optimizer, examples/megatron_bridge"),
    "qwen3_30b_a3b": ("qwen3-30b-a3b", "head", "learning rate and length: modelopt's default; tokens: our choice"),
}
"""Folder -> name of the config.json, linears that stay in BF16, source of tokens and learning rate."""


def settings_of(recipe: Path) -> dict:
    """Return the options of a recipe, from its three files."""
    files = (HERE / "common.yaml", recipe.parent / "training.yaml", recipe)
    return {key: value for file in files for key, value in yaml.safe_load(file.read_text()).items()}


def recipes() -> list[Path]:
    """Return the files of all recipes, in the order of the table, small jobs first."""
    return [
        file
        for folder in MODELS
        for file in sorted({*(HERE / folder).glob("*.yaml")} - {HERE / folder / "training.yaml"}, key=num_gpus)
    ]


def num_gpus(recipe: Path) -> int:
    """Return the number of GPUs, which the name says: 8x80gb.yaml or 4_nodes.yaml."""
    return 8 if recipe.stem == "8x80gb" else 8 * int(recipe.stem.removesuffix("_nodes"))


def config_of(folder: str) -> Path:
    """Return the config.json of a model."""
    return next(CONFIGS.glob(f"configs*/{MODELS[folder][0]}.json"))


def num_tokens(settings: dict) -> int:
    return settings["train-iters"] * settings["global-batch-size"] * settings["seq-length"]


@cache
def job_of(folder: str, policy: str):
    """Return what the planner needs to know about the job of a model, on GPUs with Transformer Engine."""
    from megatron_qad.planning.activations import kernels_of
    from megatron_qad.planning.proposal_tables import read_job

    return read_job(str(config_of(folder)), None, policy, [], kernels_of("te", on_gpu=True))


@cache
def plan(recipe: Path):
    """Return the planner's proposal for a recipe: its layout, bytes and time."""
    from megatron_qad.planning.layout import Layout
    from megatron_qad.planning.proposal_tables import LOSSES
    from megatron_qad.planning.proposals import Planner, Request

    settings, gpus = settings_of(recipe), num_gpus(recipe)
    job = job_of(recipe.parent.name, settings["qad-policy"])
    if settings.get("qad-teacher-cpu-offload"):
        job = replace(job, offloads_teacher=True)
    tp, pp = settings.get("tensor-model-parallel-size", 1), settings.get("pipeline-model-parallel-size", 1)
    cp = settings.get("context-parallel-size", 1)
    request = Request(gpus, GPU_MEMORY * (1 - RESERVE), settings["seq-length"], settings["global-batch-size"])
    layout = Layout(
        tp=tp,
        pp=pp,
        vpp=settings.get("num-virtual-stages-per-pipeline-rank", 1),
        cp=cp,
        ep=settings.get("expert-model-parallel-size", 1),
        etp=settings.get("expert-tensor-parallel-size", tp),
        dp=gpus // (tp * pp * cp),
        sequence_parallel=settings.get("sequence-parallel", False),
        seq_length=request.seq_length,
        micro_batch_size=settings["micro-batch-size"],
        global_batch_size=request.global_batch_size,
        recompute=settings.get("recompute-granularity", "none"),
        distributed_optimizer=settings["use-distributed-optimizer"],
        gradient_bytes=4,  # Megatron's default with BF16
    )
    return Planner(job, LOSSES, request, machine()[1]).evaluate(job, layout)


def machine():
    """Return the chip and the rates that the hours assume."""
    from megatron_qad.planning.step_time import Machine
    from megatron_qad.planning.time_lines import DEFAULT_CHIP

    return DEFAULT_CHIP, Machine(DEFAULT_CHIP.peak)


def model_table() -> str:
    """Return the table of models."""
    lines = ["| model | policy | stays in BF16 | tokens | learning rate | sequences x length | source |"]
    lines.append("|---|---|---|---:|---:|---:|---|")
    for folder, (_, kept, source) in MODELS.items():
        s = settings_of(HERE / folder / "training.yaml")
        lines.append(
            f"| `{folder}` | `{s['qad-policy']}` | {kept} | {num_tokens(s) / 1e9:.1f} B | {float(s['lr']):.0e} to "
            f"{float(s['min-lr']):.0e} | {s['global-batch-size']} x {s['seq-length']} | {source} |".replace("e-0", "e-")
        )
    return "\n".join(lines)


def recipe_table(files: list[Path]) -> str:
    """Return the table of recipes: parallelism, bytes and hours."""
    from megatron_qad.planning.memory import ACTIVATIONS
    from megatron_qad.planning.proposal_tables import describe

    lines = ["| recipe | GPUs | layout | GB a GPU | of it activations | hours | GPU-hours |"]
    lines.append("|---|---:|---|---:|---:|---:|---:|")
    for file in files:
        proposal = plan(file)
        hours = num_tokens(settings_of(file)) / proposal.tokens_per_second / 3600
        layout = describe(proposal.layout, bool(proposal.job.student.args.get("num-experts")))
        layout += ", teacher in host memory" if proposal.job.offloads_teacher else ""
        lines.append(
            f"| `{file.parent.name}/{file.name}` | {num_gpus(file)} | {layout} | {proposal.bytes / 1e9:.1f} | "
            f"{proposal.rows[ACTIVATIONS] / 1e9:.1f} | {hours:,.1f} | {hours * num_gpus(file):,.0f} |"
        )
    return "\n".join(lines)


def assumptions() -> str:
    """Return the chip and MFU of the hours."""
    from megatron_qad.planning.time_lines import describe_machine

    return f"Hours assume {describe_machine(*machine())}."


def main() -> None:
    init_runtime()
    files = [HERE / name for name in sys.argv[1:]] or recipes()
    print(model_table(), recipe_table(files), assumptions(), sep="\n\n")


if __name__ == "__main__":
    main()
