"""What ``tools/sensitivity.py`` writes: a table, a picture and the numbers of a sensitivity measurement."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure  # not pyplot: no display

from megatron_qad.training.sensitivity import Sensitivities


def write_sensitivity(
    found: Sensitivities,
    formats: Sequence[str],
    output: Path,
    *,
    title: str,
    chosen: Mapping[str, str] | None = None,
    proposal_kl: float | None = None,
    budget_bytes: int | None = None,
) -> None:
    """sensitivity.md, .png and .json in ``output``; with the proposed format of each unit, if there is one."""
    output.mkdir(parents=True, exist_ok=True)
    _write_json(found, output / "sensitivity.json", chosen, proposal_kl)
    (output / "sensitivity.md").write_text(_markdown(found, formats, title, chosen, proposal_kl, budget_bytes))
    _draw(found, formats, output / "sensitivity.png", title, chosen)


def _markdown(found: Sensitivities, formats, title, chosen, proposal_kl, budget_bytes) -> str:
    names = " | ".join(f"KL as {fmt}" for fmt in formats)
    lines = [f"# {title}", ""]
    lines += [
        f"KL(unquantized || quantized) in nats a token over {found.num_tokens:,} held-out tokens; one unit quantized "
        "at a time.",
        "",
        f"| quantized | {names} |",
        "|---" * (1 + len(formats)) + "|",
    ]
    lines.append("| everything | " + " | ".join(f"{found.everything[fmt]:.5g}" for fmt in formats) + " |")
    for kind in dict.fromkeys(unit.kind for unit in found.units):
        lines.append(f"| every {kind} | " + " | ".join(f"{found.by_kind[kind, fmt]:.5g}" for fmt in formats) + " |")
    total = " | ".join(f"{sum(found.by_unit[u.name, fmt] for u in found.units):.5g}" for fmt in formats)
    lines += [f"| sum of the units below | {total} |", ""]
    if chosen is not None:
        size = sum(unit.bytes_as(chosen[unit.name]) for unit in found.units)
        lines += [
            f"Proposed under {budget_bytes:,} bytes: {size:,} bytes, KL {proposal_kl:.5g} (policy.yaml; before any "
            "training).",
            "",
        ]
    lines += [f"| layer | kind | {names} | proposed |", "|---" * (3 + len(formats)) + "|"]
    for unit in found.units:
        kls = " | ".join(f"{found.by_unit[unit.name, fmt]:.3g}" for fmt in formats)
        layer = unit.name if unit.layer is None else unit.layer
        lines.append(f"| {layer} | {unit.kind} | {kls} | {chosen[unit.name] if chosen else ''} |")
    return "\n".join(lines) + "\n"


def _write_json(found: Sensitivities, file: Path, chosen, proposal_kl) -> None:
    document = {
        "num_tokens": found.num_tokens,
        "everything": found.everything,
        "kinds": [{"kind": kind, "format": fmt, "kl": kl} for (kind, fmt), kl in found.by_kind.items()],
        "units": [{"name": name, "format": fmt, "kl": kl} for (name, fmt), kl in found.by_unit.items()],
        "proposal": None if chosen is None else {"formats": dict(chosen), "kl": proposal_kl},
    }
    file.write_text(json.dumps(document, indent=1) + "\n")


def _draw(found: Sensitivities, formats, file: Path, title: str, chosen) -> None:
    """One group of bars for each format; what the proposal keeps out of the smallest format is marked."""
    figure = Figure(figsize=(max(8, 0.22 * len(found.units)), 4.5 * len(formats)), layout="constrained")
    figure.suptitle(title)
    kinds = list(dict.fromkeys(unit.kind for unit in found.units))
    for axes, fmt in zip(figure.subplots(len(formats), 1, squeeze=False).flat, formats, strict=True):
        for i, kind in enumerate(kinds):
            places = [place for place, unit in enumerate(found.units) if unit.kind == kind]
            heights = [found.by_unit[found.units[place].name, fmt] for place in places]
            axes.bar(places, heights, color=f"C{i}", label=kind)
        kept = [place for place, unit in enumerate(found.units) if chosen and chosen[unit.name] != fmt]
        tops = [found.by_unit[found.units[place].name, fmt] for place in kept]
        if kept:
            axes.plot(kept, tops, "kv", markersize=5, label="proposed in a larger format")
        axes.set(title=f"only this layer in {fmt}", xlabel="layer", ylabel="KL, nats a token", yscale="log")
        labels = [unit.name if unit.layer is None else str(unit.layer) for unit in found.units]
        step = max(1, len(labels) // 40)
        axes.set_xticks(range(0, len(labels), step), labels[::step], fontsize="small")
        axes.grid(axis="y", alpha=0.3)
        axes.legend()
    figure.savefig(file, dpi=110)
