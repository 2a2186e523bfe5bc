"""Policies of Nemotron 3 Super, Ultra and 3.5 Lightning: counts and sizes of the released checkpoints, and warnings.

The configs have the entries of the published ones, as far as they are known from public sources: Ultra and Lightning
list their layers in ``layers_block_type``, Ultra's ``num_hidden_layers`` is null.
"""

import json
from collections import Counter
from pathlib import Path

import pytest

from megatron_qad.engine import QADError
from megatron_qad.models.families import family_of
from megatron_qad.quantization import policy as policies
from megatron_qad.report.policy_report import resolve_report

CONFIGS = Path(__file__).parents[1] / "quantization" / "configs_of_releases"
SUPER, ULTRA = "nemotron-3-super-120b-a12b", "nemotron-3-ultra-550b-a55b"
LIGHTNING = "nemotron-3.5-lightning-30b-a3b"


def config(name: str) -> dict:
    return json.loads((CONFIGS / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def report():
    """Return a function that resolves a shipped policy for its model and caches the result."""
    reports = {}

    def resolve(policy: str):
        if policy not in reports:
            reports[policy] = resolve_report(config(policy.removesuffix("-autoquantize")), policies.load(policy))
        return reports[policy]

    return resolve


def counts(resolved) -> dict[str, int]:
    """Return the number of Hugging Face modules in each quantized format, as a configuration lists them."""
    return dict(Counter(row.format for row in resolved.rows for _ in row.hf if row.format != "bf16"))


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (f"{SUPER}-autoquantize", {"nvfp4": 40_961, "fp8": 139}),  # 41,100 named modules of the release
        (SUPER, {"nvfp4": 2 * 512 * 40, "fp8": 4 * 40}),
        (ULTRA, {"nvfp4": 49_152, "fp8": 4 * 48}),
        (LIGHTNING, {"nvfp4-w4a16": 5_935, "fp8": 46}),
    ],
)
def test_counts_are_those_of_the_releases(report, policy, expected):
    resolved = report(policy)
    assert counts(resolved) == expected and resolved.policy.kv_cache == "fp8" and not resolved.warnings


def test_sizes_are_those_of_the_releases(report):
    """Sizes are in 10^9 bytes and leave out multi-token prediction layers. NVIDIA gives 331 GB for Ultra."""
    assert round(report(SUPER).num_weights / 1e9, 1) == 120.7
    assert round(report(ULTRA).bytes_after / 1e9, 1) == 329.5
    assert round(report(LIGHTNING).bytes_after / 1e9, 1) == 18.9


def test_map_of_super_has_the_formats_of_the_release(report):
    formats = {name: row.format for row in report(f"{SUPER}-autoquantize").rows for name in row.hf}
    mixer = "backbone.layers.{}.mixer.{}".format
    assert formats[mixer(1, "shared_experts.down_proj")] == "nvfp4"
    assert formats[mixer(1, "shared_experts.up_proj")] == "fp8" != formats[mixer(41, "shared_experts.up_proj")]
    assert [layer for layer in (1, 3, 5, 8) if formats[mixer(layer, "fc1_latent_proj")] == "fp8"] == [1, 3, 5]
    assert [layer for layer in (1, 3, 5, 8) if formats[mixer(layer, "fc2_latent_proj")] == "fp8"] == [3]
    assert [i for i in (7, 69, 78) if formats[mixer(i, "o_proj")] == "fp8"] == [69, 78]
    assert {formats[mixer(i, f"{x}_proj")] for i in (7, 69, 78) for x in "qkv"} == {"bf16"}
    number = Counter(name.rpartition(".")[2] for name, fmt in formats.items() if fmt == "fp8")
    assert number == {
        "in_proj": 28,
        "out_proj": 29,
        "up_proj": 39,
        "down_proj": 37,
        "fc1_latent_proj": 3,
        "fc2_latent_proj": 1,
        "o_proj": 2,
    }


def test_scales_are_those_of_the_recipes(report):
    def settings(policy: str) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for row in report(policy).rows:
            if row.scales:
                found.setdefault(row.kind, set()).add(row.scales)
        return found

    frozen = {"four_over_six:frozen"}
    assert settings(LIGHTNING) == {"expert": frozen, "shared_expert": frozen, "head": frozen}
    assert settings(ULTRA) == {"expert": {"four_over_six"}}
    assert settings(SUPER) == {"expert": {"mse:frozen"}}  # has recipes with max and with mse: the default of new jobs


def test_kind_expert_includes_the_latent_projections():
    """``expert`` still selects latent projections, which now have a kind of their own."""
    few_experts = config(SUPER) | {"n_routed_experts": 32}
    linears = family_of(few_experts).linears(few_experts)
    latent = {linear.megatron for linear in linears if linear.kind == "latent"}
    assert len(latent) == 2 * 40
    formats = policies.resolve(policies.load("nvfp4-all-linear"), linears)
    assert {formats[name] for name in latent} == {"nvfp4"}
    formats = policies.resolve(policies.load("nvfp4-all-linear", ["latent=fp8"]), linears)
    assert {name for name, fmt in formats.items() if fmt == "fp8"} == latent
    kinds = family_of(config(SUPER)).layer_kinds(config(SUPER))
    assert policies.layer_kinds_of(linears) == kinds
    before = policies.load("nvfp4-all-linear", ["kind:latent,before:attention=bf16"])
    resolved = policies.resolve(before, linears, kinds)
    attention = [i for i, kind in enumerate(kinds) if kind == "attention"]
    expected = {f"decoder.layers.{i - 2}.mlp.fc{fc}_latent_proj.weight" for i in attention for fc in (1, 2)}
    assert {name for name in latent if resolved[name] == "bf16"} == expected


def test_prediction_layers_cannot_be_quantized():
    with pytest.raises(QADError, match="gives 'mtp' the format nvfp4, but .*multi-token prediction layers"):
        policies.load("nvfp4-all-linear", ["mtp=nvfp4"])


@pytest.mark.parametrize("rule", ["mamba=nvfp4:four_over_six", "mamba=nvfp4-w4a16:four_over_six"])
def test_four_over_six_for_mamba_is_a_warning(rule):
    resolved = resolve_report(config(LIGHTNING), policies.load(LIGHTNING, [rule]))
    (warning,) = resolved.warnings
    assert warning.startswith("decoder.layers.0.mixer.in_proj and 45 more: Mamba weights with the scale rule")
    assert "84.7%" in warning and "98.3%" in warning
    assert any(line.startswith("WARNING") and "84.7%" in line for line in resolved.lines())
    assert resolved.as_json()["warnings"] == [warning]


@pytest.mark.parametrize("rule", ["mamba=nvfp4:max", "mamba=nvfp4", "mamba=bf16"])
def test_other_rules_for_mamba_are_no_warning(rule):
    assert not resolve_report(config(LIGHTNING), policies.load(LIGHTNING, [rule])).warnings
