"""What becomes of files of all kinds, sizes and depths: PIL's own pixels, upright."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from lockstep.data.decoding import decode, decode_row, open_image
from lockstep.data.sources.source import Split, open_encoded


def test_decode_resizes_the_shorter_side_and_cuts_the_centre() -> None:
    pixels = np.zeros((40, 80, 3), dtype=np.uint8)
    pixels[:, 20:60] = 200  # the centre square
    for image in (Image.fromarray(pixels), Image.fromarray(pixels.transpose(1, 0, 2))):
        assert (decode(image, (40, 40, 3), 40) == 200).all()
        assert (decode(image, (20, 20, 3), 22) == 200).all()
        edges = decode(image, (20, 24, 3) if image.width > image.height else (24, 20, 3), 20)
        assert edges.min() < 100 and (edges == 200).mean() > 0.7


def test_decode_converts_modes() -> None:
    red = Image.new("RGB", (3, 2), (255, 0, 0))
    assert decode(red, (2, 3, 1), None).shape == (2, 3, 1)
    assert decode(red, (2, 3, 1), None)[0, 0, 0] == 76
    for mode in ("P", "RGBA", "CMYK"):
        assert decode(red.convert(mode), (2, 3, 3), None)[1, 2].tolist()[0] > 250
    assert decode(Image.new("1", (3, 2), 1), (2, 3, 1), None).tolist() == [[[255]] * 3] * 2


def see_through(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


_FRAMES = {"save_all": True, "append_images": [Image.new("RGB", (9, 7))]}
_PROFILES = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
FILES: dict[str, tuple[Callable[[Image.Image], Image.Image], dict[str, Any]]] = {
    "cmyk.jpg": (lambda image: image.convert("CMYK"), {}),
    "palette.png": (lambda image: image.convert("P", palette=Image.Palette.ADAPTIVE), {}),
    "palette with a transparent colour.png": (lambda image: image.convert("P"), {"transparency": 3}),
    "transparent.png": (see_through, {}),
    "transparent.webp": (see_through, {"lossless": True}),
    "grey and transparent.png": (lambda image: see_through(image).convert("LA"), {}),
    "black and white.png": (lambda image: image.convert("1"), {}),
    "lab.tif": (lambda image: ImageCms.profileToProfile(image, *_PROFILES, outputMode="LAB"), {}),
    "several frames.gif": (lambda image: image.convert("P"), _FRAMES),
    "several frames.webp": (lambda image: image, _FRAMES),
    "several pages.tif": (lambda image: image, _FRAMES),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("channels", [1, 3])
def test_files_of_all_kinds_are_what_pil_makes_of_them(name: str, channels: int, tmp_path: Path) -> None:
    """PIL's own conversion of the first frame, as torchvision and timm have it: transparency is dropped."""
    change, arguments = FILES[name]
    noise = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    change(Image.fromarray(noise)).save(tmp_path / name, **arguments)
    split = Split("train", np.zeros(1), lambda row: open_encoded(str(tmp_path / name)), str)
    with Image.open(tmp_path / name) as image:
        image = image.convert("RGB") if image.mode == "LAB" else image
        expected = np.asarray(image.convert("L" if channels == 1 else "RGB")).reshape(7, 9, channels)
    assert np.ptp(expected) > 100
    assert np.array_equal(decode_row(split, 0, (7, 9, channels), None), expected)


def test_sixteen_bit_colour_is_its_upper_byte(tmp_path: Path) -> None:
    """PIL reads it so; a PNG of two pixels is written here, as PIL writes none of that depth."""
    pixels = np.array([[[0x0102, 0x8000, 0xFFFF], [0x00FF, 0x0100, 0x7FFF]]], dtype=">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0))
    content = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    split = Split("train", np.zeros(1), lambda row: open_encoded(io.BytesIO(content)), str)
    assert decode_row(split, 0, (1, 2, 3), None).tolist() == [[[1, 0x80, 0xFF], [0, 1, 0x7F]]]


def test_sixteen_bit_grey_keeps_its_range_and_wider_pixels_are_refused(tmp_path) -> None:
    deep = Image.fromarray(np.array([[0, 256, 32768, 65535]], dtype=np.uint16))
    deep.save(tmp_path / "deep.png")
    files = [tmp_path / "deep.png", tmp_path / "wide.tif"]
    Image.fromarray(np.array([[0, 70000]], dtype=np.int32)).save(files[1])
    split = Split("train", np.zeros(2, dtype=np.int64), lambda row: Image.open(files[row]), lambda row: str(files[row]))
    assert decode_row(split, 0, (1, 4, 1), None).ravel().tolist() == [0, 1, 128, 255]
    assert open_image(split, 0).size == (4, 1)
    with pytest.raises(ValueError, match="wide.tif has 32-bit pixels"):
        decode_row(split, 1, (1, 2, 1), None)


@pytest.mark.parametrize("size", [(60_000, 1), (1, 60_000), (4_000, 100)])
def test_a_very_long_image_takes_little_memory(size: tuple[int, int]) -> None:
    """A PNG of 254 bytes would have been resized to 15 million times 256 pixels."""
    image = Image.new("RGB", size, (7, 8, 9))
    image.paste((200, 100, 50), tuple(side // 2 for side in size) + tuple(side // 2 + 1 for side in size))
    assert decode(image, (224, 224, 3), 256).shape == (224, 224, 3)


def test_an_image_of_usual_shape_is_seen_whole() -> None:
    wide = Image.effect_noise((400, 100), 50).convert("RGB")
    whole = wide.resize((1024, 256), Image.Resampling.BILINEAR).crop((400, 16, 624, 240))
    assert np.array_equal(decode(wide, (224, 224, 3), 256), np.asarray(whole))


def photo(orientation: int | bytes) -> Callable[[int], Image.Image]:
    """A JPEG file of 4x2 pixels, black on the left and white on the right, with that orientation in its EXIF data."""
    pixels = np.zeros((16, 32), np.uint8)
    pixels[:, 16:] = 255
    tags: Image.Exif | bytes = Image.Exif()
    if isinstance(orientation, bytes):
        tags = orientation
    else:
        tags[0x0112] = orientation  # type: ignore[index]
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=100, exif=tags)
    return lambda row: open_encoded(io.BytesIO(file.getvalue()))


@pytest.mark.parametrize(
    ("orientation", "dark"),
    [
        (1, "left"),
        (2, "right"),
        (3, "right"),
        (6, "top"),
        (8, "bottom"),
        (77, "left"),
        (b"Exif\0\0MM\0*\xff\xff", "left"),
    ],
)
def test_photos_stand_as_their_camera_was_held(orientation: int | bytes, dark: str) -> None:
    image = np.asarray(open_image(Split("train", np.zeros(1), photo(orientation), str), 0))
    halves = {"left": image[:, :4], "right": image[:, -4:], "top": image[:4], "bottom": image[-4:]}
    assert image.shape == ((16, 32) if dark in ("left", "right") else (32, 16))
    assert halves[dark].max() < 20
