"""Policy map, formats as colors, and sizes before and after quantization."""

from collections.abc import Sequence

from megatron_qad.formats.format_registry import FORMATS, UNQUANTIZED
from megatron_qad.quantization.format_table import Row, Total, totals
from megatron_qad.report.html_page.grid_table import grid_table
from megatron_qad.report.html_page.markup import Markup, code, element, paragraph, table
from megatron_qad.report.linear_grid import LinearGrid
from megatron_qad.report.run_policies import RunPolicy

_NUM_COLORS = 5
"""The first formats of the registry have a color of their own in the stylesheet, ``--color-0`` and so on."""


def policy_section(policies: Sequence[RunPolicy]) -> list[Markup]:
    """Return a map and a table of sizes for each different policy of the runs."""
    if not policies:
        return [paragraph("No run has a qad.json, so the formats of its linears are unknown.")]
    parts: list[Markup] = []
    for policy in policies:
        if len(policies) > 1:
            parts.append(element("h3", ", ".join(policy.runs)))
        scales = ", ".join(dict.fromkeys(row.scales for row in policy.rows.values() if row.scales)) or "none"
        kv_cache = "not quantized" if policy.kv_cache == UNQUANTIZED.name else policy.kv_cache
        parts += [
            paragraph(
                "Policy ",
                code(policy.name),
                f"; block scales: {scales}; KV cache: {kv_cache}. Each cell is one weight of Megatron, which holds the "
                "named Hugging Face weights of a layer. Columns are layers.",
            ),
            _legend(policy),
            _map(policy),
            _sizes(policy),
        ]
    return parts


def color_of(fmt: str) -> str:
    place = list(FORMATS).index(fmt) if fmt in FORMATS else _NUM_COLORS
    return f"var(--{f'color-{place}' if place < _NUM_COLORS else 'other'})"


def _legend(policy: RunPolicy) -> Markup:
    formats = [name for name in FORMATS if any(row.format == name for row in policy.rows.values())]
    entries = [
        element(
            "span",
            element("span", class_="swatch", style=f"background: {color_of(name)}"),
            f"{name}: {FORMATS[name].description}",
        )
        for name in formats
    ]
    return element("p", entries, class_="legend")


def _map(policy: RunPolicy) -> Markup:
    grid: LinearGrid = policy.grid
    has_room = len(grid.columns) <= 12

    def cell(row: int, column: int) -> Markup | None:
        names = grid.cells.get((grid.rows[row], grid.columns[column]))
        if names is None:
            return None
        rows = [policy.rows[name] for name in names]
        fmt = rows[0].format  # policies give all experts of a layer one format
        title = _title(grid.columns[column], grid.rows[row].label, rows)
        text = fmt if has_room else None
        return element("td", text, class_="format", title=title, style=f"background: {color_of(fmt)}")

    return grid_table([(row.kind, row.label) for row in grid.rows], grid.columns, cell)


def _title(column: str, label: str, rows: Sequence[Row]) -> str:
    shape = " x ".join(map(str, rows[0].shape))
    number = f"{len(rows)} experts, each " if len(rows) > 1 else ""
    place = f"layer {column}" if column.isdigit() else column
    scales = f", scales {rows[0].scales}" if rows[0].scales else ""
    tied = ", tied to the embedding" if rows[0].is_tied else ""
    return f"{place}, {label}: {rows[0].format} ({number}{shape}{scales}{tied})"


def _sizes(policy: RunPolicy) -> Markup:
    before, after = policy.bytes_before, policy.bytes_after
    rows = [
        _size_row(name, total, FORMATS[name].description) for name, total in totals(list(policy.rows.values())).items()
    ]
    other = size_text(policy.other_bytes)
    rows.append(["all other tensors (embeddings, norms)", "", other, other, ""])
    rows.append([element("b", "model"), "", size_text(before), element("b", size_text(after)), f"{after / before:.1%}"])
    heads = ["weights", "linears", "in BF16", "quantized", "of BF16"]
    bars = [
        ["BF16", _bar(1.0, "bf16"), size_text(before)],
        ["quantized", _bar(after / before, _largest_format(policy)), f"{size_text(after)} ({after / before:.1%})"],
    ]
    return element(
        "div",
        element("h3", "Size of the weights"),
        element(
            "table", element("tbody", [element("tr", [element("td", c) for c in r]) for r in bars]), class_="sizes"
        ),
        table(heads, rows),
        paragraph(
            "Computed from shapes and formats: codes, block scales and the scales of weights and inputs. Tensors that "
            "are not quantized count as BF16.",
            class_="note",
        ),
    )


def _size_row(name: str, total: Total, description: str) -> list:
    share = f"{total.bytes_after / total.bytes_before:.1%}" if total.bytes_before else ""
    sizes = [size_text(total.bytes_before), size_text(total.bytes_after)]
    return [f"{name}: {description}", f"{total.num_linears:,}", *sizes, share]


def _bar(share: float, fmt: str) -> Markup:
    return element("span", class_="bar", style=f"width: {360 * share:.0f}px; background: {color_of(fmt)}")


def _largest_format(policy: RunPolicy) -> str:
    """Return the quantized format with the most weights."""
    found = totals(list(policy.rows.values()))
    quantized = {name: total.num_weights for name, total in found.items() if name != UNQUANTIZED.name}
    return max(quantized, key=quantized.get, default=UNQUANTIZED.name)


def size_text(num_bytes: float) -> str:
    """Return a size in decimal units, such as "1.30 GB"."""
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes:.0f} B"
