"""Parity of all parallel axes: losses and gradients equal those of one process, step by step.

The jobs are unquantized and in float32, so that five steps can run without realignment (docs/decisions/parallelism.md
says why quantized steps cannot; test_training has those). They have a teacher that differs from the student, four
microbatches per step, and documents with different shares of counted tokens."""

import pytest
import records
import tiny_hybrids
import tiny_job
import torch
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
PACKED = ["--dataloader-inter-document-masking", "--qad-pad-documents-to", "4"]
# Adam's first steps divide each gradient by its own size, even if it is only rounding noise; with the default epsilon
# of 1e-8 tensor-parallel gradients differ by 1.1e-5 at step 4.
STEADY = ["--adam-eps", "1e-5"]
# Ranks and flags.
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
    "pp2 virtual2 dp2 overlapped": (4, PP2 + VIRTUAL + SHARDED + OVERLAP),
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
EP2 = ["--expert-model-parallel-size", "2"]
# The gradient of a Mamba layer's decay (A_log, dt_bias) is a small sum of large terms: it differs by up to 1.2e-5 here.
MAMBA_TOLERANCE = 3e-5
HYBRIDS = {
    "qwen3-moe": tiny_hybrids.QWEN3_MOE,
    "nemotron-h": tiny_hybrids.NEMOTRON_H,
    "nemotron-nas": tiny_hybrids.NEMOTRON_NAS,
}
HYBRID_AXES = {
    "qwen3-moe": {
        "ep2": (2, EP2),
        "ep2 sharded": (2, EP2 + SHARDED),
        "tp2ep2": (4, TP2 + SP + EP2),
        "tp2ep2, unsharded experts": (4, [*TP2, *SP, *EP2, "--expert-tensor-parallel-size", "1"]),
        "pp2 virtual2": (2, PP2 + VIRTUAL),
    },
    "nemotron-h": {
        "tp2ep2": (4, TP2 + SP + EP2),
        "cp2": (2, CP2),
        "pp2ep2": (4, PP2 + EP2),
        "recompute ep2": (2, RECOMPUTE + EP2),
        "teacher microbatch": (1, ["--qad-teacher-micro-batch-size", "4"]),
        "offloaded teacher": (1, ["--qad-teacher-cpu-offload"]),
    },
    "nemotron-nas": {
        "tp2 sp": (2, TP2 + SP),
        "pp2 virtual2": (2, PP2 + VIRTUAL),
        "offloaded teacher": (1, ["--qad-teacher-cpu-offload"]),
    },
}


# Teachers with the vocabulary of the llama student: one deeper, wider and with other heads; one with fewer layers than
# two ranks have virtual stages.
TEACHERS = {
    "large": tiny_job.LLAMA | {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 6, "head_dim": 32},
    "shallow": tiny_job.LLAMA | {"num_hidden_layers": 1, "intermediate_size": 160},
}
# Four key-value heads and 64 blocks of the MLP, so that TP 4 is possible.
WIDE = tiny_job.LLAMA | {"num_key_value_heads": 4, "intermediate_size": 128}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory, server):
    directory = tmp_path_factory.mktemp("axes")
    models = []
    for name, config in TEACHERS.items():
        source = tiny_job.write_hf(directory / f"hf_{name}", config)
        models.append((str(source), f"{directory}/{name}", "float32"))
    for name, config in (MODELS | {"wide": WIDE} | HYBRIDS).items():
        for role, noise in (("teacher", 0.0), ("student", 0.3)):
            source = tiny_job.write_hf(directory / f"hf_{name}_{role}", config, noise=noise)
            models.append((str(source), f"{directory}/{name}_{role}", "float32"))
    tiny_job.write_data(directory / "data", vocab_size=VOCAB)
    server.run("training_jobs:import_checkpoints", 1, {"models": models})
    return Workshop(directory, server)


@pytest.mark.parametrize("data", ["rows", "packed"])
def test_axes_agree(workshop, data):
    """Losses, gradient norms, gradients and parameters of five steps are equal."""
    axes, flags = (PACKED_AXES, PACKED) if data == "packed" else (AXES, [])
    _assert_axes_agree(workshop, "llama", axes, flags)


@pytest.mark.parametrize("data", ["rows", "packed"])
def test_axes_agree_with_query_and_key_norms(workshop, data):
    """Qwen3 has norms whose gradient is a sum over the heads of all tensor-parallel ranks and the tokens of all
    context-parallel and data-parallel ranks."""
    axes, flags = (PACKED_AXES, PACKED) if data == "packed" else (AXES, [])
    subset = {name: axes[name] for name in ("tp2", "tp2 sp", "tp2pp2", "tp2cp2", "dp2 sharded") if name in axes}
    _assert_axes_agree(workshop, "qwen3", subset, flags)


@pytest.mark.parametrize("model", HYBRIDS)
def test_axes_of_hybrids_agree(workshop, model):
    """Expert parallelism, alone and with other axes, with a trained router."""
    _assert_axes_agree(workshop, model, HYBRID_AXES[model], ["--qad-train-router"])


def test_packed_rows_of_a_hybrid_agree(workshop):
    axes = {"tp2ep2": (4, TP2 + SP + EP2), "pp2": (2, PP2), "cp2": (2, CP2), "tp2cp2": (4, TP2 + SP + CP2)}
    _assert_axes_agree(workshop, "nemotron-h", axes, PACKED)


def _assert_axes_agree(workshop, model: str, axes: dict, flags: list[str]) -> None:
    argv = workshop.argv("--qad-policy", "bf16", *STEADY, *flags, kind=model, num_steps=5)
    expected, _ = workshop.train(argv)
    assert expected[0]["loss"]["kl loss"] > 0.1
    pattern, wrong = HYBRIDS.get(model, {}).get("hybrid_override_pattern", ""), {}
    for axis, (nproc, axis_flags) in axes.items():
        is_sharded = SHARDED[0] in axis_flags
        actual, _ = workshop.train(argv + axis_flags, nproc, whole=not is_sharded)
        errors = {
            "loss": max(
                _relative(a["loss"]["kl loss"], b["loss"]["kl loss"]) for a, b in zip(actual, expected, strict=True)
            )
        }
        errors["grad_norm"] = max(
            _relative(a["grad_norm"], b["grad_norm"]) for a, b in zip(actual, expected, strict=True)
        )
        # With a distributed optimizer, a rank holds only shards of the gradients and, with overlap, of the parameters.
        compared = () if is_sharded else ("grads", "params")
        for what in compared:
            error, where = records.largest_error(actual, expected, what)
            errors[f"{what} ({where})"] = error
        print(f"{model} {axis}: " + ", ".join(f"{name} {error:.1e}" for name, error in errors.items()))
        if max(errors.values()) > (TOLERANCE if "M" not in pattern else MAMBA_TOLERANCE):
            wrong[axis] = errors
    assert not wrong, wrong


def _relative(actual: float, expected: float) -> float:
    return abs(actual / expected - 1)


def test_packed_documents_do_not_affect_each_other(workshop, tmp_path):
    """Logits of each document in a packed row equal those of the single document: attention and positions restart."""
    result = str(tmp_path / "packed.pt")
    arguments = {"checkpoint": f"{workshop.directory}/llama_teacher", "lengths": [12, 5, 1, 14], "result": result}
    workshop.server.run("axes_jobs:packed_logits", 1, arguments)
    actual = torch.load(result)
    assert actual["spread"] > 0.3
    assert max(actual["errors"]) < 1e-5, actual  # float32 sums of other lengths; a leak or a wrong position gives 1e-1


TEACHER_AXES = {"tp2pp2": (4, TP2 + SP + PP2), "pp2 virtual2": (2, PP2 + VIRTUAL), "cp2": (2, CP2)}


@pytest.mark.parametrize("teacher", TEACHERS)
def test_axes_agree_with_a_different_teacher(workshop, teacher):
    """The teacher has another depth, width, number of heads and number of stages than the student."""
    argv = workshop.argv("--qad-policy", "bf16", *STEADY, kind="llama", num_steps=2)
    argv += ["--qad-teacher", f"{workshop.directory}/{teacher}"]
    expected, _ = workshop.train(argv)
    assert expected[0]["loss"]["kl loss"] > 0.1
    for axis, (nproc, flags) in TEACHER_AXES.items():
        actual, _ = workshop.train(argv + flags, nproc)
        errors = [_relative(a["loss"]["kl loss"], b["loss"]["kl loss"]) for a, b in zip(actual, expected, strict=True)]
        errors.append(records.largest_error(actual, expected, "grads")[0])
        assert max(errors) <= TOLERANCE, (axis, errors)


@pytest.mark.parametrize("parallelism", ["one rank", "pp2 virtual2"])
def test_teacher_is_not_trained_and_its_logits_are_freed(workshop, tmp_path, parallelism):
    """No wrapper, optimizer, gradient buffer or checkpoint holds a teacher parameter. Logits are freed after use."""
    nproc, flags = {"one rank": (1, []), "pp2 virtual2": (2, PP2 + VIRTUAL)}[parallelism]
    argv = workshop.argv(*("--bf16", *SHARDED, "--qad-policy", "bf16", *flags), kind="llama", num_steps=1)
    argv += ["--qad-teacher", f"{workshop.directory}/large", "--save", str(tmp_path / "run")]
    argv += ["--qad-teacher-micro-batch-size", "4"] if nproc == 1 else []
    workshop.server.run("axes_jobs:watch_teacher", nproc, {"argv": argv, "result": str(tmp_path / "seen")})
    ranks = [torch.load(tmp_path / f"seen.rank{rank}") for rank in range(nproc)]
    for rank in ranks:
        assert rank["num_parameters"] > 5
        assert rank["num_teacher_params"] == {"trained": 0, "wrapped": 0, "optimizer": 0, "buffers": 0}
    if nproc == 1:
        assert ranks[0]["alive"][-4:] == [4, 3, 2, 1]
    from megatron_qad.models.weight_loading import stored_shapes

    widths = {size for shape in stored_shapes(tmp_path / "run").values() for size in shape}
    assert 64 in widths and 96 not in {shape[-1] for n, shape in stored_shapes(tmp_path / "run").items() if "norm" in n}


RESHARDED = [
    ("tp2pp2", 4, TP2 + SP + PP2),
    ("pp4", 4, PP4),
    ("tp4", 4, ["--tensor-model-parallel-size", "4"]),
    ("pp2 virtual2", 2, PP2 + VIRTUAL),
    ("cp2", 2, CP2),
]


# A distributed optimizer with experts has a state of its own for them.
EXPERTS_RESHARDED = [("dp2", 2, []), ("tp2", 2, TP2 + SP), ("pp2", 2, PP2)]
# Model, flags, tolerance of the loss, and the parallelism of each step. NVFP4: the last bit may decide the code of an
# input (test_training). BF16: partial sums of tensor-parallel ranks are rounded to 8 bits, which changes the loss by
# 4e-4 here.
RESUMED = {
    "float32": ("wide", ["--qad-policy", "bf16"], TOLERANCE, RESHARDED),
    "nvfp4": ("wide", ["--qad-policy", "nvfp4-all-linear"], 0.02, RESHARDED),
    "distributed optimizer": ("wide", ["--qad-policy", "bf16", "--bf16", *SHARDED], 2e-3, RESHARDED),
    "experts": ("qwen3-moe", ["--qad-policy", "bf16", "--bf16", *SHARDED], 2e-3, EXPERTS_RESHARDED),
}


@pytest.mark.parametrize("case", RESUMED)
def test_checkpoint_resumes_with_other_parallelism(workshop, tmp_path, case):
    """Each step resumes with other parallelism; the losses equal those of an uninterrupted run on one process."""
    kind, flags, tolerance, resharded = RESUMED[case]
    argv = workshop.argv(*flags, *STEADY, kind=kind, num_steps=len(resharded))
    expected, _ = workshop.train(argv, whole=False)
    amaxes: dict = {}
    for i, (name, nproc, parallelism) in enumerate(resharded):
        saving = ["--save", str(tmp_path), "--save-interval", "1", "--exit-interval", str(i + 1)]
        loading = ["--load", str(tmp_path)] if i else []
        (step,), _ = workshop.train([*argv, *parallelism, *saving, *loading], nproc, whole=False)
        error = _relative(step["loss"]["kl loss"], expected[i]["loss"]["kl loss"])
        print(f"{case} {name}: step {i + 1}, loss {error:.1e}")
        assert error <= tolerance, name
        assert bool(step["amaxes"]) == (case == "nvfp4")
        assert all(torch.equal(amax, amaxes.get(n, amax)) for n, amax in step["amaxes"].items())
        amaxes |= step["amaxes"]


@pytest.mark.parametrize("kind", ["wide", "qwen3-moe"])
def test_checkpoint_of_a_fixed_division_names_the_flag(workshop, tmp_path, kind):
    """Without its default, the optimizer state loads with the same division only."""
    argv = workshop.argv("--qad-policy", "bf16", "--bf16", *SHARDED, "--save", str(tmp_path), kind=kind, num_steps=1)
    workshop.train([*argv, "--no-dist-ckpt-optim-fully-reshardable"], 2, whole=False)
    error = workshop.fail([*argv, *TP2, *SP], 2)
    assert error.startswith(f"error: --tensor-model-parallel-size 2: {tmp_path}/iter_0000001 was saved with 1 and ")
    assert "without --dist-ckpt-optim-fully-reshardable" in error and "--no-load-optim" in error


def test_optimizer_of_experts_stays_separate_or_not(workshop, tmp_path):
    """Megatron gives the experts an optimizer of their own with expert parallelism, and does not convert the state."""
    argv = workshop.argv("--qad-policy", "bf16", "--bf16", "--save", str(tmp_path), kind="qwen3-moe", num_steps=1)
    workshop.train([*argv, *SHARDED], whole=False)
    error = workshop.fail([*argv, *SHARDED, *EP2], 2)
    assert error.startswith(f"error: --expert-model-parallel-size 2: {tmp_path}/iter_0000001 was saved with 1.")
    workshop.train([*argv, *SHARDED, *EP2, "--no-load-optim"], 2, whole=False)


OFFLOADED = {
    "one rank": (1, []),
    "tp2pp2": (4, TP2 + SP + PP2),
    "pp2 virtual2": (2, PP2 + VIRTUAL),
    "packed": (2, CP2 + PACKED),
}


@pytest.mark.parametrize("axis", OFFLOADED)
def test_offloaded_teacher_gives_equal_results(workshop, tmp_path, axis):
    """Losses and gradients are equal bit for bit. Each layer is copied once per step, for all microbatches."""
    nproc, flags = OFFLOADED[axis]
    argv = workshop.argv("--qad-policy", "bf16", *flags, kind="llama", num_steps=2)
    argv += ["--qad-teacher", f"{workshop.directory}/large"]
    expected, _ = workshop.train(argv, nproc)
    actual, _ = workshop.train([*argv, "--qad-teacher-cpu-offload"], nproc)
    for a, b in zip(actual, expected, strict=True):
        assert a["loss"] == b["loss"]
        assert all(torch.equal(a["grads"][name], b["grads"][name]) for name in b["grads"])
    if nproc == 1:
        arguments = {"argv": [*argv, "--qad-teacher-cpu-offload"], "result": str(tmp_path / "seen")}
        workshop.server.run("axes_jobs:watch_teacher", 1, arguments)
        assert torch.load(tmp_path / "seen.rank0")["fetched"] == 2 * 6


# Ranks, flags and error.
REJECTED = [
    (
        2,
        ["--tensor-model-parallel-size", "3"],
        "does not divide the attention heads (4); possible for the student: 1, 2",
    ),
    (2, [*TP2, *PP2], "TP 2 x PP 2 x CP 1 needs a multiple of 4 ranks; this job has 2"),
    (
        1,
        ["--pipeline-model-parallel-size", "5"],
        "5 pipeline stages x 1 virtual stages for 4 layers (*-*-) of the student",
    ),
    (2, [*PP2, "--num-virtual-stages-per-pipeline-rank", "3"], "2 pipeline stages x 3 virtual stages for 4 layers"),
    (
        2,
        [*PP2, *VIRTUAL, "--global-batch-size", "6"],
        "number of microbatches that is divisible by PP 2; this job has 3",
    ),
    (1, VIRTUAL, "virtual-stages-per-pipeline-rank 2 without pipeline parallelism"),
    (2, [*CP2, "--seq-length", "30"], "--seq-length 30 is not a multiple of 4, twice --context-parallel-size 2"),
    (2, ["--global-batch-size", "6"], "--global-batch-size 6 is not a multiple of 4, --micro-batch-size 2 x DP 2"),
    (1, ["--qad-teacher-micro-batch-size", "3"], "--qad-teacher-micro-batch-size 3 must be a multiple of"),
    (
        2,
        [*CP2, PACKED[0], "--qad-pad-documents-to", "2"],
        "--qad-pad-documents-to 2 must divide --seq-length 32 and be a multiple of 4",
    ),
]


def test_impossible_parallelism_is_rejected(workshop):
    for nproc, flags, message in REJECTED:
        error = workshop.fail(workshop.argv(*flags, kind="llama"), nproc)
        assert message in error and f"Parallelism that would work on {nproc} rank" in error, error
    # The teacher is also checked before the student is built.
    error = workshop.fail(workshop.argv(*TP2, *PP4, "--qad-teacher", f"{workshop.directory}/shallow", kind="llama"), 8)
    assert "4 pipeline stages x 1 virtual stages for 2 layers (*-) of the teacher" in error
