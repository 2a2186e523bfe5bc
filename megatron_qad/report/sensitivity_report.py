"""Output of ``megatron-qad sensitivity``: a table, a figure and the numbers of a sensitivity measurement."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure  # not pyplot: no display

from megatron_qad.engine.run_directory import manifest
from megatron_qad.engine.system_errors import naming
from megatron_qad.training.sensitivity import Sensitivities


def write_sensitivity(
    sensitivities: Sensitivities,
    formats: Sequence[str],
    output: Path,
    *,
    title: str,
    chosen: Mapping[str, str] | None = None,
    proposal_kl: float | None = None,
    budget_bytes: int | None = None,
) -> None:
    """Write sensitivity.md, .png and .json to ``output``, with the proposed format of each unit if there is one."""
    output.mkdir(parents=True, exist_ok=True)
    _write_json(sensitivities, output / "sensitivity.json", chosen, proposal_kl)
    text = _markdown(sensitivities, formats, title, chosen, proposal_kl, budget_bytes)
    manifest.write_atomically(output / "sensitivity.md", text)
    _draw(sensitivities, formats, output / "sensitivity.png", title, chosen)


def _markdown(sensitivities: Sensitivities, formats, title, chosen, proposal_kl, budget_bytes) -> str:
    names = " | ".join(f"KL as {fmt}" for fmt in formats)
    lines = [f"# {title}", ""]
    lines += [
        f"KL(unquantized || quantized) in nats per token over {sensitivities.num_tokens:,} held-out tokens, with one "
        "unit quantized at a time.",
        "",
        f"| quantized | {names} |",
        "|---" * (1 + len(formats)) + "|",
    ]
    lines.append("| everything | " + " | ".join(f"{sensitivities.everything[fmt]:.5g}" for fmt in formats) + " |")
    for kind in dict.fromkeys(unit.kind for unit in sensitivities.units):
        lines.append(
            f"| every {kind} | " + " | ".join(f"{sensitivities.by_kind[kind, fmt]:.5g}" for fmt in formats) + " |"
        )
    total = " | ".join(f"{sum(sensitivities.by_unit[u.name, fmt] for u in sensitivities.units):.5g}" for fmt in formats)
    lines += [f"| sum of the units below | {total} |", ""]
    if chosen is not None:
        size = sum(unit.bytes_as(chosen[unit.name]) for unit in sensitivities.units)
        lines += [
            f"Proposal for a budget of {budget_bytes:,} bytes: {size:,} bytes, KL {proposal_kl:.5g} before any "
            "training (policy.yaml).",
            "",
        ]
    lines += [f"| layer | kind | {names} | proposed |", "|---" * (3 + len(formats)) + "|"]
    for unit in sensitivities.units:
        kls = " | ".join(f"{sensitivities.by_unit[unit.name, fmt]:.3g}" for fmt in formats)
        layer = unit.name if unit.layer is None else unit.layer
        lines.append(f"| {layer} | {unit.kind} | {kls} | {chosen[unit.name] if chosen else ''} |")
    return "\n".join(lines) + "\n"


def _write_json(sensitivities: Sensitivities, file: Path, chosen, proposal_kl) -> None:
    document = {
        "num_tokens": sensitivities.num_tokens,
        "everything": sensitivities.everything,
        "kinds": [{"kind": kind, "format": fmt, "kl": kl} for (kind, fmt), kl in sensitivities.by_kind.items()],
        "units": [{"name": name, "format": fmt, "kl": kl} for (name, fmt), kl in sensitivities.by_unit.items()],
        "proposal": None if chosen is None else {"formats": dict(chosen), "kl": proposal_kl},
    }
    manifest.write_atomically(file, json.dumps(document, indent=1) + "\n")


def _draw(sensitivities: Sensitivities, formats, file: Path, title: str, chosen) -> None:
    """Draw the KL of each unit in each format; mark units for which the proposal has a larger format."""
    figure = Figure(figsize=(max(8, 0.22 * len(sensitivities.units)), 4.5 * len(formats)), layout="constrained")
    figure.suptitle(title)
    kinds = list(dict.fromkeys(unit.kind for unit in sensitivities.units))
    for axes, fmt in zip(figure.subplots(len(formats), 1, squeeze=False).flat, formats, strict=True):
        for i, kind in enumerate(kinds):
            positions = [i_unit for i_unit, unit in enumerate(sensitivities.units) if unit.kind == kind]
            heights = [sensitivities.by_unit[sensitivities.units[i_unit].name, fmt] for i_unit in positions]
            axes.bar(positions, heights, color=f"C{i}", label=kind)
        larger = [i_unit for i_unit, unit in enumerate(sensitivities.units) if chosen and chosen[unit.name] != fmt]
        tops = [sensitivities.by_unit[sensitivities.units[i_unit].name, fmt] for i_unit in larger]
        if larger:
            axes.plot(larger, tops, "kv", markersize=5, label="proposed in a larger format")
        axes.set(title=f"only this layer in {fmt}", xlabel="layer", ylabel="KL, nats per token", yscale="log")
        labels = [unit.name if unit.layer is None else str(unit.layer) for unit in sensitivities.units]
        step = max(1, len(labels) // 40)
        axes.set_xticks(range(0, len(labels), step), labels[::step], fontsize="small")
        axes.grid(axis="y", alpha=0.3)
        axes.legend()
    with naming(file):
        figure.savefig(file, dpi=110)
