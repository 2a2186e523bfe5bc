"""Subprocess that tests the KL kernels. `interpret` compares them in Triton's interpreter with float64 and the tiles;
`compile` compiles them for GPUs and inspects their PTX."""

import re
import sys

import torch

from megatron_qad.distillation import LOSSES, VocabShard, divergences, kl_triton, logit_losses


def logits(tokens, width, noise, offset=0.0, seed=0):
    """Student and teacher logits, float64. The largest are in the last columns, so that running maxima change."""
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(tokens, width, generator=generator, dtype=torch.float64) * 3
    teacher += torch.linspace(0, 8, width)
    student = teacher + noise * torch.randn(tokens, width, generator=generator, dtype=torch.float64) + offset
    return student, teacher


def reference(student, teacher, temperatures=(1.0, 1.0)):
    """KL [tokens] and its gradient with respect to ``student``, by float64 autograd."""
    student = student.clone().requires_grad_()
    q, p = (student / temperatures[0]).log_softmax(-1), (teacher / temperatures[1]).log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    kl.sum().backward()
    return kl.detach(), student.grad


def interpret():
    kl_triton._STATS_COLUMNS = kl_triton._GRADIENT_COLUMNS = 256  # four blocks per row, so the maxima change
    for noise, offset in ((0.0, 0.0), (1e-3, 0.0), (1e-2, 3.0), (0.3, -2.0), (3.0, 0.0), (30.0, 5.0)):
        student, teacher = (x.float() for x in logits(6, 900, noise, offset))
        kl, gradient = reference(student.double(), teacher.double())
        errors = {}
        for path in ("kernel", "tiles"):
            use_kernels(path == "kernel")
            leaf = student.clone().requires_grad_()
            (loss,) = logit_losses([LOSSES["kl"]()], leaf, teacher, None, VocabShard(0, 900))
            loss.sum().backward()
            errors[path] = (loss.detach() - kl).abs().max().item(), (leaf.grad - gradient).abs().max().item()
        p, q = teacher.double().log_softmax(-1), student.double().log_softmax(-1)
        moved = (p.exp() * (p - q).abs()).sum(-1).max().item()
        print(noise, offset, kl.mean().item(), moved, errors)
        # The loss: two float32 roundings of the summed E_t|log(p_t / p_s)|, which is larger than the KL. The gradient:
        # four roundings of a probability of 1.
        assert errors["kernel"][0] <= 1.2e-7 * moved + 1e-12, (noise, offset, errors)
        assert errors["kernel"][1] <= 2.4e-7, (noise, offset, errors)
    use_kernels(True)
    equal = logits(3, 50, 0.0)[1].float()
    leaf = equal.clone().requires_grad_()
    (loss,) = logit_losses([LOSSES["kl"]()], leaf, equal.clone(), None, VocabShard(0, 50))
    loss.sum().backward()
    assert not loss.any() and not leaf.grad.any()  # equal models have exactly zero KL
    shards()
    masks_and_padding()


def shards():
    """Merge four shards, the last one only padding, with temperatures and confidence weights."""
    student, teacher = (x.float() for x in logits(5, 700, 0.2, 1.0, seed=3))
    kl, _ = reference(student.double(), teacher.double(), (2.0, 3.0))
    parts = [kl_triton.stats(student[:, a:b], teacher[:, a:b], n, (2.0, 3.0), None) for a, b, n in
             ((0, 300, 300), (300, 600, 300), (600, 700, 100), (0, 64, 0))]  # fmt: skip
    merged, _, _ = divergences.merge_kl(torch.stack(parts))
    assert (merged - kl).abs().max() <= 1e-6 * kl.max(), merged - kl
    weight = teacher.div(3).softmax(-1).amax(-1)
    for name, factor in (("kl", 1.0), ("confidence_kl", weight)):
        loss = LOSSES[name](temperature=2.0, teacher_temperature=3.0)
        leaf = student.clone().requires_grad_()
        (actual,) = logit_losses([loss], leaf, teacher, None, VocabShard(0, 700))
        actual.sum().backward()
        expected, gradient = reference(student.double(), teacher.double(), (2.0, 3.0))
        assert (actual - expected * factor).abs().max() < 1e-6
        assert (leaf.grad - gradient * (factor if name == "kl" else factor[:, None])).abs().max() < 3e-7


def masks_and_padding():
    """Padding columns and masked tokens have zero loss and gradient, in place, in bfloat16, in rows of a view."""
    student, teacher = (x.bfloat16() for x in logits(4, 200, 0.3, seed=5))
    student[:, 150:] = torch.nan
    teacher[:, 150:] = torch.inf
    student[2] = torch.nan
    kl, gradient = reference(student[:, :150].double(), teacher[:, :150].double())
    weight = torch.tensor([1.0, 0.5, 0.0, 1.0])
    wide = torch.zeros(4, 256, dtype=torch.bfloat16)
    wide[:, :200] = student
    leaf = wide.requires_grad_()
    rows = (leaf * 1.0)[:, :200]  # a strided view that is not a leaf is overwritten in place
    (loss,) = logit_losses([LOSSES["kl"]()], rows, teacher, None, VocabShard(0, 150), weight=weight)
    loss.sum().backward()
    counted = weight > 0
    assert loss[2] == 0 and ((loss - kl * weight)[counted].abs() < 1e-6).all()
    grad = leaf.grad[:, :200].double()
    assert not grad[:, 150:].any() and not grad[2].any()
    # The interpreter truncates to bfloat16, a GPU rounds: a difference of one unit in the last place.
    error = (grad[:, :150] - gradient * weight[:, None])[counted].abs()
    assert (error <= gradient[counted].abs() * 2.0**-7 + 1e-7).all()
    leaf.grad = None
    rows = (leaf * 1.0)[:, :200]
    (loss,) = logit_losses([LOSSES["confidence_kl"]()], rows, teacher, None, VocabShard(0, 150), weight=weight)
    loss.sum().backward(retain_graph=True)
    assert leaf.grad.isfinite().all() and not leaf.grad[2].any() and leaf.grad[counted].any(dim=1).all()
    try:  # the logits now hold their gradient
        loss.sum().backward()
        raise AssertionError("a second backward pass read a gradient as logits")
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    none = torch.randn(2, 8, requires_grad=True)
    (loss,) = logit_losses(
        [LOSSES["kl"]()], none * 1.0, torch.randn(2, 8), None, VocabShard(0, 8), weight=torch.zeros(2)
    )
    loss.sum().backward()
    assert not loss.any() and not none.grad.any()


def use_kernels(enabled: bool) -> None:
    divergences.triton_serves = lambda x: enabled


def compile_for_gpus():
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    both_logits = {"student": "*bf16", "student_stride": "i32", "factor_s": "fp32"}
    both_logits |= {"teacher": "*bf16", "teacher_stride": "i32", "factor_t": "fp32"}
    saved_tensors = dict.fromkeys(("max_s", "max_t", "log_ratio", "r_t", "factor"), "*fp32")
    strides = {f"{name}_stride": "i32" for name in ("rank", "token", "stat")}
    signatures = {
        "stats": both_logits | {"scale": "*fp32", "out": "*fp32"},
        "gradient": both_logits | {"out": "*bf16", "out_stride": "i32"} | saved_tensors,
        "merge": {"stats": "*fp32"} | strides | {"kl": "*fp64", "saved": "*fp32", "num_tokens": "i32"},
    }
    stats_constants = {"ALL_COUNT": False, "COLUMNS": kl_triton._STATS_COLUMNS}
    gradient_constants = {"COLUMNS": kl_triton._GRADIENT_COLUMNS}
    cases = (
        ("stats", stats_constants | {"NUM_COLUMNS": 18992, "HAS_TEMPERATURE": True}, kl_triton._STATS_LAUNCH),
        ("stats", stats_constants | {"NUM_COLUMNS": 16384, "HAS_TEMPERATURE": False}, kl_triton._STATS_LAUNCH),
        (
            "gradient",
            gradient_constants | {"NUM_COLUMNS": 18992, "WIDTH": 19008, "HAS_TEMPERATURE": True},
            kl_triton._GRADIENT_LAUNCH,
        ),
        (
            "gradient",
            gradient_constants | {"NUM_COLUMNS": 16384, "WIDTH": 16384, "HAS_TEMPERATURE": False},
            kl_triton._GRADIENT_LAUNCH,
        ),
        ("merge", {"RANKS": 4, "TOKENS": kl_triton._MERGE_TOKENS}, {}),
    )
    for capability in (90, 100):
        for name, constants, options in cases:
            signature = signatures[name]
            # The launcher detects addresses and strides that are multiples of 16; here they must be declared.
            rows = ("student_stride", "teacher_stride", "out_stride")
            divisible = [i for i, (key, kind) in enumerate(signature.items()) if kind[0] == "*" or key in rows]
            source = ASTSource(
                fn=getattr(kl_triton, f"_{name}_kernel"),
                signature=signature | dict.fromkeys(constants, "constexpr"),
                constexprs=constants,
                attrs={(i,): [["tt.divisibility", 16]] for i in divisible},
            )
            compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
            ptx = compiled.asm["ptx"]
            assert "ld.local" not in ptx and "st.local" not in ptx, name  # no register spills in PTX
            if name != "merge":
                assert re.search(r"ld\.global\.v4\.b32", ptx), name  # loads 16 bytes per model at a time
                assert "ex2.approx" in ptx
            if name == "gradient":
                assert re.search(r"st\.global\.v4\.b32", ptx)


if __name__ == "__main__":
    {"interpret": interpret, "compile": compile_for_gpus}[sys.argv[1]]()
    print("passed")
