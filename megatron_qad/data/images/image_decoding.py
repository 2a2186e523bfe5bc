"""Decodes the bytes of an image file to RGB, as inference servers do it.

- The orientation in EXIF is applied.
- Palettes, gray and other color spaces become RGB; gray of 16 bits keeps its upper 8.
- Transparent pixels are composited on white.
- Of an animation or a file with several pages, the first image is taken.
"""

import io
import warnings

import numpy as np
from PIL import Image, ImageOps

from megatron_qad.data.bad_document import BadDocument
from megatron_qad.data.images.image_sources import MAX_BYTES

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""Formats that are read, with Pillow's names."""
MAX_PIXELS = 89_478_485
"""Largest number of pixels, the number from which Pillow warns of a decompression bomb: 256 MiB as RGB."""


def decode_image(data: bytes, name: str) -> Image.Image:
    """Return the image of a file's bytes in mode RGB.

    Args:
        name: names the image in errors.

    Raises:
        BadDocument: it is no image of a known format, damaged, or too large.
    """
    if len(data) > MAX_BYTES:
        raise BadDocument(f"{name} has {len(data):,} bytes, more than the {MAX_BYTES:,} that are read")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images, which are compared below, and of odd metadata
            with Image.open(io.BytesIO(data), formats=FORMATS) as file:
                _check_size(file, name)
                file.load()
                image = ImageOps.exif_transpose(file)
                return _to_rgb(image, name)
    except Image.DecompressionBombError as error:
        raise _too_large(name, str(error)) from error
    except Image.UnidentifiedImageError as error:
        kind = f"{len(data)} bytes that are no image of the formats {', '.join(FORMATS)}" if data else "empty"
        raise BadDocument(f"{name} is {kind}") from error
    except BadDocument:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, and others
        raise BadDocument(f"{name} is damaged ({type(error).__name__}: {error})") from error


def _check_size(file: Image.Image, name: str) -> None:
    if file.width * file.height > MAX_PIXELS:
        raise _too_large(name, f"{file.width} x {file.height}")


def _too_large(name: str, found: str) -> BadDocument:
    return BadDocument(f"{name} has more than {MAX_PIXELS:,} pixels ({found})")


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode in ("I", "F"):
        raise BadDocument(f"{name} has 32-bit pixels (mode {image.mode}), which have no defined brightness")
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")
