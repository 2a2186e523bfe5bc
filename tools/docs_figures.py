"""Draws the figures of docs/concepts.md and docs/tutorial.md as SVG: ``python tools/docs_figures.py``.

The curve is read from the page of its benchmark. tests/unit/tools/test_docs_figures.py compares the files with the
drawings.
"""

import re
from collections.abc import Callable
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs/images"
CURVE = ROOT / "docs/benchmarks/2026-11-27-smollm2-smoothing.md"
INK, GRAY, BLUE, ORANGE, GREEN = "#1f2937", "#6b7280", "#2563eb", "#c2410c", "#15803d"


class Drawing:
    """A drawing on a light background, which is readable on dark pages, too. Sizes are in pixels."""

    def __init__(self, width: int, height: int, title: str):
        self.width, self.height, self.title, self._parts = width, height, title, []

    def text(self, x: float, y: float, text: str, *, size=13, color=INK, anchor="middle", bold=False) -> None:
        weight = ' font-weight="600"' if bold else ""
        self._parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{color}" text-anchor="{anchor}"{weight}>'
            f"{escape(text)}</text>"
        )

    def box(self, x: float, y: float, width: float, height: float, lines: list[str], color=INK) -> None:
        """A rounded box; the first line is bold."""
        self._parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6" fill="{color}" '
            f'fill-opacity="0.08" stroke="{color}"/>'
        )
        top = y + height / 2 - 8.5 * (len(lines) - 1) + 4.5
        for i, line in enumerate(lines):
            self.text(x + width / 2, top + 17 * i, line, bold=i == 0)

    def line(self, points: list[tuple[float, float]], color=INK, *, arrow=False, dashed=False, width=1.5) -> None:
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        style = ' marker-end="url(#arrow)"' * arrow + ' stroke-dasharray="5 4"' * dashed
        self._parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="{width}"{style}/>')

    def dot(self, x: float, y: float, color: str) -> None:
        self._parts.append(f'<circle cx="{x:g}" cy="{y:g}" r="3.5" fill="{color}"/>')

    def svg(self) -> str:
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" width="{self.width}" '
            f'height="{self.height}" font-family="system-ui, sans-serif" role="img">\n'
            f"<title>{escape(self.title)}</title>\n"
            '<defs><marker id="arrow" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
            f'orient="auto"><path d="M0 0L10 5L0 10z" fill="{INK}"/></marker></defs>\n'
            f'<rect width="{self.width}" height="{self.height}" rx="8" fill="#ffffff"/>'
        )
        return "\n".join([head, *self._parts, "</svg>"]) + "\n"


def nvfp4_block() -> Drawing:
    """Bits of a block."""
    d = Drawing(760, 170, "A block of 16 weights in NVFP4")
    for i in range(16):
        d.box(20 + 30 * i, 50, 28, 40, ["4"], BLUE)
    d.text(260, 36, "16 weights of 4 bits (E2M1: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives)")
    d.box(520, 50, 60, 40, ["8"], ORANGE)
    d.text(550, 112, "block scale", size=12)
    d.text(550, 127, "(E4M3)", size=12)
    d.box(620, 50, 110, 40, ["32"], GREEN)
    d.text(675, 112, "global scale (float32)", size=12)
    d.text(675, 127, "one for the tensor", size=12)
    d.text(507, 75, "x", size=16)
    d.text(600, 75, "x", size=16)
    d.text(260, 112, "weight = code x block scale x global scale", color=GRAY)
    d.text(260, 150, "16 x 4 + 8 = 72 bits for 16 weights: 4.5 bits each", bold=True)
    return d


def training_step() -> Drawing:
    """Passes of a step."""
    d = Drawing(760, 300, "One training step on a rank")
    d.box(20, 115, 110, 60, ["tokens", "of the step"])
    d.box(200, 30, 190, 70, ["teacher", "BF16, frozen", "forward only"], GRAY)
    d.box(200, 180, 190, 70, ["student", "weights and inputs", "with NVFP4 values"], BLUE)
    d.box(455, 105, 160, 70, ["loss", "KL(teacher || student)", "per token"], ORANGE)
    d.box(460, 210, 270, 60, ["optimizer", "float32 masters of the student"], GREEN)
    d.line([(130, 135), (165, 135), (165, 65), (198, 65)], arrow=True)
    d.line([(130, 155), (165, 155), (165, 215), (198, 215)], arrow=True)
    d.line([(390, 65), (535, 65), (535, 103)], arrow=True)
    d.text(400, 56, "hidden states or logits", size=12, color=GRAY, anchor="start")
    d.line([(390, 200), (425, 200), (425, 140), (453, 140)], arrow=True)
    d.text(418, 160, "logits", size=12, color=GRAY, anchor="end")
    d.line([(535, 175), (535, 208)], arrow=True, dashed=True)
    d.text(545, 196, "gradients, through the student", size=12, color=GRAY, anchor="start")
    d.line([(460, 245), (425, 245), (425, 232), (392, 232)], arrow=True)
    d.text(360, 285, "quantized once per update", size=12, color=GRAY)
    d.text(
        20, 22, "Teacher and student are on every rank, with the same parallelism.", anchor="start", size=12, color=GRAY
    )
    return d


def weights() -> Drawing:
    """Copies of a weight."""
    d = Drawing(760, 200, "The three copies of a weight")
    d.box(20, 50, 180, 80, ["master", "float32, in the optimizer", "collects the updates"], GREEN)
    d.box(290, 50, 180, 80, ["parameter", "BF16 with NVFP4 values", "what the student uses"], BLUE)
    d.box(560, 50, 180, 80, ["export", "4-bit codes and scales", "what a server reads"], ORANGE)
    d.line([(200, 80), (288, 80)], arrow=True)
    d.text(244, 70, "quantize", size=12, color=GRAY)
    d.line([(470, 80), (558, 80)], arrow=True)
    d.text(514, 70, "pack", size=12, color=GRAY)
    d.line([(380, 130), (380, 170), (110, 170), (110, 132)], arrow=True, dashed=True)
    d.text(245, 188, "gradient, as if nothing had been rounded (STE)", size=12, color=GRAY)
    d.text(514, 100, "no loss", size=12, color=GRAY)
    d.text(
        20,
        30,
        "One arithmetic for both arrows: what is served is what was trained, bit for bit.",
        anchor="start",
        size=12,
        color=GRAY,
    )
    return d


def kl_curves() -> dict[str, list[float]]:
    """Return the means of 40 steps of each start, from the page of the benchmark."""
    rows = re.findall(r"^\| (original|smoothed) model \| ([\d., ]+) \|$", CURVE.read_text(), re.MULTILINE)
    return {name: [float(value) for value in values.split(", ")] for name, values in rows}


def kl_smollm2() -> Drawing:
    """KL of SmolLM2 in training."""
    d = Drawing(760, 320, "KL of SmolLM2-135M-Instruct in training")
    left, right, top, bottom, steps, highest = 70, 730, 50, 265, 400, 0.25

    def at(step: float, kl: float) -> tuple[float, float]:
        return left + (right - left) * step / steps, bottom - (bottom - top) * kl / highest

    for tick in (0, 0.05, 0.1, 0.15, 0.2, 0.25):
        d.line([at(0, tick), at(steps, tick)], "#e5e7eb", width=1)
        d.text(left - 8, at(0, tick)[1] + 4, f"{tick:g}", size=12, anchor="end", color=GRAY)
    for tick in range(0, steps + 1, 100):
        d.text(at(tick, 0)[0], bottom + 18, str(tick), size=12, color=GRAY)
    d.text((left + right) / 2, bottom + 40, "step (1,024 tokens each)", size=12, color=GRAY)
    d.text(
        20,
        26,
        "SmolLM2-135M-Instruct: training loss, KL to the teacher in nats per token, means of 40 steps",
        anchor="start",
        bold=True,
    )
    for (name, values), color in zip(kl_curves().items(), (ORANGE, BLUE), strict=True):
        points = [at(40 * i + 20, value) for i, value in enumerate(values)]
        d.line(points, color, width=2)
        for point in points:
            d.dot(*point, color)
        below = 24 if color == BLUE else -12
        d.text(points[1][0] + 6, points[1][1] + below, f"from the {name} model", size=12, color=color, anchor="start")
    return d


FIGURES: dict[str, Callable[[], Drawing]] = {
    "nvfp4_block.svg": nvfp4_block,
    "training_step.svg": training_step,
    "weights.svg": weights,
    "kl_smollm2.svg": kl_smollm2,
}

if __name__ == "__main__":
    for name, figure in FIGURES.items():
        (IMAGES / name).write_text(figure().svg(), encoding="utf-8")
