"""The planner's formulas for activations equal the bytes that autograd keeps in a step of the local layers, in BF16."""

import json

import pytest
import tiny_job
from tiny_hybrids import NEMOTRON_H, QWEN3_MOE

WIDE = {"hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 128}
MODELS = {
    "dense": tiny_job.LLAMA | WIDE | {"num_hidden_layers": 4, "intermediate_size": 256},
    "hybrid": NEMOTRON_H
    | WIDE
    | {"hybrid_override_pattern": "ME*-ME*-", "num_hidden_layers": 8, "moe_intermediate_size": 64},
    "experts": QWEN3_MOE | WIDE | {"num_hidden_layers": 2, "num_experts_per_tok": 3, "mlp_only_layers": [1]},
    "latent": NEMOTRON_H | WIDE | {"hybrid_override_pattern": "EE", "num_hidden_layers": 2, "moe_latent_size": 64},
}
SEQ_LENGTH = 256
DOCUMENTS = [96, 96, 64]
"""Lengths of the documents in a packed row."""
TP2 = ["--tensor-model-parallel-size", "2"]
SP = ["--sequence-parallel"]
PP2 = ["--pipeline-model-parallel-size", "2"]
VPP2 = [*PP2, "--num-virtual-stages-per-pipeline-rank", "2"]
CP2 = ["--context-parallel-size", "2"]
EP2 = ["--expert-model-parallel-size", "2"]
PACKED = ["--dataloader-inter-document-masking"]
SELECTIVE = ["--recompute-granularity", "selective"]
FULL = ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]
PAIRS = ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "2"]
BLOCK = ["--recompute-granularity", "full", "--recompute-method", "block", "--recompute-num-layers", "2"]
LAYOUTS = {
    # Ranks, model, flags. Ranks that the flags leave over are data-parallel.
    "one rank": (1, "dense", []),
    "bf16": (1, "dense", ["--qad-policy", "bf16"]),
    "kv cache": (1, "dense", ["--qad-policy-override", "kv_cache=fp8"]),
    "tp": (2, "dense", TP2),
    "tp sp": (2, "dense", TP2 + SP),
    "pp": (2, "dense", PP2),
    "vpp": (2, "dense", VPP2),
    "cp": (2, "dense", CP2),
    "cp selective": (2, "dense", CP2 + SELECTIVE),
    "packed": (1, "dense", PACKED),
    "packed cp": (2, "dense", PACKED + CP2),
    "full": (1, "dense", FULL),
    "full of two, tp sp": (2, "dense", PAIRS + TP2 + SP),
    "block, pp": (2, "dense", BLOCK + PP2),
    "experts, ep tp sp": (2, "experts", EP2 + TP2 + SP + ["--expert-tensor-parallel-size", "1"]),
    "experts, expert tp": (2, "experts", TP2 + SP),
    "latent experts, ep": (2, "latent", EP2),
    "hybrid": (1, "hybrid", []),
    "hybrid, cp": (2, "hybrid", CP2),
    "hybrid, ep packed": (2, "hybrid", EP2 + PACKED),
    "hybrid, vpp full": (2, "hybrid", VPP2 + FULL),
    "hybrid, ep pp tp sp": (4, "hybrid", EP2 + PP2 + TP2 + SP + ["--expert-tensor-parallel-size", "1"]),
    "pp cp": (4, "dense", PP2 + CP2),
}
TOLERANCE = 0.1
"""The issue's. Most layouts are within 0.1 %; routing is not balanced, and the scan's first chunk keeps less."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, server):
    directory = tmp_path_factory.mktemp("activations")
    for name, config in MODELS.items():
        tiny_job.write_hf(directory / f"hf_{name}", config | {"max_position_embeddings": 512})
    models = [(f"{directory}/hf_{name}", f"{directory}/{name}", "bfloat16") for name in MODELS]
    server.run("training_jobs:import_checkpoints", 1, {"models": models})
    return directory


def measure(server, directory, rows_of: dict[str, int]) -> dict[str, list[list[int]]]:
    """Return [counted, predicted] bytes of each rank, by layout, with microbatches of these numbers of rows."""
    results = {}
    for world in (1, 2, 4):
        chosen = {name: (model, flags) for name, (n, model, flags) in LAYOUTS.items() if n == world and name in rows_of}
        cases = []
        for name, (model, flags) in chosen.items():
            rows = rows_of[name]
            batch = ["--micro-batch-size", f"{rows}", "--global-batch-size", f"{4 * rows}"]
            case = {
                "checkpoint": f"{directory}/{model}",
                "flags": ["--bf16", "--seq-length", f"{SEQ_LENGTH}", *batch, *flags],
            }
            cases.append(case | ({"lengths": DOCUMENTS} if "--dataloader-inter-document-masking" in flags else {}))
        if cases:
            result = str(directory / f"bytes_{world}.json")
            server.run("activation_jobs:measure", world, {"cases": cases, "result": result}, timeout=1500)
            results |= dict(zip(chosen, json.loads(open(result).read()), strict=True))
    return results


@pytest.fixture(scope="module")
def small(checkpoints, server):
    return measure(server, checkpoints, dict.fromkeys(LAYOUTS, 2))


def check(ranks: list[list[int]]) -> None:
    for rank, (counted, predicted) in enumerate(ranks):
        megabytes = f"counted {counted / 1e6:.2f} MB, predicted {predicted / 1e6:.2f} MB"
        print(f"rank {rank}: {megabytes}, {predicted / counted:.3f}")
    for counted, predicted in ranks:
        assert predicted == pytest.approx(counted, rel=TOLERANCE)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_saved_bytes(small, layout):
    check(small[layout])


@pytest.mark.all
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gigabyte_of_saved_bytes(small, checkpoints, server, layout):
    """With as many rows as one rank needs to keep a gigabyte. The bytes grow with the rows."""
    largest = max(counted for counted, _ in small[layout])
    (ranks,) = measure(server, checkpoints, {layout: 2 * -(-1_100_000_000 // largest)}).values()
    assert max(counted for counted, _ in ranks) >= 1e9
    check(ranks)
