"""Hidden-state losses and the scale-growth penalty inside Megatron's training loop."""

import pytest
import records
import tiny_job
import torch
from test_axes import CP2, PACKED, PP2, PP4, SP, STEADY, TP2, VIRTUAL
from test_training import RECOMPUTE, TOLERANCE, workshop  # noqa: F401  the fixture

LOSS = "kl+0.3*hidden_mse+linear(1, 0, 1, 3)*hidden_cosine(layers=[1, -1])"
# Name: ranks and flags. Each is compared with one process on the same data.
AXES = {
    "tp2": (2, TP2),
    "tp2 sp": (2, TP2 + SP),
    "tp2pp2 sp, joined, hidden": (4, TP2 + SP + PP2 + ["--qad-teacher-micro-batch-size", "4"]),
    "pp4": (4, PP4),
    "pp2 virtual2": (2, PP2 + VIRTUAL),
    "cp2": (2, CP2),
    "dp2": (2, []),
    "on the host": (1, ["--qad-teacher-cpu-offload"]),
    "recompute": (1, RECOMPUTE),
    "pp2 recompute": (2, PP2 + RECOMPUTE),
    "fused": (1, ["--qad-fused-linear-loss", "always"]),
}


def test_axes_agree(workshop):  # noqa: F811
    argv = workshop.argv("--qad-policy", "bf16", "--qad-loss", LOSS, *STEADY, num_steps=3)
    expected, output = workshop.train(argv)
    for step, weight in zip(expected, (1, 0.5, 0), strict=True):
        loss = step["loss"]
        assert loss.keys() == {f"{name} loss" for name in ("kl", "hidden_mse", "hidden_cosine", "total")}
        assert loss["hidden_mse loss"] > 0.05 and loss["hidden_cosine loss"] > 0.01
        total = loss["kl loss"] + 0.3 * loss["hidden_mse loss"] + weight * loss["hidden_cosine loss"]
        assert loss["total loss"] == pytest.approx(total, rel=1e-6)
    assert "hidden_mse loss: " in output
    plain, _ = workshop.train(workshop.argv("--qad-policy", "bf16", *STEADY, num_steps=1))
    assert records.largest_error(plain, expected[:1], "grads")[0] > 0.1, "the hidden-state losses have no gradient"
    _check(workshop, argv, expected, AXES)


def test_packed_rows_agree(workshop):  # noqa: F811
    argv = workshop.argv("--qad-policy", "bf16", "--qad-loss", LOSS, *STEADY, *PACKED, num_steps=2)
    expected, _ = workshop.train(argv)
    combined = ["--qad-teacher-micro-batch-size", "4"]
    _check(workshop, argv, expected, {"cp2 pp2": (4, CP2 + PP2), "tp2 sp, joined": (2, TP2 + SP + combined)})


def _check(workshop, argv, expected, axes):  # noqa: F811
    failed = {}
    for axis, (nproc, flags) in axes.items():
        steps, _ = workshop.train(argv + flags, nproc)
        errors = [
            max(abs(a["loss"][n] / b["loss"][n] - 1) for n in b["loss"]) for a, b in zip(steps, expected, strict=True)
        ]
        errors += [records.largest_error(steps, expected, what)[0] for what in ("grads", "params")]
        print(f"{axis}: " + " ".join(f"{error:.1e}" for error in errors))
        if max(errors) > TOLERANCE:
            failed[axis] = errors
    assert not failed, failed


def test_equals_transformers(workshop):  # noqa: F811
    """Compare the loss and the embedding's gradient of one step with transformers' hidden states and autograd."""
    from transformers import AutoModelForCausalLM

    # A Llama block is two layers of the pattern. The output of its MLP is a hidden state of transformers.
    argv = workshop.argv("--qad-policy", "bf16", "--qad-loss", "kl+0.3*hidden_mse(layers=[1])", num_steps=1)
    (step,), _ = workshop.train(argv)
    models = [
        AutoModelForCausalLM.from_pretrained(workshop.directory / f"hf_untied_{role}")
        for role in ("teacher", "student")
    ]
    teacher, student = (model.float() for model in models)
    kl = mse = tokens = 0
    for batch in step["batches"]:
        with torch.no_grad():
            expected = teacher(batch["tokens"], output_hidden_states=True)
        actual = student(batch["tokens"], output_hidden_states=True)
        p, q = expected.logits.log_softmax(-1), actual.logits.log_softmax(-1)
        kl = kl + ((p.exp() * (p - q)).sum(-1) * batch["loss_mask"]).sum()
        h_t, h_s = expected.hidden_states[1], actual.hidden_states[1]
        mse = mse + ((h_s - h_t).square().sum(-1) / h_t.square().sum(-1) * batch["loss_mask"]).sum()
        tokens += batch["loss_mask"].count_nonzero()
    ((kl + 0.3 * mse) / tokens).backward()
    assert step["loss"]["hidden_mse loss"] == pytest.approx((mse / tokens).item(), rel=1e-5)
    gradient = step["grads"]["embedding.word_embeddings.weight"]
    # The logits of Megatron and transformers differ by 6e-6 (test_model_parity).
    assert records.relative_error(gradient, student.get_input_embeddings().weight.grad) < 2e-5


def test_scale_growth(workshop, tmp_path):  # noqa: F811
    """The penalty is zero at the first step, equal with two kinds of parallelism, and unchanged by resuming."""
    argv = workshop.argv("--qad-loss", "kl+10*scale_growth", "--lr", "1e-2", "--min-lr", "1e-2", num_steps=4)
    expected, _ = workshop.train(argv)
    free, _ = workshop.train(workshop.argv("--lr", "1e-2", "--min-lr", "1e-2", num_steps=4))
    values = [step["loss"]["scale_growth loss"] for step in expected]
    assert values[0] == 0 and values[-1] > 0
    assert expected[1]["loss"]["total loss"] == pytest.approx(expected[1]["loss"]["kl loss"] + 10 * values[1], rel=1e-6)
    assert torch.equal(
        expected[0]["grads"]["embedding.word_embeddings.weight"], free[0]["grads"]["embedding.word_embeddings.weight"]
    )
    growth = [_largest_growth(steps) for steps in (expected, free)]
    assert growth[0] < growth[1], growth
    follow = str(workshop.directory / f"record{workshop._number - 1}")
    for nproc, flags in ((2, PP2), (2, [])):  # microbatches may be summed in another order
        steps, _ = workshop.train(argv + flags, nproc, follow=follow)
        for a, b in zip(steps, expected, strict=True):
            assert a["loss"]["scale_growth loss"] == pytest.approx(b["loss"]["scale_growth loss"], rel=TOLERANCE)
            assert records.largest_error([a], [b], "grads")[0] <= TOLERANCE
    saving = ["--save", str(tmp_path), "--save-interval", "2"]
    workshop.train([*argv, *saving, "--exit-interval", "2"])
    resumed, _ = workshop.train([*argv, *saving, "--load", str(tmp_path)])
    assert [step["loss"] for step in resumed] == [step["loss"] for step in expected[2:]]


def _largest_growth(steps) -> float:
    first, last = steps[0]["quantized"], steps[-1]["quantized"]
    names = [name for name in first if "linear" in name and "norm" not in name]
    amax = [{name: step[name].unflatten(-1, (-1, 16)).abs().amax(-1) for name in names} for step in (first, last)]
    return sum((amax[1][name] / amax[0][name] - 1).clamp(min=0).square().sum().item() for name in names)


def test_layers_that_cannot_be_compared_raise(workshop):  # noqa: F811
    large = tiny_job.LLAMA | {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 6, "head_dim": 32}
    deep = tiny_job.LLAMA | {"num_hidden_layers": 4}
    models = []
    for name, config in (("wide", large), ("deep", deep)):
        source = tiny_job.write_hf(workshop.directory / f"hf_{name}", config)
        models.append((str(source), f"{workshop.directory}/{name}", "float32"))
    workshop.server.run("training_jobs:import_checkpoints", 1, {"models": models})

    def error(loss, *flags, nproc=1):
        return workshop.fail(workshop.argv("--qad-loss", loss, *flags), nproc)

    assert "hidden states of 64 elements (student) and 96 (teacher)" in error(
        "kl+hidden_mse", "--qad-teacher", f"{workshop.directory}/wide"
    )
    assert "layer 4 is out of range for the student, which has 4 layers" in error("kl+hidden_mse(layers=[4])")
    assert "no loss of the logits among its terms" in error("hidden_mse")
    deep_teacher = ["--qad-teacher", f"{workshop.directory}/deep", *PP2]
    message = error("kl+hidden_mse(layers=[2])", *deep_teacher, nproc=2)
    assert "layer 2 of the student, on pipeline rank 1, with layer 2 of the teacher, on rank 0" in message
    argv = workshop.argv("--qad-policy", "bf16", *deep_teacher, num_steps=1)
    (step,), _ = workshop.train([*argv, "--qad-loss", "kl+hidden_mse(layers=[1, 3], teacher_layers=[3, 7])"], 2)
    assert step["loss"]["hidden_mse loss"] > 0
