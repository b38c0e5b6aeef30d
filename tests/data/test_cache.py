"""The cache of decoded images: built once, verified, rebuilt when damaged, never half written."""

import json
import logging
import multiprocessing
import os
import resource
import signal
import time
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lockstep.data import cache as cache_module
from lockstep.data.cache import ImageCache
from lockstep.data.decoded import DecodedImages
from lockstep.data.decoding import UnreadableImage
from lockstep.data.sources.kinds import open_source
from lockstep.data.sources.source import Split
from lockstep.errors import UserError, one_line_errors
from lockstep.launch import copies
from lockstep.settings.config import DataConfig

SHAPE = (6, 5, 1)
COUNT = 70


@pytest.fixture(params=[1, 3], autouse=True)
def cores(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Decoded by the process itself, and by copies of it that share small tasks."""
    monkeypatch.setattr(copies, "allowed_cores", lambda: request.param)
    monkeypatch.setattr(cache_module, "_TASK", 3)
    return request.param


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
    return ImageCache(ramp(folder, lethal), SHAPE, None, "raise", fingerprint, folder / "cache").images()


@pytest.mark.parametrize("version", ["RULE_VERSION", "_FILE_VERSION"])
def test_another_version_has_a_file_of_its_own(version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = ImageCache(ramp(tmp_path), SHAPE, None, "raise", "f", tmp_path)
    before = images.path
    monkeypatch.setattr(cache_module, version, 99)
    assert images.path != before


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
    assert ImageCache(ramp(tmp_path), SHAPE, None, "raise", "f", tmp_path / "cache").find() is None
    assert not (tmp_path / "notes").exists() and not (tmp_path / "cache").exists()
    cache(tmp_path)
    found = ImageCache(ramp(tmp_path), SHAPE, None, "raise", "f", tmp_path / "cache").find()
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
    assert len(readings(tmp_path)) == COUNT


def test_the_work_is_shared(tmp_path, cores) -> None:
    assert_ramp(cache(tmp_path)[0])
    assert len(set(readings(tmp_path))) == cores and (str(os.getpid()) in readings(tmp_path)) == (cores == 1)


def test_a_kill_while_decoding_leaves_nothing_half_done(tmp_path, caplog, cores) -> None:
    """Of the process, or of a copy of it, which is told in one line."""

    def decode() -> None:
        with one_line_errors():
            _cache_in_process(tmp_path, lethal=True)

    process = multiprocessing.get_context("fork").Process(target=decode)
    process.start()
    process.join(60)
    assert process.exitcode == (-signal.SIGKILL if cores == 1 else 1)
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
            ImageCache(split, (64, 64, 3), None, "raise", "f", tmp_path).images()
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
    whole = all_of(ImageCache(split, (40, 30, 3), None, "raise", "whole", tmp_path / "cache").images()[0])
    victim = folder / "dog" / "1.jpg"
    broken(victim, how)
    with pytest.raises(UnreadableImage, match=rf"{victim} cannot be decoded .*--data.on_error=skip") as caught:
        ImageCache(split, (40, 30, 3), None, "raise", "f", tmp_path / "cache").images()
    assert "\n" not in str(caught.value)
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 1
    for _ in range(2):  # built, then read back
        decoded, skipped = ImageCache(split, (40, 30, 3), None, "skip", "f", tmp_path / "cache").images()
        images = all_of(decoded)
        assert np.flatnonzero(skipped).tolist() == [5]
        assert np.array_equal(images[~skipped], whole[~skipped]) and not images[5].any()
    with pytest.raises(UnreadableImage):  # a cache with gaps does not serve a run that wants none
        ImageCache(split, (40, 30, 3), None, "raise", "f", tmp_path / "cache").images()


def test_all_images_unreadable_is_an_error_even_when_skipping(folder, tmp_path) -> None:
    for path in folder.rglob("*.jpg"):
        broken(path, "truncated")
    with pytest.raises(ValueError, match="none of the 8 images of the train split"):
        ImageCache(folder_split(folder), (40, 30, 3), None, "skip", "f", tmp_path / "cache").images()
    assert not list((tmp_path / "cache").glob("*.npy"))


def test_an_image_of_another_size_is_named_and_never_skipped(folder, tmp_path) -> None:
    Image.new("RGB", (31, 40)).save(folder / "cat" / "2.jpg")
    with pytest.raises(ValueError, match=r"cat/2.jpg is 40x31 where others are 40x30: set --augment.image_size"):
        ImageCache(folder_split(folder), (40, 30, 3), None, "skip", "f", tmp_path / "cache").images()


def test_an_input_output_error_is_never_skipped(tmp_path) -> None:
    def read(row: int) -> Image.Image:
        raise OSError(5, "Input/output error")

    split = Split("train", np.zeros(3, dtype=np.int64), read, lambda row: f"row {row}")
    with pytest.raises(ValueError, match="row 0 cannot be decoded .Input/output error.") as caught:
        ImageCache(split, SHAPE, None, "skip", "f", tmp_path).images()
    assert not isinstance(caught.value, UnreadableImage)


def test_a_pipe_in_the_place_of_the_cache_is_named(tmp_path) -> None:
    cache(tmp_path)
    place = cache_file(tmp_path)
    place.unlink()
    os.mkfifo(place)
    with pytest.raises(UserError, match="is not a file: remove it"):
        cache(tmp_path)
