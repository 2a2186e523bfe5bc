"""The pictures of the example: a colored shape and a digit in two quarters of a noisy gray square."""

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIDE = 64
"""Side of a picture in pixels, one tile."""
SHAPES = ("circle", "square", "triangle", "cross", "ring", "diamond")
COLORS = {
    "red": (205, 50, 50),
    "green": (50, 160, 60),
    "blue": (60, 80, 205),
    "yellow": (215, 200, 60),
    "purple": (150, 60, 170),
    "orange": (225, 130, 40),
}
PLACES = ("top-left", "top-right", "bottom-left", "bottom-right")


@dataclass(frozen=True)
class Picture:
    """What a picture shows; ``seed`` decides its noise and where in their quarters shape and digit are."""

    shape: str
    color: str
    digit: int
    shape_place: str
    digit_place: str
    seed: int

    @property
    def caption(self) -> str:
        return f"{self.color} {self.shape} {self.shape_place} {self.digit} {self.digit_place}"

    def questions(self) -> list[tuple[str, str, str]]:
        """Return (question, short answer, answer as a sentence); the short answer is one word of the sentence."""
        return [
            ("which shape ?", self.shape, f"the shape is a {self.shape} ."),
            ("which color ?", self.color, f"the color is {self.color} ."),
            ("which digit ?", str(self.digit), f"the digit is a {self.digit} ."),
            ("where is the shape ?", self.shape_place, f"it is at the {self.shape_place} ."),
            ("where is the digit ?", self.digit_place, f"it is at the {self.digit_place} ."),
        ]

    def draw(self) -> Image.Image:
        """Return the picture as RGB."""
        rng = np.random.default_rng(self.seed)
        noise = rng.normal(128, 12, (SIDE, SIDE, 1)) + rng.normal(0, 8, (SIDE, SIDE, 3))
        image = Image.fromarray(noise.clip(0, 255).astype(np.uint8))
        draw, half = ImageDraw.Draw(image), SIDE // 2
        x, y = (c + int(shift) for c, shift in zip(_corner(self.shape_place), rng.integers(3, 8, 2), strict=True))
        color = tuple(int(c) for c in (np.array(COLORS[self.color]) + rng.integers(-20, 21, 3)).clip(0, 255))
        _draw_shape(draw, self.shape, x, y, half - 11, color)
        x, y = (c + int(shift) for c, shift in zip(_corner(self.digit_place), rng.integers(6, 12, 2), strict=True))
        draw.text((x, y - 4), str(self.digit), fill=(15, 15, 15), font=_font())
        return image


def random_picture(rng: np.random.Generator) -> Picture:
    """Return a picture; every property is drawn uniformly, and both places differ."""
    shape_place, digit_place = rng.choice(len(PLACES), 2, replace=False)
    return Picture(
        shape=SHAPES[rng.integers(len(SHAPES))],
        color=list(COLORS)[rng.integers(len(COLORS))],
        digit=int(rng.integers(10)),
        shape_place=PLACES[shape_place],
        digit_place=PLACES[digit_place],
        seed=int(rng.integers(2**31)),
    )


@cache
def _font() -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(22)


def _corner(place: str) -> tuple[int, int]:
    half = SIDE // 2
    return half * place.endswith("right"), half * place.startswith("bottom")


def _draw_shape(draw: ImageDraw.ImageDraw, shape: str, x: int, y: int, size: int, color: tuple[int, ...]) -> None:
    """Draw a shape that fills the square of ``size`` pixels at (x, y)."""
    right, bottom, half, third = x + size, y + size, size // 2, size // 3
    if shape == "circle":
        draw.ellipse((x, y, right, bottom), fill=color)
    elif shape == "ring":
        draw.ellipse((x, y, right, bottom), outline=color, width=5)
    elif shape == "square":
        draw.rectangle((x, y, right, bottom), fill=color)
    elif shape == "triangle":
        draw.polygon(((x + half, y), (right, bottom), (x, bottom)), fill=color)
    elif shape == "diamond":
        draw.polygon(((x + half, y), (right, y + half), (x + half, bottom), (x, y + half)), fill=color)
    else:
        draw.rectangle((x + third, y, right - third, bottom), fill=color)
        draw.rectangle((x, y + third, right, bottom - third), fill=color)
