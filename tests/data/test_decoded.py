"""Decoded images: checked when they are first used, decoded again where they are damaged, never used as they are."""

import logging
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from lockstep.data import decoded
from lockstep.data.decoded import DecodedImages, record_type, records_of
from lockstep.errors import UserError

COUNT, SHAPE = 600, (5, 4, 3)  # more than the images of one task


class Kept:
    """Images in a file, their right pixels, and the rows that were asked of the source."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "images.npy"
        self.right = np.random.default_rng(0).integers(0, 256, (COUNT, *SHAPE), dtype=np.uint8)
        self.source = self.right.copy()
        np.save(self.file, self.right)
        self.records = records_of(self.right)
        self.asked: list[int] = []

    def open(self) -> DecodedImages:
        images = np.load(self.file, mmap_mode="c")
        return DecodedImages(self.file, images, self.records, self.decode, "image {}".format)

    def decode(self, row: int) -> np.ndarray:
        self.asked.append(row)
        return self.source[row]

    def damage(self, *rows: int) -> None:
        images = np.load(self.file, mmap_mode="r+")
        for row in rows:
            images[row].reshape(-1)[row % 7] ^= 1
        images.flush()


@pytest.fixture
def kept(tmp_path: Path) -> Kept:
    return Kept(tmp_path)


@pytest.fixture
def checksums(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """An entry for each image that is checked."""
    made = []

    class Counting:
        @staticmethod
        def crc32(image: np.ndarray) -> int:
            made.append(len(made))
            return zlib.crc32(image)

    monkeypatch.setattr(decoded, "zlib", Counting)
    yield made


def rows_of(*rows: int) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int64)


def test_an_image_is_checked_when_it_is_first_taken_and_not_again(kept: Kept, checksums: list[int]) -> None:
    images = kept.open()
    assert len(checksums) == 0
    for rows, checked in (((3, 5, 3), 2), ((5, 3), 2), ((5, 9), 3)):
        assert np.array_equal(images.take(rows_of(*rows)).numpy(), kept.right[list(rows)])
        assert len(checksums) == checked
    assert np.array_equal(images.take(torch.arange(COUNT)).numpy(), kept.right) and len(checksums) == COUNT
    images.take(rows_of(1))
    images.check()
    assert len(checksums) == COUNT and kept.asked == []


@pytest.mark.parametrize("row", [0, 255, 256, COUNT - 1])
def test_every_place_of_an_image_is_checked(kept: Kept, row: int) -> None:
    for place in range(kept.right[row].size):
        pixels = kept.right[row].copy()
        pixels.reshape(-1)[place] ^= 1 << place % 8
        assert zlib.crc32(pixels) != kept.records["crc32"][row]
    kept.damage(row)
    assert kept.open().damaged() == [row] and kept.asked == []  # who only asks repairs nothing
    assert kept.open().damaged() == [row]


def test_damaged_images_are_decoded_again_here_and_in_the_file(kept: Kept, caplog: pytest.LogCaptureFixture) -> None:
    kept.damage(7, 300, 599)
    images = kept.open()
    assert np.array_equal(images.take(rows_of(6, 8)).numpy(), kept.right[[6, 8]]) and not caplog.records
    assert np.array_equal(images.take(rows_of(8, 300, 300)).numpy(), kept.right[[8, 300, 300]])
    (record,) = caplog.records  # one line for all of them
    assert record.levelno == logging.WARNING
    assert f"the image cache {kept.file} is damaged (3 of 600 images, the first: image 7)" in record.getMessage()
    assert sorted(kept.asked) == [7, 300, 599]
    assert np.array_equal(images.take(torch.arange(COUNT)).numpy(), kept.right)
    assert np.array_equal(np.load(kept.file), kept.right) and kept.open().damaged() == []
    assert len(caplog.records) == 1


def test_where_the_file_cannot_be_written_the_images_are_right_nevertheless(
    kept: Kept, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kept.damage(2, 40)
    images = kept.open()

    def refuse(*_: object) -> int:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "pwrite", refuse)
    assert np.array_equal(images.take(rows_of(2)).numpy(), kept.right[[2]])
    assert np.array_equal(images.take(torch.arange(COUNT)).numpy(), kept.right)
    assert kept.open().damaged() == [2, 40]
    assert caplog.messages[1:] == [f"the image cache {kept.file} stays damaged: it cannot be written to"]


def test_damage_that_another_process_repairs_shows_through_and_damage_after_the_opening_is_seen(kept: Kept) -> None:
    first, second = kept.open(), kept.open()
    kept.damage(9)
    assert first.damaged() == [9]
    first.check()
    assert np.array_equal(second.take(rows_of(9)).numpy(), kept.right[[9]]) and kept.asked == [9]


def test_a_skipped_image_is_black_again_and_not_decoded(kept: Kept) -> None:
    kept.right[4] = 0
    np.save(kept.file, kept.right)
    kept.records = records_of(kept.right)
    kept.records["skipped"][4] = 1
    kept.damage(4)
    assert not kept.open().take(rows_of(4)).any() and kept.asked == []


def test_a_source_that_gives_another_image_is_one_line_and_nothing_is_used(kept: Kept) -> None:
    kept.damage(11)
    kept.source[11] = 0
    images = kept.open()
    for _ in range(2):  # asked again, it is not right either
        with pytest.raises(UserError, match=r"images.npy is damaged at image 11, which decodes to other pixels"):
            images.take(rows_of(11))
    with pytest.raises(UserError, match="remove this file"):
        images.check()


def test_a_source_that_has_lost_the_image_is_one_line(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(row: int) -> np.ndarray:
        raise UserError(f"image {row} cannot be decoded (No such file or directory): replace or remove it")

    monkeypatch.setattr(kept, "decode", gone)
    kept.damage(11)
    with pytest.raises(UserError, match=r"images.npy is damaged, and image 11 cannot be decoded"):
        kept.open().take(rows_of(11))


def test_sums_are_those_of_the_pixels_without_a_look_at_them(kept: Kept, checksums: list[int]) -> None:
    images, chosen = kept.open(), [5, 0, 599, 77]
    total, squares = images.sums(rows_of(*chosen))
    pixels = kept.right[chosen].astype(np.int64)
    assert total.tolist() == pixels.sum(axis=(0, 1, 2)).tolist()
    assert squares.tolist() == (pixels**2).sum(axis=(0, 1, 2)).tolist() and not checksums


@pytest.mark.parametrize(("shape", "channels"), [((3, 1, 1, 1), 1), ((2, 300, 500, 3), 3)])
def test_sums_of_the_brightest_images_are_exact(shape: tuple[int, ...], channels: int) -> None:
    records = records_of(np.full(shape, 255, dtype=np.uint8))
    assert records.dtype == record_type(channels)
    area = shape[1] * shape[2]
    assert records["sums"].tolist() == [[255 * area] * channels] * shape[0]
    assert records["squares"].tolist() == [[255**2 * area] * channels] * shape[0]


def test_a_copy_on_a_device_is_checked_before(kept: Kept, checksums: list[int]) -> None:
    kept.damage(123)
    images = kept.open()
    assert images.to(torch.device("cpu")) is images and not checksums
    there = images.to(torch.device("meta"))
    assert kept.asked == [123] and kept.open().damaged() == []
    before = len(checksums)
    assert there.take(torch.empty(8, dtype=torch.int64, device="meta")).shape == (8, *SHAPE)
    images.take(torch.arange(COUNT))
    assert len(checksums) == before  # all are known to be whole
