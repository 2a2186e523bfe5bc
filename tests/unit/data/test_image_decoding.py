"""Decoding of image files: orientation, color, transparency, animations, and every kind of bad file."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from megatron_qad.data.bad_document import BadDocument
from megatron_qad.data.images import image_decoding
from megatron_qad.data.images.image_decoding import decode_image


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def test_exif_orientation_is_applied():
    image = Image.new("RGB", (32, 16), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise
    assert decode_image(encoded(image, "JPEG", exif=exif), "x").size == (16, 32)
    assert decode_image(encoded(image, "JPEG"), "x").size == (32, 16)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "RGB", "YCbCr"])
def test_colors_become_rgb(mode):
    kind = "JPEG" if mode in ("CMYK", "YCbCr") else "PNG"
    image = decode_image(encoded(Image.new("RGB", (16, 16), "white").convert(mode), kind), "x")
    assert image.mode == "RGB"
    assert np.asarray(image).min() >= 253, "JPEG may be off by two"


def test_gray_of_16_bits_keeps_the_upper_8():
    pixels = np.array([[0, 256, 0x80FF, 65535]], dtype=np.uint16)
    assert np.asarray(decode_image(encoded(Image.fromarray(pixels)), "x"))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_transparent_pixels_are_white():
    clear, half = Image.new("RGBA", (2, 2), (0, 0, 0, 0)), Image.new("RGBA", (2, 2), (255, 0, 0, 128))
    assert np.asarray(decode_image(encoded(clear), "x")).min() == 255
    assert np.asarray(decode_image(encoded(half), "x"))[0, 0].tolist() == [255, 127, 127]
    palette = Image.new("P", (2, 2), 0)
    assert np.asarray(decode_image(encoded(palette, transparency=0), "x")).min() == 255
    gray = Image.new("LA", (2, 2), (0, 0))
    assert np.asarray(decode_image(encoded(gray), "x")).min() == 255


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_first_image_of_an_animation(kind):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert np.asarray(decode_image(data, "x"))[0, 0].tolist() == [255, 0, 0]


def bomb() -> bytes:
    """A PNG of 100,000 x 100,000 pixels in its header."""
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    lengths = [struct.pack(">I", len(body)) + name + body for name, body in chunks]
    sums = [struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(a + b for a, b in zip(lengths, sums, strict=True))


@pytest.mark.parametrize(
    "data, problem",
    [
        (b"", "x is empty"),
        (b"hello", "x is 5 bytes that are no image of the formats JPEG, PNG"),
        (b"%PDF-1.4 and so on", "no image of the formats"),
        (encoded(Image.effect_noise((64, 64), 50))[:1000], "x is damaged"),
        (encoded(Image.effect_noise((64, 64), 50), "JPEG")[:800], "x is damaged"),
        (encoded(Image.effect_noise((64, 64), 50), "TIFF")[:800], "x is damaged|no image"),
        (bomb(), "x has more than 89,478,485 pixels"),
        (encoded(Image.new("F", (4, 4)), "TIFF"), "x has 32-bit pixels"),
    ],
)
def test_bad_files_are_named(data, problem):
    with pytest.raises(BadDocument, match=problem):
        decode_image(data, "x")


def test_limits_of_pixels_and_bytes(monkeypatch):
    monkeypatch.setattr(image_decoding, "MAX_PIXELS", 63)
    with pytest.raises(BadDocument, match=r"x has more than 63 pixels \(8 x 8\)"):
        decode_image(encoded(Image.new("RGB", (8, 8))), "x")
    monkeypatch.setattr(image_decoding, "MAX_BYTES", 10)
    with pytest.raises(BadDocument, match="more than the 10 that are read"):
        decode_image(bytes(11), "x")
