"""Decoding, and the cache file: built once, verified, rebuilt when damaged, never half written."""

import io
import json
import logging
import multiprocessing
import os
import resource
import signal
import struct
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from lockstep.data.cache import UnreadableImage, decode, decode_cached, decode_row, find_cached, open_image
from lockstep.data.decoded import DecodedImages
from lockstep.data.sources.kinds import open_source
from lockstep.data.sources.source import Split, open_encoded
from lockstep.errors import UserError
from lockstep.settings.config import DataConfig

SHAPE = (6, 5, 1)
COUNT = 70


@dataclass(frozen=True)
class Ramp:
    """Image `row` is grey `row`; every reading is noted in a file; a marked process dies at row 40."""

    notes: Path
    lethal: bool = False

    def __call__(self, row: int) -> Image.Image:
        with self.notes.open("a") as file:
            file.write(f"{os.getpid()}\n")
        if self.lethal and row == 40:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.002)
        return Image.new("L", (5, 6), row)

    def where(self, row: int) -> str:
        return f"ramp {row}"


def ramp(folder: Path, lethal: bool = False) -> Split:
    read = Ramp(folder / "notes", lethal)
    return Split("train", np.arange(COUNT) % 2, read, read.where)


def cache(folder: Path, lethal: bool = False, fingerprint: str = "f") -> tuple[DecodedImages, np.ndarray]:
    return decode_cached(ramp(folder, lethal), SHAPE, None, folder / "cache", fingerprint, "raise")


def readings(folder: Path) -> list[str]:
    return (folder / "notes").read_text().split()


def all_of(images: DecodedImages) -> np.ndarray:
    return images.take(torch.arange(len(images))).numpy()


def assert_ramp(decoded: DecodedImages) -> None:
    images = all_of(decoded)
    assert images.shape == (COUNT, *SHAPE) and images.dtype == np.uint8
    assert (images == np.arange(COUNT)[:, None, None, None]).all()


def cache_file(folder: Path) -> Path:
    return next((folder / "cache").glob("*.npy"))


def test_images_are_decoded_once(tmp_path) -> None:
    images, skipped = cache(tmp_path)
    assert_ramp(images)
    assert not skipped.any()
    assert_ramp(cache(tmp_path)[0])
    assert len(readings(tmp_path)) == COUNT
    cache(tmp_path, fingerprint="g")  # other images under the same name
    assert len(readings(tmp_path)) == 2 * COUNT
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_writing_to_the_images_leaves_the_file_alone(tmp_path) -> None:
    cache(tmp_path)[0].take(torch.arange(COUNT))[:] = 255
    assert_ramp(cache(tmp_path)[0])
    assert len(readings(tmp_path)) == COUNT  # read back, not repaired


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip_a_bit(path: Path, place: int = -100) -> None:
    """In the place where it lies, so that it shows through a mapping of the file."""
    with path.open("r+b") as file:
        file.seek(place, os.SEEK_SET if place >= 0 else os.SEEK_END)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def flip_a_bit_of_the_records(path: Path) -> None:
    flip_a_bit(path.with_suffix(".records"))


def cut_the_records(path: Path) -> None:
    truncate(path.with_suffix(".records"))


def remove_the_records(path: Path) -> None:
    path.with_suffix(".records").unlink()


def empty_description(path: Path) -> None:
    path.with_suffix(".json").write_text("")


def old_description(path: Path) -> None:
    description = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps(description | {"records_crc32": 1}))


def become_a_zip(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, images=np.zeros(3))


def nest_description(path: Path) -> None:
    path.with_suffix(".json").write_text("[" * 100_000)


DAMAGE = [truncate, Path.unlink, empty_description, old_description, become_a_zip, nest_description]
DAMAGE += [flip_a_bit_of_the_records, cut_the_records, remove_the_records]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_reported_and_built_again(tmp_path, caplog, damage) -> None:
    cache(tmp_path)
    damage(cache_file(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert_ramp(cache(tmp_path)[0])
    assert len(caplog.records) == 1
    assert "damaged" in caplog.text and str(tmp_path / "cache") in caplog.text
    assert len(readings(tmp_path)) == 2 * COUNT


def test_opening_reads_no_image_and_decodes_none(tmp_path) -> None:
    assert find_cached(ramp(tmp_path), SHAPE, None, tmp_path / "cache", "f", "raise") is None
    assert not (tmp_path / "notes").exists() and not (tmp_path / "cache").exists()
    cache(tmp_path)
    found = find_cached(ramp(tmp_path), SHAPE, None, tmp_path / "cache", "f", "raise")
    assert found is not None and found.damaged() == []
    flip_a_bit(cache_file(tmp_path))
    assert found.damaged() == [COUNT - 4]  # the file is looked at, and was not before
    assert len(readings(tmp_path)) == COUNT


def _cache_in_process(folder: Path, lethal: bool, together: Barrier | None = None) -> None:
    if together is not None:
        together.wait(60)
    assert_ramp(cache(folder, lethal)[0])


def test_two_processes_at_once_decode_once(tmp_path) -> None:
    context = multiprocessing.get_context("fork")
    together = context.Barrier(2)
    processes = [context.Process(target=_cache_in_process, args=(tmp_path, False, together)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(readings(tmp_path)) == COUNT and len(set(readings(tmp_path))) == 1


def test_a_kill_while_decoding_leaves_nothing_half_done(tmp_path, caplog) -> None:
    process = multiprocessing.get_context("fork").Process(target=_cache_in_process, args=(tmp_path, True))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert not list((tmp_path / "cache").glob("*.npy"))
    assert_ramp(cache(tmp_path)[0])
    assert not caplog.records
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_no_room_for_the_cache_names_the_setting(tmp_path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    split = open_source(DataConfig(source="synthetic:64x64x3x100")).splits["train"]
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))  # the nearest thing to a full disk without root
    try:
        with pytest.raises(ValueError, match=rf"image cache {tmp_path} cannot be written .*--data.cache_dir"):
            decode_cached(split, (64, 64, 3), None, tmp_path, "f", "raise")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not [file for file in tmp_path.iterdir() if file.suffix != ".lock"]


def test_a_cache_folder_that_is_a_file_names_the_setting(tmp_path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(ValueError, match="--data.cache_dir"):
        cache(tmp_path)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two classes of four readable images each."""
    generator = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for index in range(4):
            pixels = generator.integers(0, 256, (40, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "set" / name / f"{index}.jpg")
    return tmp_path / "set"


def folder_split(folder: Path) -> Split:
    """The files as they lie, without the test images that a source would hold out."""
    paths = sorted(str(path) for path in folder.rglob("*.jpg"))
    return Split(
        "train", np.array([int("dog" in path) for path in paths]), lambda i: Image.open(paths[i]), paths.__getitem__
    )


def broken(path: Path, how: str) -> None:
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-200])
    elif how == "not an image":
        path.write_text("hello")
    elif how == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["truncated", "not an image", "empty", "missing"])
def test_an_unreadable_image_is_named_or_skipped(folder, tmp_path, how) -> None:
    split = folder_split(folder)
    whole = all_of(decode_cached(split, (40, 30, 3), None, tmp_path / "cache", "whole", "raise")[0])
    victim = folder / "dog" / "1.jpg"
    broken(victim, how)
    with pytest.raises(UnreadableImage, match=rf"{victim} cannot be decoded .*--data.on_error=skip") as caught:
        decode_cached(split, (40, 30, 3), None, tmp_path / "cache", "f", "raise")
    assert "\n" not in str(caught.value)
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 1
    for _ in range(2):  # built, then read back
        decoded, skipped = decode_cached(split, (40, 30, 3), None, tmp_path / "cache", "f", "skip")
        images = all_of(decoded)
        assert np.flatnonzero(skipped).tolist() == [5]
        assert np.array_equal(images[~skipped], whole[~skipped]) and not images[5].any()
    with pytest.raises(UnreadableImage):  # a cache with gaps does not serve a run that wants none
        decode_cached(split, (40, 30, 3), None, tmp_path / "cache", "f", "raise")


def test_all_images_unreadable_is_an_error_even_when_skipping(folder, tmp_path) -> None:
    for path in folder.rglob("*.jpg"):
        broken(path, "truncated")
    with pytest.raises(ValueError, match="none of the 8 images of the train split"):
        decode_cached(folder_split(folder), (40, 30, 3), None, tmp_path / "cache", "f", "skip")
    assert not list((tmp_path / "cache").glob("*.npy"))


def test_an_image_of_another_size_is_named_and_never_skipped(folder, tmp_path) -> None:
    Image.new("RGB", (31, 40)).save(folder / "cat" / "2.jpg")
    with pytest.raises(ValueError, match=r"cat/2.jpg is 40x31 where others are 40x30: set --augment.image_size"):
        decode_cached(folder_split(folder), (40, 30, 3), None, tmp_path / "cache", "f", "skip")


def test_an_input_output_error_is_never_skipped(tmp_path) -> None:
    def read(row: int) -> Image.Image:
        raise OSError(5, "Input/output error")

    split = Split("train", np.zeros(3, dtype=np.int64), read, lambda row: f"row {row}")
    with pytest.raises(ValueError, match="row 0 cannot be decoded .Input/output error.") as caught:
        decode_cached(split, SHAPE, None, tmp_path, "f", "skip")
    assert not isinstance(caught.value, UnreadableImage)


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


def test_a_pipe_in_the_place_of_the_cache_is_named(tmp_path) -> None:
    cache(tmp_path)
    place = cache_file(tmp_path)
    place.unlink()
    os.mkfifo(place)
    with pytest.raises(UserError, match="is not a file: remove it"):
        cache(tmp_path)


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
