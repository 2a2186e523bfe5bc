"""The parity matrix: every parallel axis gives the one-process run's losses and gradients, step by step.

Unquantized and in float32, so that five steps may run freely (docs/decisions/parallelism.md says why quantized ones may
not; those are in test_training). The jobs have a teacher that differs from the student, four microbatches a step, and
documents that count different shares of their tokens.
"""

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
# Adam's first steps divide each gradient by itself, also those that are rounding and nothing else; with the default of
# 1e-8 tensor-parallel gradients part by 1.1e-5 at step 4.
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
# Of a Mamba layer's decay (A_log, dt_bias) the gradient is a small sum of large terms: 1.2e-5 at most here.
OF_MAMBA = 3e-5
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
        "tp2ep2, experts whole": (4, [*TP2, *SP, *EP2, "--expert-tensor-parallel-size", "1"]),
        "pp2 virtual2": (2, PP2 + VIRTUAL),
    },
    "nemotron-h": {
        "tp2ep2": (4, TP2 + SP + EP2),
        "cp2": (2, CP2),
        "pp2ep2": (4, PP2 + EP2),
        "recompute ep2": (2, RECOMPUTE + EP2),
        "teacher microbatch": (1, ["--qad-teacher-micro-batch-size", "4"]),
        "teacher on the host": (1, ["--qad-teacher-cpu-offload"]),
    },
    "nemotron-nas": {
        "tp2 sp": (2, TP2 + SP),
        "pp2 virtual2": (2, PP2 + VIRTUAL),
        "teacher on the host": (1, ["--qad-teacher-cpu-offload"]),
    },
}


# Teachers of the llama student's vocabulary: deeper, wider and of other heads; and of fewer layers than two ranks have
# virtual stages.
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
        for who, noise in (("teacher", 0.0), ("student", 0.3)):
            source = tiny_job.write_hf(directory / f"hf_{name}_{who}", config, noise=noise)
            models.append((str(source), f"{directory}/{name}_{who}", "float32"))
    tiny_job.write_data(directory / "data", vocab_size=VOCAB)
    server.run("training_jobs:import_checkpoints", 1, {"models": models})
    return Workshop(directory, server)


@pytest.mark.parametrize("data", ["rows", "packed"])
def test_axes_agree(workshop, data):
    """Losses, gradient norms, each tensor's gradient and parameters of five steps."""
    axes, flags = (PACKED_AXES, PACKED) if data == "packed" else (AXES, [])
    _assert_axes_agree(workshop, "llama", axes, flags)


@pytest.mark.parametrize("data", ["rows", "packed"])
def test_norms_of_queries_and_keys_agree(workshop, data):
    """All that a Qwen3 has more than a Llama: weights whose gradient each tensor-parallel rank has a part of, as it has
    some heads, and each context-parallel or data-parallel one, as it has some tokens."""
    axes, flags = (PACKED_AXES, PACKED) if data == "packed" else (AXES, [])
    cut = {name: axes[name] for name in ("tp2", "tp2 sp", "tp2pp2", "tp2cp2", "dp2 sharded") if name in axes}
    _assert_axes_agree(workshop, "qwen3", cut, flags)


@pytest.mark.parametrize("model", HYBRIDS)
def test_axes_of_hybrids_agree(workshop, model):
    """The same, with a router that learns: expert parallelism, alone and with others."""
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
        found, _ = workshop.train(argv + axis_flags, nproc, whole=not is_sharded)
        errors = {
            "loss": max(
                _relative(a["loss"]["kl loss"], b["loss"]["kl loss"]) for a, b in zip(found, expected, strict=True)
            )
        }
        errors["grad_norm"] = max(
            _relative(a["grad_norm"], b["grad_norm"]) for a, b in zip(found, expected, strict=True)
        )
        # Of a distributed optimizer's gradients a rank holds a part, and of an overlapped gather's parameters, too.
        whole = () if is_sharded else ("grads", "params")
        for what in whole:
            error, where = records.largest_error(found, expected, what)
            errors[f"{what} ({where})"] = error
        print(f"{model} {axis}: " + ", ".join(f"{name} {error:.1e}" for name, error in errors.items()))
        if max(errors.values()) > (TOLERANCE if "M" not in pattern else OF_MAMBA):
            wrong[axis] = errors
    assert not wrong, wrong


def _relative(found: float, expected: float) -> float:
    return abs(found / expected - 1)


def test_packed_documents_are_apart(workshop, tmp_path):
    """Each document of a packed row has the logits that it has by itself: attention and positions both start anew."""
    result = str(tmp_path / "packed.pt")
    arguments = {"checkpoint": f"{workshop.directory}/llama_teacher", "lengths": [12, 5, 1, 14], "result": result}
    workshop.server.run("axes_jobs:packed_logits", 1, arguments)
    found = torch.load(result)
    assert found["spread"] > 0.3
    assert max(found["errors"]) < 1e-5, found  # float32 sums of other lengths; a leak or a wrong position gives 1e-1


TEACHER_AXES = {"tp2pp2": (4, TP2 + SP + PP2), "pp2 virtual2": (2, PP2 + VIRTUAL), "cp2": (2, CP2)}


@pytest.mark.parametrize("teacher", TEACHERS)
def test_another_teacher(workshop, teacher):
    """Other depth, width, heads and stages than the student's."""
    argv = workshop.argv("--qad-policy", "bf16", *STEADY, kind="llama", num_steps=2)
    argv += ["--qad-teacher", f"{workshop.directory}/{teacher}"]
    expected, _ = workshop.train(argv)
    assert expected[0]["loss"]["kl loss"] > 0.1
    for axis, (nproc, flags) in TEACHER_AXES.items():
        found, _ = workshop.train(argv + flags, nproc)
        errors = [_relative(a["loss"]["kl loss"], b["loss"]["kl loss"]) for a, b in zip(found, expected, strict=True)]
        errors.append(records.largest_error(found, expected, "grads")[0])
        assert max(errors) <= TOLERANCE, (axis, errors)


@pytest.mark.parametrize("layout", ["one rank", "pp2 virtual2"])
def test_the_teacher_is_apart_and_its_logits_are_freed(workshop, tmp_path, layout):
    """In no wrapper, optimizer, gradient buffer or checkpoint; a microbatch's logits go once the student used them."""
    nproc, flags = {"one rank": (1, []), "pp2 virtual2": (2, PP2 + VIRTUAL)}[layout]
    argv = workshop.argv(*("--bf16", *SHARDED, "--qad-policy", "bf16", *flags), kind="llama", num_steps=1)
    argv += ["--qad-teacher", f"{workshop.directory}/large", "--save", str(tmp_path / "run")]
    argv += ["--qad-teacher-micro-batch-size", "4"] if nproc == 1 else []
    workshop.server.run("axes_jobs:watch_teacher", nproc, {"argv": argv, "result": str(tmp_path / "seen")})
    ranks = [torch.load(tmp_path / f"seen.rank{rank}") for rank in range(nproc)]
    for rank in ranks:
        assert rank["num_parameters"] > 5
        assert rank["found"] == {"trained": 0, "wrapped": 0, "optimizer": 0, "buffers": 0}
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


# Flags and the tolerance of a loss. Quantized: a last bit may decide an input's code, which moves an input of a token
# (test_training). BF16: partial sums of tensor-parallel ranks are rounded to 8 bits, 4e-4 here.
RESUMED = {
    "float32": (["--qad-policy", "bf16"], TOLERANCE),
    "nvfp4": (["--qad-policy", "nvfp4-all-linear"], 0.02),
    "distributed optimizer": (
        ["--qad-policy", "bf16", "--bf16", *SHARDED, "--dist-ckpt-optim-fully-reshardable"],
        2e-3,
    ),
}


@pytest.mark.parametrize("case", RESUMED)
def test_a_checkpoint_resumes_in_another_layout(workshop, tmp_path, case):
    """Written at one layout, read at the next, a step each: the losses of one process that never stopped."""
    flags, tolerance = RESUMED[case]
    argv = workshop.argv(*flags, *STEADY, kind="wide", num_steps=len(RESHARDED))
    expected, _ = workshop.train(argv, whole=False)
    amaxes: dict = {}
    for i, (name, nproc, layout) in enumerate(RESHARDED):
        saving = ["--save", str(tmp_path), "--save-interval", "1", "--exit-interval", str(i + 1)]
        loading = ["--load", str(tmp_path)] if i else []
        (step,), _ = workshop.train([*argv, *layout, *saving, *loading], nproc, whole=False)
        error = _relative(step["loss"]["kl loss"], expected[i]["loss"]["kl loss"])
        print(f"{case} {name}: step {i + 1}, loss {error:.1e}")
        assert error <= tolerance, name
        assert bool(step["amaxes"]) == (case == "nvfp4")
        assert all(torch.equal(amax, amaxes.get(n, amax)) for n, amax in step["amaxes"].items())
        amaxes |= step["amaxes"]


STREAMED = {
    "one rank": (1, []),
    "tp2pp2": (4, TP2 + SP + PP2),
    "pp2 virtual2": (2, PP2 + VIRTUAL),
    "packed": (2, CP2 + PACKED),
}


@pytest.mark.parametrize("axis", STREAMED)
def test_a_teacher_on_the_host_changes_nothing(workshop, tmp_path, axis):
    """Bit for bit; and each layer's weights come once a step, whatever the number of microbatches."""
    nproc, flags = STREAMED[axis]
    argv = workshop.argv("--qad-policy", "bf16", *flags, kind="llama", num_steps=2)
    argv += ["--qad-teacher", f"{workshop.directory}/large"]
    expected, _ = workshop.train(argv, nproc)
    found, _ = workshop.train([*argv, "--qad-teacher-cpu-offload"], nproc)
    for a, b in zip(found, expected, strict=True):
        assert a["loss"] == b["loss"]
        assert all(torch.equal(a["grads"][name], b["grads"][name]) for name in b["grads"])
    if nproc == 1:
        arguments = {"argv": [*argv, "--qad-teacher-cpu-offload"], "result": str(tmp_path / "seen")}
        workshop.server.run("axes_jobs:watch_teacher", 1, arguments)
        assert torch.load(tmp_path / "seen.rank0")["fetched"] == 2 * 6


# Ranks, flags, and what the error says.
REFUSED = [
    (
        2,
        ["--tensor-model-parallel-size", "3"],
        "does not divide the attention heads (4); possible for the student: 1, 2",
    ),
    (2, [*TP2, *PP2], "TP 2 x PP 2 x CP 1 needs a multiple of 4 ranks; this job has 2"),
    (
        1,
        ["--pipeline-model-parallel-size", "5"],
        "5 pipeline stages x 1 virtual ones for 4 layers (*-*-) of the student",
    ),
    (2, [*PP2, "--num-virtual-stages-per-pipeline-rank", "3"], "2 pipeline stages x 3 virtual ones for 4 layers"),
    (2, [*PP2, *VIRTUAL, "--global-batch-size", "6"], "virtual stages need a number of microbatches that PP 2 divides"),
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


def test_layouts_that_cannot_work_are_refused(workshop):
    for nproc, flags, says in REFUSED:
        error = workshop.fail(workshop.argv(*flags, kind="llama"), nproc)
        assert says in error and f"Layouts that would work on {nproc} rank(s): " in error, error
    # A teacher is checked, too, before the student is built.
    error = workshop.fail(workshop.argv(*TP2, *PP4, "--qad-teacher", f"{workshop.directory}/shallow", kind="llama"), 8)
    assert "4 pipeline stages x 1 virtual ones for 2 layers (*-) of the teacher" in error
