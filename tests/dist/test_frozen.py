"""Frozen scales in jobs: the same under any parallelism, after a resume, in the gradient, and in exported files.

The models have every way in which Megatron stores a weight: gate and up as halves, q, k and v in groups, the parts of a
Mamba projection, and experts of one parameter, with and without gates.
"""

from pathlib import Path

import pytest
import tiny_hybrids
import tiny_job
import torch
from safetensors.torch import load_file
from test_training import Workshop

from megatron_qad.checkpoint.validate import validate_nvfp4
from megatron_qad.engine.run_directory import json_records
from megatron_qad.formats import nvfp4
from megatron_qad.formats.nvfp4_format import NVFP4
from megatron_qad.models.families import family_of
from megatron_qad.quantization.carried_scales import AMAX, BLOCK_SCALES, stored_name

MODELS = {"gated": tiny_hybrids.QWEN3_MOE, "squared": tiny_hybrids.NEMOTRON_H, "dense": tiny_job.LLAMA}
TP2 = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
PP2 = ["--pipeline-model-parallel-size", "2"]
EP2 = ["--expert-model-parallel-size", "2"]
PARALLELISM = {"one": (1, []), "tp2": (2, TP2), "pp2": (2, PP2), "ep2": (2, EP2), "tp2ep2": (4, TP2 + EP2)}
KINDS = ("attention", "mamba", "mlp", "expert", "shared_expert", "head")
FROZEN = "four_over_six:frozen"
NUM_STEPS = 3


@pytest.fixture(scope="module")
def workshop(tmp_path_factory, server):
    directory = tmp_path_factory.mktemp("frozen")
    models = []
    for name, config in MODELS.items():
        for role, noise in (("teacher", 0.0), ("student", 0.3)):
            source = tiny_job.write_hf(directory / f"hf_{name}_{role}", config, noise=noise)
            models.append((str(source), f"{directory}/{name}_{role}", "float32"))
    for role in ("teacher", "student"):
        models.append((f"{directory}/hf_dense_{role}", f"{directory}/bf16_{role}", "bfloat16"))
    tiny_job.write_data(directory / "data", vocab_size=120)
    server.run("training_jobs:import_checkpoints", 1, {"models": models})
    return Workshop(directory, server)


def policy(directory: Path, kinds=KINDS, scales: str = "four_over_six", update: str = "frozen") -> str:
    """Write a policy in which weights of all layers are NVFP4 and inputs are not quantized."""
    file = directory / "policy.yaml"
    file.write_text(
        f"rules:\n- {{kind: [{', '.join(kinds)}], format: nvfp4-w4a16, scales: {scales}, update: {update}}}\n"
        "- {kind: embedding, format: bf16}\n"
    )
    return str(file)


def frozen_argv(workshop, model: str) -> list[str]:
    return workshop.argv("--qad-policy", policy(workshop.directory), kind=model, num_steps=NUM_STEPS + 1)


def trained(workshop, model: str, parallelism: str) -> Path:
    """Return the run of a job of three steps, which is trained if no test has done it yet."""
    run, (nproc, flags) = workshop.directory / f"{model}-{parallelism}", PARALLELISM[parallelism]
    if not run.exists():
        stop = ["--exit-interval", str(NUM_STEPS), "--save", str(run)]
        workshop.train([*frozen_argv(workshop, model), *flags, *stop], nproc, whole=False)
    return run


def stored(workshop, *runs: Path) -> list[dict[str, torch.Tensor]]:
    """Return all tensors of the newest checkpoint of each run, as one process would have stored them."""
    result = workshop.directory / "tensors.pt"
    workshop.server.run("ptq_jobs:tensors", 1, {"checkpoints": list(map(str, runs)), "result": str(result)})
    return torch.load(result)


SLOW = [("squared", "pp2"), ("gated", "pp2"), ("squared", "ep2"), ("gated", "tp2ep2"), ("dense", "tp2")]
CASES = [("gated", "ep2"), ("squared", "tp2"), *(pytest.param(*case, marks=pytest.mark.all) for case in SLOW)]


@pytest.mark.parametrize("model, parallelism", CASES)
def test_scales_do_not_depend_on_parallelism(workshop, model, parallelism):
    """After three steps all scales of a run equal those of one process bit for bit, and the weights nearly."""
    expected, actual = stored(workshop, *(trained(workshop, model, name) for name in ("one", parallelism)))
    assert actual.keys() == expected.keys()
    config = MODELS[model]
    linears = [m for m in family_of(config).linears(config) if m.kind in KINDS]
    scales = [name for name in expected if BLOCK_SCALES in name]
    assert len([name for name in expected if AMAX in name]) == len(linears) and len(scales) >= len(linears)
    for name, tensor in expected.items():
        if name.startswith("output_layer.") and AMAX not in name:  # without the padding of the vocabulary
            actual[name], tensor = actual[name][:120], tensor[:120]
        if AMAX in name or BLOCK_SCALES in name:
            assert tensor.dtype == (torch.uint8 if BLOCK_SCALES in name else torch.float32)
            assert torch.equal(actual[name], tensor), name
        elif name.startswith("decoder."):
            # Adam's first steps have nearly the size of the learning rate, whatever the gradient is: where a gradient
            # is near zero, other partial sums change its sign.
            assert (actual[name] - tensor).abs().max() <= 2 * NUM_STEPS * 1e-3, name
    followed = [
        linear.megatron
        for linear in linears
        if linear.megatron in expected
        and expected[stored_name(linear.megatron, AMAX)] == nvfp4.tensor_amax(expected[linear.megatron])
    ]
    assert not followed  # scales that are not frozen would have followed the weights


RESUMED = [("squared", "tp2", "pp2"), pytest.param("gated", "ep2", "tp2ep2", marks=pytest.mark.all)]


@pytest.mark.parametrize("model, before, after", RESUMED)
def test_scales_load_with_other_parallelism(workshop, model, before, after):
    """A job that resumes with another parallelism trains with the scales of the checkpoint and saves the same bits."""
    run, (nproc, flags) = trained(workshop, model, before), PARALLELISM[after]
    (expected,) = stored(workshop, run)
    (step,), _ = workshop.train([*frozen_argv(workshop, model), *flags, "--save", str(run)], nproc, whole=False)
    (actual,) = stored(workshop, run)
    scales = [name for name in expected if AMAX in name or BLOCK_SCALES in name]
    for tensors in (actual, expected):  # without the padding of the vocabulary
        head = stored_name("output_layer.weight", BLOCK_SCALES)
        tensors[head] = tensors[head][:120]
    assert scales and [name for name in scales if not torch.equal(actual[name], expected[name])] == []
    one = trained(workshop, model, "one")
    (expected_step,), _ = workshop.train([*frozen_argv(workshop, model), "--load", str(one)], whole=False)
    error = abs(step["loss"]["kl loss"] / expected_step["loss"]["kl loss"] - 1)
    print(f"{model} {before}, then {after}: loss of the fourth step {error:.1e}")
    # Sums in another order for four steps change the loss by an ulp, if no weight is rounded to another code. One that
    # is changes about 1 of 1e5 weights.
    assert error <= 1e-4


def decoded(directory: Path) -> dict[str, torch.Tensor]:
    """Return the float32 values of all NVFP4 weights of an export in the layout modelopt."""
    tensors = load_file(directory / "model.safetensors")
    return {
        name: nvfp4.dequantize(tensors[name], tensors[f"{name}_scale"], tensors[f"{name}_scale_2"])
        for name in tensors
        if f"{name}_scale_2" in tensors
    }


def expected_weight(tensors: dict[str, torch.Tensor], linear) -> torch.Tensor:
    """Return a weight of a checkpoint, quantized with its stored scales by definition."""

    def read(what: str) -> torch.Tensor:
        name = stored_name(linear.megatron, what)
        endings = linear.checkpoint_splits if name not in tensors else [""]
        whole = torch.cat([tensors[name + ending] for ending in endings])
        return whole[: linear.shape[0]]  # without the padding of the vocabulary

    scale = NVFP4.scale_from_amax(read(AMAX).view(()), rule="four_over_six")
    blocks = read(BLOCK_SCALES).view(torch.float8_e4m3fn)
    return NVFP4.fake_quant_fixed(read("weight"), scale, blocks)


@pytest.mark.parametrize("model, parallelism", CASES[:2])
def test_exported_files_decode_to_the_trained_weights(workshop, tmp_path, model, parallelism):
    """Weights that were saved between an update and their quantization: they decode to what the next step trains."""
    run, config = trained(workshop, model, parallelism), MODELS[model]
    outputs = {layout: str(tmp_path / layout) for layout in ("modelopt", "compressed-tensors", "bf16")}
    workshop.server.run("training_jobs:export_checkpoint", 1, {"checkpoint": str(run), "outputs": outputs})
    for layout in ("modelopt", "compressed-tensors"):
        report = validate_nvfp4(tmp_path / layout, against=workshop.directory / f"hf_{model}_student")
        assert not report.issues, report.issues[:5]
    (tensors,) = stored(workshop, run)
    values, unpacked = decoded(tmp_path / "modelopt"), load_file(tmp_path / "bf16" / "model.safetensors")
    num_checked = 0
    for linear in family_of(config).linears(config):
        if linear.kind not in KINDS:
            continue
        for name, part in zip(linear.hf, linear.to_hf(expected_weight(tensors, linear)), strict=True):
            assert torch.equal(values[name], part), name
            assert torch.equal(unpacked[name], part.to(unpacked[name].dtype)), name
            num_checked += 1
    assert num_checked == len(values)


SHARDED = ["--bf16", "--use-distributed-optimizer"]
# A large learning rate, so that weights outgrow their blocks.
DENSE = ["--lr", "3e-2", "--min-lr", "3e-2", "--eval-iters", "1", "--eval-interval", "2", "--save-interval", "2"]


def run_in_two_parts(workshop, tmp_path, scales: str, update: str, nproc: int) -> tuple[list[dict], list[Path]]:
    """Train for four steps, in one run and in one that stops after two. Return the steps of the first and both runs.

    Validations quantize the weights before they are saved.
    """
    file = policy(tmp_path, ("attention", "mlp", "head"), scales, update)
    argv = workshop.argv("--qad-policy", file, *SHARDED, *DENSE, kind="bf16", num_steps=4)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected, _ = workshop.train([*argv, "--save", str(whole)], nproc, whole=False)
    workshop.train([*argv, "--save", str(parts), "--exit-interval", "2"], nproc, whole=False)
    actual, _ = workshop.train([*argv, "--save", str(parts)], nproc, whole=False)
    assert [step["loss"] for step in actual] == [step["loss"] for step in expected[2:]]
    return expected, [whole, parts]


CARRIED = [("max", "frozen"), pytest.param("mse_sweep", "every_step", marks=pytest.mark.all)]


@pytest.mark.parametrize("scales, update", CARRIED)
def test_resumed_run_equals_an_uninterrupted_one(workshop, tmp_path, scales, update):
    """With scales that are frozen, and with an amax that the quantized weights do not have any more."""
    _, runs = run_in_two_parts(workshop, tmp_path, scales, update, nproc=2)
    whole, parts = stored(workshop, *runs)
    assert whole.keys() == parts.keys()
    assert [name for name in whole if not torch.equal(whole[name], parts[name])] == []
    linears = [m for m in family_of(MODELS["dense"]).linears(MODELS["dense"]) if m.kind in KINDS]
    outputs = {"modelopt": str(tmp_path / "modelopt")}
    workshop.server.run("training_jobs:export_checkpoint", 1, {"checkpoint": str(runs[1]), "outputs": outputs})
    values = decoded(tmp_path / "modelopt")
    for linear in linears:  # the saved weights are quantized already
        for name, part in zip(linear.hf, linear.to_hf(parts[linear.megatron][: linear.shape[0]]), strict=True):
            assert torch.equal(values[name].bfloat16(), part), name
    if update == "frozen":
        # Rows of the vocabulary's padding have no gradient.
        check_masks(workshop, [linear for linear in linears if linear.kind != "head"], parts)


def check_masks(workshop, linears: list, tensors: dict[str, torch.Tensor]) -> None:
    """Check that the gradients of exactly the saturated elements are zero, on the rank whose optimizer reads them."""
    name_of_record = workshop.directory / f"record{workshop._number - 2}"  # the uninterrupted run
    ranks = [torch.load(f"{name_of_record}.rank{rank}") for rank in range(2)]
    saturated, others = [0] * 4, [0] * 4  # elements by step: saturated ones, and others with a zero gradient
    for step in range(4):
        for linear in linears:
            name = linear.megatron
            first, second = (rank[step]["grads"][name][0] == 0 for rank in ranks)
            is_saturated = torch.zeros_like(first)
            if step:  # the first step starts from the weights that the scales were computed from
                scale = NVFP4.scale_from_amax(tensors[stored_name(name, AMAX)].view(()))
                blocks = tensors[stored_name(name, BLOCK_SCALES)].view(torch.float8_e4m3fn)
                weight = ranks[0][step - 1]["params"][name][0]  # after the update: the master in BF16
                is_saturated = weight.abs() > NVFP4.saturation_limits(scale, blocks).repeat_interleave(16, -1)
            assert bool((first | second)[is_saturated].all()), (step, name)
            saturated[step] += int(is_saturated.sum())
            others[step] += int((first | second)[~is_saturated].sum())
    print(f"saturated in each step: {saturated}; others with a zero gradient: {others}")
    assert min(saturated[1:]) > 10 * max(others)
    # Sums of BF16 numbers that cancel: as many as in the first step, where nothing is saturated.
    assert max(others) < 2 * others[0]


def test_runs_with_other_scales_are_refused(workshop, tmp_path):
    """A job that resumes uses the scales of the checkpoint. One that starts from its weights computes its own."""
    run = tmp_path / "run"
    base = workshop.argv("--qad-policy", policy(tmp_path, ("attention", "mlp", "head")), kind="dense", num_steps=1)
    workshop.train([*base, "--save", str(run)], whole=False)
    record = json_records.read(run / "qad.json")
    assert record["scale_rule"] == "max" and set(record["scales"].values()) == {FROZEN} and len(record["scales"]) == 9
    other = ["--qad-policy-override", "mlp=nvfp4-w4a16:mse:frozen"]
    assert workshop.fail([*base, *other, "--save", str(run), "--qad-dry-run"]).startswith(f"error: --load {run}: ")
    error = workshop.fail([*base, *other, "--save", str(run)])
    assert f"--load {run}: this job reads the scales of decoder.layers.1.mlp.linear_fc1.weight (mse:frozen)" in error
    error = workshop.fail([*base, *other, "--load", str(run), "--save", str(tmp_path / "new")])
    assert "whose job had four_over_six:frozen (4 linears differ). Start from its weights with --qad-student" in error
    error = workshop.fail([*base, "--qad-policy-override", "mlp=nvfp4-w4a16", "--save", str(run)])
    assert "linear_fc1.weight has the scales four_over_six:frozen; this job has max (4 linears differ)" in error
    anew = [*base, "--qad-student", str(run), "--save", str(tmp_path / "anew")]
    workshop.train(anew, whole=False)
    (before, after) = stored(workshop, run, tmp_path / "anew")
    name = stored_name("decoder.layers.1.mlp.linear_fc2.weight", AMAX)
    assert after[name] == nvfp4.tensor_amax(before["decoder.layers.1.mlp.linear_fc2.weight"]) != before[name]
