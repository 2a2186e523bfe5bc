"""Settings of images in vision-language models, for the preparation of data and for jobs."""

from collections.abc import Callable
from typing import Any

from megatron_qad.config.megatron_flags import MegatronFlags
from megatron_qad.config.model_config import ModelConfig
from megatron_qad.data.blends import read_blends
from megatron_qad.data.images.image_settings import ImageSettings
from megatron_qad.data.metadata import load_metadata
from megatron_qad.engine import config_values as values
from megatron_qad.engine.errors import QADError
from megatron_qad.models.families import FAMILIES, family_of
from megatron_qad.models.families.radio_vision import check_sizes

START_TOKEN, END_TOKEN = "<img>", "</img>"
"""Tokens around the placeholders of an image in all supported families."""


def image_settings(
    hf_config: dict[str, Any], token_id: Callable[[str], int | None], processor: dict[str, Any] | None = None
) -> ImageSettings:
    """Return how a model turns images into tiles and tokens.

    Args:
        hf_config: the model's config.json.
        token_id: returns the id of one of the tokenizer's tokens, or None if it has no such token.
        processor: the model's preprocessor_config.json, whose number of tiles and thumbnail servers use.

    Raises:
        QADError: the model has no vision encoder, its sizes contradict each other, or the tokenizer lacks a token.
    """
    family = family_of(hf_config)
    if family.vision is None:
        known = ", ".join(sorted(name for name, other in FAMILIES.items() if other.vision is not None))
        raise QADError(f"{family.architecture} has no vision encoder, so it takes no images. Expected one of {known}.")
    vision, processor = family.vision(hf_config), processor or {}
    check_sizes(hf_config, vision)
    ids = {}
    for token in (vision.image_token, START_TOKEN, END_TOKEN):
        ids[token] = token_id(token)
        if ids[token] is None:
            raise QADError(f"the tokenizer has no token {token!r}, which marks images. Use the model's own tokenizer.")
    declared = values.integer(hf_config, "img_context_token_id", ids[vision.image_token])
    if declared != ids[vision.image_token]:
        raise QADError(
            f"{values.place(hf_config)}: img_context_token_id is {declared}, but {vision.image_token!r} is "
            f"{ids[vision.image_token]} in the tokenizer. Use the model's own tokenizer."
        )
    return ImageSettings(
        family=family.architecture,
        tile_size=vision.tile_size,
        patch_size=vision.patch_size,
        max_tiles=values.integer(processor, "max_num_tiles", vision.max_tiles),
        use_thumbnail=values.flag(processor, "use_thumbnail", vision.use_thumbnail),
        tokens_per_tile=vision.tokens_per_tile,
        grid_rule=vision.grid_rule,
        image_token=vision.image_token,
        image_token_id=ids[vision.image_token],
        start_token=START_TOKEN,
        start_token_id=ids[START_TOKEN],
        end_token=END_TOKEN,
        end_token_id=ids[END_TOKEN],
    )


def images_of_data(flags: MegatronFlags, student: ModelConfig) -> ImageSettings | None:
    """Return the settings of the images in a job's data, from PREFIX.json, or None if no data has images.

    Raises:
        QADError: the student has no vision encoder, or another size of tiles, number of tokens or placeholder.
    """
    blend, blend_per_split = read_blends(flags)
    prefixes = [prefix for part in (blend, *(blend_per_split or ())) if part is not None for prefix in part[0]]
    for prefix in prefixes:
        metadata = load_metadata(prefix)
        if metadata is not None and (images := metadata.image_settings()) is not None:
            _check_images(images, prefix, student)
            return images  # those of the other prefixes are compared with these when the data is opened
    return None


def _check_images(images: ImageSettings, prefix: str, student: ModelConfig) -> None:
    advice = f"Prepare the data again with --images-for {student.checkpoint}/hf"
    if student.family.vision is None:
        raise QADError(
            f"--data-path {prefix}: has images for {images.family}, but the student {student.checkpoint} "
            f"({student.family.architecture}) has no vision encoder. Give a vision-language model, or data without "
            "images."
        )
    vision = student.family.vision(student.hf)
    check_sizes(student.hf, vision)
    pairs = {
        "tile_size": (images.tile_size, vision.tile_size),
        "patch_size": (images.patch_size, vision.patch_size),
        "tokens_per_tile": (images.tokens_per_tile, vision.tokens_per_tile),
        "grid_rule": (images.grid_rule, vision.grid_rule),
        "image_token_id": (
            images.image_token_id,
            values.integer(student.hf, "img_context_token_id", images.image_token_id),
        ),
    }
    for name, (found, expected) in pairs.items():
        if found != expected:
            raise QADError(
                f"--data-path {prefix}: its images have {name} {found!r}, but the student {student.checkpoint} has "
                f"{expected!r}. {advice}."
            )
