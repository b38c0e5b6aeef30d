"""Random crops of streamed images: Pillow's but for rounding, whatever the file; decoded no finer than needed."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lockstep.augment.geometry import crop_draws, pixel_box
from lockstep.data import crop
from lockstep.data.crop import read_crop
from lockstep.data.decoding import UnreadableImage, read_image
from lockstep.data.sources.source import Split, open_encoded
from lockstep.randomness import sample_keys


def picture(width: int, height: int) -> Image.Image:
    """Soft shapes with some noise on them, in colour."""
    random = np.random.default_rng(width)
    coarse = Image.fromarray(random.integers(0, 256, (height // 24, width // 24, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.float64)
    return Image.fromarray((pixels + random.normal(0, 6, pixels.shape)).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def split_of(*files: bytes) -> Split:
    return Split("train", np.zeros(len(files), np.int64), lambda row: open_encoded(io.BytesIO(files[row])), str)


def draws_of(number: int) -> list[float]:
    return crop_draws(sample_keys(0, 0, torch.tensor([number]), torch.zeros(1, dtype=torch.int64)))[0].tolist()


def by_pillow(split: Split, draws: list[float], shape: tuple[int, int, int], min_area: float) -> np.ndarray:
    """The box cut out of the whole image by Pillow, and resized by it."""
    image = read_image(split, 0, shape[2])
    left, top, width, height = pixel_box(draws, min_area, *image.size)
    cut = image.crop((left, top, left + width, top + height))
    return np.asarray(cut.resize((shape[1], shape[0]), Image.Resampling.BILINEAR)).reshape(shape).astype(int)


TURNED = Image.Exif()
TURNED[0x112] = 6
UPRIGHT = Image.Exif()
UPRIGHT[0x112] = 1
PLAIN = {
    "plain": encoded(picture(240, 180)),
    "progressive": encoded(picture(240, 180), progressive=True),
    "not subsampled": encoded(picture(240, 180), subsampling=0),
    "upright": encoded(picture(240, 180), exif=UPRIGHT),
}
ODD = {
    "turned": encoded(picture(240, 180), exif=TURNED),
    "cmyk": encoded(picture(240, 180).convert("CMYK")),
    "grey": encoded(picture(240, 180).convert("L")),
    "png": encoded(picture(240, 180), "PNG"),
    "palette": encoded(picture(240, 180).convert("P"), "PNG"),
    "grey16": encoded(Image.fromarray(np.arange(240 * 180, dtype=np.uint16).reshape(180, 240)), "PNG"),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("file", [*PLAIN, *ODD])
def test_a_crop_is_pillows_but_for_rounding(file: str, channels: int) -> None:
    """Of all kinds of files; crops of a 240 x 180 image to 100 x 80 are never decoded at half its size."""
    split, shape = split_of((PLAIN | ODD)[file]), (80, 100, channels)
    for number in range(4):
        ours = read_crop(split, 0, shape, draws_of(number), 0.2)
        assert ours.dtype == torch.uint8 and ours.shape == shape and ours.is_contiguous()
        away = np.abs(ours.numpy() - by_pillow(split, draws_of(number), shape, 0.2))
        assert away.max() <= 1 and away.mean() < 0.3, "of 255"
        assert ours.float().std() > 10


@pytest.mark.parametrize("file", [*PLAIN, *ODD])
def test_only_plain_files_are_decoded_without_pillow(file: str) -> None:
    image = open_encoded(io.BytesIO((PLAIN | ODD)[file]))
    pixels = crop._decode_jpeg(image, (0, 0, 240, 180), (180, 240, 3))
    assert (pixels is None) == (file in ODD)
    if pixels is not None:
        assert np.array_equal(pixels, np.asarray(open_encoded(io.BytesIO(PLAIN[file])))), "Pillow's, bit for bit"


@pytest.mark.parametrize(("size", "decoded"), [(400, 800), (101, 800), (100, 400), (70, 300), (50, 200), (20, 100)])
def test_a_large_image_is_decoded_no_finer_than_its_crop_needs(size: int, decoded: int) -> None:
    """Twice as fine as its result; the crop here is half as wide and as high as the image."""
    image = open_encoded(io.BytesIO(encoded(picture(800, 800))))
    pixels = crop._decode_jpeg(image, (200, 200, 400, 400), (size, size, 3))
    assert pixels is not None and pixels.shape == (decoded, decoded, 3)


@pytest.mark.parametrize(("size", "step"), [(40, 8), (80, 4), (150, 2), (350, 1)])
def test_a_crop_of_a_large_image_is_pillows_but_for_its_edges(size: int, step: int) -> None:
    """Which lie where the smaller image has pixels: at multiples of `step`, of the sizes here."""
    split, shape = split_of(encoded(picture(1000, 800))), (size, size, 3)
    for number in range(4):
        ours = read_crop(split, 0, shape, draws_of(number), 0.8).numpy()
        left, top, width, height = pixel_box(draws_of(number), 0.8, 1000, 800)
        edges = [step * round(edge / step) for edge in (left, top, left + width, top + height)]
        cut = read_image(split, 0, 3).crop(edges).resize((size, size), Image.Resampling.BILINEAR)
        away = np.abs(ours - np.asarray(cut).astype(int))
        assert away.mean() < 0.9 and away.max() < 12
        assert (away.max() > 1) == (step > 1)


def test_small_images_are_made_larger() -> None:
    split, shape = split_of(encoded(picture(60, 48))), (96, 96, 3)
    away = np.abs(read_crop(split, 0, shape, draws_of(1), 0.3).numpy() - by_pillow(split, draws_of(1), shape, 0.3))
    assert away.max() <= 1


def test_one_long_pixel() -> None:
    for size in ((3000, 1), (1, 3000), (1, 1)):
        split = split_of(encoded(Image.new("RGB", size, (9, 80, 200))))
        assert read_crop(split, 0, (8, 8, 3), draws_of(0), 0.08).float().std(dim=(0, 1)).max() == 0


def test_damage_is_told_as_pillow_sees_it() -> None:
    """A file cut short is unreadable; one with a wrong bit inside may be read, and then gives Pillow's pixels."""
    whole = PLAIN["plain"]
    with pytest.raises(UnreadableImage, match="^0 cannot be decoded .*: replace or remove it, or set"):
        read_crop(split_of(whole[: len(whole) // 2]), 0, (80, 100, 3), draws_of(0), 0.2)
    with pytest.raises(UnreadableImage, match="cannot identify"):
        read_crop(split_of(b"no image"), 0, (80, 100, 3), draws_of(0), 0.2)
    bent = bytearray(whole)
    bent[len(whole) // 2] ^= 8
    split = split_of(bytes(bent))
    away = np.abs(
        read_crop(split, 0, (80, 100, 3), draws_of(0), 0.9).numpy() - by_pillow(split, draws_of(0), (80, 100, 3), 0.9)
    )
    assert away.max() <= 1


def test_files_are_closed(tmp_path: Path) -> None:
    opened = []

    def read(row: int) -> Image.Image:
        opened.append(open_encoded(str(tmp_path / "photo.jpg")))
        return opened[-1]

    (tmp_path / "photo.jpg").write_bytes(PLAIN["plain"])
    read_crop(Split("train", np.zeros(1, np.int64), read, str), 0, (80, 100, 3), draws_of(0), 0.2)
    with pytest.raises((ValueError, AttributeError)):
        opened[0].fp.read()
