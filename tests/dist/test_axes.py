"""The parity matrix: every parallel axis gives the one-process run's losses and gradients, step by step.

Unquantized and in float32, so that five steps may run freely (docs/DECISIONS.md says why quantized ones may not; those
are in test_training). The jobs have a teacher that differs from the student, four microbatches a step, and documents
that count different shares of their tokens.
"""

import pytest
import records
import tiny_job
from fork_server import ForkServer
from test_training import OVERLAP, RECOMPUTE, TOLERANCE, VOCAB, Workshop

MODELS = {
    "llama": tiny_job.LLAMA,
    "qwen3": tiny_job.LLAMA | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
}
TP2 = ["--tensor-model-parallel-size", "2"]
SP = ["--sequence-parallel"]
PP2 = ["--pipeline-model-parallel-size", "2"]
PP4 = ["--pipeline-model-parallel-size", "4"]
CP2 = ["--context-parallel-size", "2"]
VIRTUAL = ["--num-virtual-stages-per-pipeline-rank", "2"]
SELECTIVE = ["--recompute-granularity", "selective", "--recompute-modules", "core_attn"]
SHARDED = ["--use-distributed-optimizer"]
PACKED = ["--dataloader-inter-document-masking", "--qad-document-multiple", "4"]
# Adam's first steps divide each gradient by itself, also those that are rounding and nothing else; with the default of
# 1e-8 tensor-parallel gradients part by 1.1e-5 at step 4.
STEADY = ["--adam-eps", "1e-5"]
# Ranks and flags. Expert parallelism has its own models: see the tests of mixtures of experts.
AXES = {
    "tp2": (2, TP2),
    "tp2 sp": (2, TP2 + SP),
    "pp2": (2, PP2),
    "pp2 virtual2": (2, PP2 + VIRTUAL),
    "cp2": (2, CP2),
    "dp2": (2, []),
    "dp2 sharded": (2, SHARDED),
    "dp2 overlapped": (2, SHARDED + OVERLAP),
    "tp2pp2": (4, TP2 + SP + PP2),
    "pp2dp2": (4, PP2),
    "tp2cp2": (4, TP2 + SP + CP2),
    "recompute": (1, RECOMPUTE),
    "recompute tp2 sp": (2, TP2 + SP + RECOMPUTE),
    "recompute selective": (1, SELECTIVE),
    "teacher microbatch": (1, ["--qad-teacher-micro-batch-size", "4"]),
}
PACKED_AXES = {
    "tp2 sp": (2, TP2 + SP),
    "cp2": (2, CP2),
    "pp4": (4, PP4),
    "pp2 virtual2": (2, PP2 + VIRTUAL),
    "tp2cp2": (4, TP2 + SP + CP2),
    "recompute selective": (1, SELECTIVE),
    "teacher microbatch cp2": (2, [*CP2, "--qad-teacher-micro-batch-size", "4"]),
}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    directory = tmp_path_factory.mktemp("axes")
    models = []
    for name, config in MODELS.items():
        for who, noise in (("teacher", 0.0), ("student", 0.3)):
            source = tiny_job.write_hf(directory / f"hf_{name}_{who}", config, noise=noise)
            models.append((str(source), f"{directory}/{name}_{who}", "float32"))
    tiny_job.write_data(directory / "data", vocab_size=VOCAB)
    with ForkServer(directory) as server:
        server.run("training_jobs:import_checkpoints", 1, {"models": models})
        yield Workshop(directory, server)


@pytest.mark.parametrize("data", ["rows", "packed"])
@pytest.mark.parametrize("model", MODELS)
def test_axes_agree(workshop, model, data):
    """Losses, gradient norms, each tensor's gradient and parameters of five steps."""
    axes, flags = (PACKED_AXES, PACKED) if data == "packed" else (AXES, [])
    argv = workshop.argv("--qad-policy", "bf16", *STEADY, *flags, kind=model, num_steps=5)
    expected, _ = workshop.train(argv)
    assert expected[0]["loss"]["kl loss"] > 0.1
    wrong = {}
    for axis, (nproc, axis_flags) in axes.items():
        is_sharded = SHARDED[0] in axis_flags
        found, _ = workshop.train(argv + axis_flags, nproc, whole=not is_sharded)
        errors = {"loss": max(_relative(a["loss"]["kl loss"], b["loss"]["kl loss"]) for a, b in zip(found, expected, strict=True))}
        errors["grad_norm"] = max(_relative(a["grad_norm"], b["grad_norm"]) for a, b in zip(found, expected, strict=True))
        # Of a distributed optimizer's gradients a rank holds a part, and of an overlapped gather's parameters, too.
        whole = () if is_sharded else ("grads", "params")
        for what in whole:
            error, where = records.largest_error(found, expected, what)
            errors[f"{what} ({where})"] = error
        print(f"{model} {data} {axis}: " + ", ".join(f"{name} {error:.1e}" for name, error in errors.items()))
        if max(errors.values()) > TOLERANCE:
            wrong[axis] = errors
    assert not wrong, wrong


def _relative(found: float, expected: float) -> float:
    return abs(found / expected - 1)
