"""How a vision-language model turns an image into tiles and tokens. Needs neither torch nor Megatron."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from megatron_qad.engine.errors import QADError

GRID_RULES = ("closest_ratio", "area_weighted")


@dataclass(frozen=True)
class ImageSettings:
    """Tiles, tokens and special tokens of a family of vision-language models.

    Raises:
        QADError: a number below 1, or an unknown rule.
    """

    family: str
    """Architecture in ``config.json``, such as ``NemotronH_Nano_VL_V2``."""
    tile_size: int
    """Side of a tile in pixels."""
    patch_size: int
    """Side of a patch of the encoder in pixels."""
    max_tiles: int
    """Largest number of tiles of an image, without the thumbnail."""
    use_thumbnail: bool
    """Whether an image of several tiles is followed by one tile that shows all of it."""
    tokens_per_tile: int
    """Number of features, and so of placeholder tokens, of a tile."""
    grid_rule: str
    """How the grid of tiles is chosen, see ``tiling.choose_grid``: "closest_ratio" or "area_weighted"."""
    image_token: str
    """Placeholder of one feature, such as ``<image>``."""
    image_token_id: int
    start_token: str
    """Token before the placeholders of an image, such as ``<img>``."""
    start_token_id: int
    end_token: str
    """Token after the placeholders of an image, such as ``</img>``."""
    end_token_id: int

    def __post_init__(self):
        for name in ("tile_size", "patch_size", "max_tiles", "tokens_per_tile"):
            if getattr(self, name) < 1:
                raise QADError(f"image settings: {name} is {getattr(self, name)}, expected at least 1.")
        if self.grid_rule not in GRID_RULES:
            raise QADError(f"image settings: grid_rule is {self.grid_rule!r}, expected one of {', '.join(GRID_RULES)}.")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, as PREFIX.json has them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "ImageSettings":
        """Return the settings of a dict of ``to_dict``.

        Raises:
            QADError: a field is missing, unknown, or has another type.
        """
        types = {field.name: field.type for field in dataclasses.fields(cls)}
        wrong = [name for name in content if name not in types]
        wrong += [name for name, kind in types.items() if name not in content or type(content[name]) is not kind]
        if wrong:
            raise QADError(f"image settings: {wrong[0]!r} is {content.get(wrong[0])!r}. Prepare the data again.")
        return cls(**content)

    def differences(self, other: "ImageSettings") -> list[str]:
        """Return "name: value here, value there" for each field in which two settings differ."""
        mine, theirs = self.to_dict(), other.to_dict()
        return [f"{name}: {mine[name]!r}, {theirs[name]!r}" for name in mine if mine[name] != theirs[name]]
