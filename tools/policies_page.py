"""Writes docs/shipped_policies.md, which lists the policies in the package: ``python tools/policies_page.py``.

The data are the files in megatron_qad/quantization/policies. tests/unit/tools/test_policies_page.py compares the page
with them.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megatron_qad.engine.text_files import read_yaml  # noqa: E402
from megatron_qad.quantization.policy import Policy  # noqa: E402
from megatron_qad.quantization.policy_file import SHIPPED  # noqa: E402
from megatron_qad.quantization.rules import Rule  # noqa: E402

PAGE = ROOT / "docs/shipped_policies.md"
_MLP = {"linear_fc1", "linear_fc2"}
PROJECTIONS: dict[str, set[str]] = {
    "attention": {"linear_qkv", "linear_proj"},
    "mamba": {"in_proj", "out_proj"},
    "mlp": _MLP,
    "expert": _MLP,
    "latent": {"fc1_latent_proj", "fc2_latent_proj"},
    "shared_expert": _MLP,
    "head": set(),
}
"""Kinds of layers that a policy may quantize (the columns of the table), and the names of their projections."""
HEAD = """\
# Shipped policies
The policies that are part of the package; `--qad-policy NAME` selects one. This page is made from
`megatron_qad/quantization/policies/` by `python tools/policies_page.py`; a test fails if it is older than the files.
[Policies](policies.md) describes formats, rules, and how to write one.

## Models and sources"""
FORMATS = """\
## Formats
The format of each kind of layer. `*`: some of its layers have another one ([below](#rules-for-individual-layers)).
`-`: the policy has no rule, because its model has no such layer. Scales of NVFP4 weights are those of
`--qad-weight-scale-rule` where none are named. `latent` are the projections into and out of the latent space of
experts. Routers, embeddings, norms and vision encoders are never quantized."""
EXCEPTIONS = """\
## Rules for individual layers
Rules that select layers by more than their kind, in the order of the file. A rule wins over those before it."""


def shipped() -> list[Path]:
    """Return the policy files, those for any model first."""
    return sorted(SHIPPED.glob("*.yaml"), key=lambda file: (read_yaml(file, file.name)["models"] != "any", file.stem))


def is_for_a_kind(rule: Rule) -> bool:
    """Whether a rule selects layers by their kind alone."""
    return bool(rule.kinds) and rule == Rule(rule.format, rule.scales, rule.update, rule.kinds)


def may_select(rule: Rule, kind: str) -> bool:
    """Whether a rule can match layers of a kind, in a model that has them."""
    if rule.kinds:
        return bool(({kind, "expert"} if kind == "latent" else {kind}) & set(rule.kinds))
    if rule.projections:
        return bool(PROJECTIONS[kind] & set(rule.projections))
    return kind != "head"  # the others are in layers of the decoder


def cell(policy: Policy, kind: str) -> str:
    """Return a table cell: the format of a kind, the scales that its rule names, and ``*`` if layers differ."""
    result, differs = None, False
    for rule in policy.rules:
        if may_select(rule, kind):
            if is_for_a_kind(rule):
                result, differs = rule.result, False
            else:
                differs = differs or rule.result != result
    return "-" if result is None else " ".join(filter(None, result)) + " *" * differs


def page() -> str:
    """Return the content of docs/shipped_policies.md."""
    files = shipped()
    lines = [HEAD, "", "| policy | models | source |", "|---|---|---|"]
    for file in files:
        about = read_yaml(file, file.name)
        lines.append(
            f"| [`{file.stem}`](../{file.relative_to(ROOT)}) | {about['models']} | {about.get('source', '-')} |"
        )
    lines += [
        "",
        FORMATS,
        "",
        "| policy | " + " | ".join((*PROJECTIONS, "KV cache")) + " |",
        "|---" * (len(PROJECTIONS) + 2) + "|",
    ]
    policies = [Policy.load(file.stem) for file in files]
    for policy in policies:
        cells = [cell(policy, kind) for kind in PROJECTIONS]
        lines.append(f"| `{policy.name}` | {' | '.join([*cells, policy.kv_cache])} |")
    lines += ["", EXCEPTIONS]
    for policy in policies:
        if rules := [rule for rule in policy.rules if not is_for_a_kind(rule)]:
            lines += ["", f"`{policy.name}`", "", *(f"    {rule}" for rule in rules)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
