"""Decoded images in memory, each checked when it is first used.

To read a whole file for its checksum makes a start as long as the set is large. So every image has a checksum of its
own, and sums of its pixels, from which the normalisation of any subset follows without a look at the images.
"""

import copy
import logging
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lockstep.errors import UserError
from lockstep.files import write_at

_logger = logging.getLogger(__name__)

_TASK = 256  # images that a thread checks before it is asked for the next


def record_type(channels: int) -> np.dtype:
    """What is kept of each image: whether it was skipped, its checksum, and per channel what `DecodedImages.sums` adds.

    56 bytes of an image of 3 channels.
    """
    return np.dtype(
        [("skipped", "<u4"), ("crc32", "<u4"), ("sums", "<i8", (channels,)), ("squares", "<i8", (channels,))]
    )


def records_of(images: np.ndarray) -> np.ndarray:
    """A record (N,) of each image of uint8 (N, H, W, C), none of them skipped."""
    records = np.zeros(len(images), record_type(images.shape[3]))
    records["crc32"] = [zlib.crc32(image) for image in images]
    # Column by column in numbers no wider than they must be: 8 times as fast as all at once for 224x224x3.
    records["sums"] = images.sum(axis=1, dtype=np.uint32).sum(axis=1, dtype=np.int64)
    squares = np.multiply(images, images, dtype=np.uint16)
    records["squares"] = squares.sum(axis=1, dtype=np.uint32).sum(axis=1, dtype=np.int64)
    return records


class DecodedImages:
    """Images uint8 (N, H, W, C) of a split, mapped copy-on-write from `file`, with a record (N,) of each.

    Damaged images are decoded again by `decode(row)`, here and in the file; `where(row)` names one.
    """

    def __init__(
        self,
        file: Path,
        images: np.memmap,
        records: np.ndarray,
        decode: Callable[[int], np.ndarray],
        where: Callable[[int], str],
    ) -> None:
        self.file, self.where = file, where
        self._offset = images.offset
        self._array = np.asarray(images)  # an np.memmap takes three times as long to give a row
        self._pixels = torch.from_numpy(self._array)
        self._records, self._decode = records, decode
        self._checked = np.zeros(len(images), dtype=bool)
        self._unchecked = len(images)

    def __len__(self) -> int:
        return len(self._records)

    def take(self, rows: Tensor) -> Tensor:
        """The images at `rows`, int64 (B,), as uint8 (B, H, W, C), all of them whole; raises as `check`."""
        if self._unchecked:
            new = np.unique(rows.numpy())
            new = new[~self._checked[new]]
            if self._damaged_of(new):
                self.check()  # what damaged one may have damaged others: all at once, in one line
            else:
                self._checked[new] = True
                self._unchecked -= len(new)
        return self._pixels.index_select(0, rows)

    def sums(self, rows: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Per channel, over all pixels of the images at `rows`, their sum and that of their squares, int64 (C,)."""
        chosen = self._records[rows.numpy()]
        return chosen["sums"].sum(axis=0), chosen["squares"].sum(axis=0)

    def to(self, device: torch.device) -> "DecodedImages":
        """With all images on a device, and checked before; on a CPU these very ones."""
        if device.type == "cpu":
            return self
        self.check()
        there = copy.copy(self)
        there._pixels = self._pixels.to(device)
        return there

    def damaged(self) -> list[int]:
        """The rows of all images that are not as they were written."""
        rows = np.arange(len(self))
        with ThreadPoolExecutor() as pool:  # zlib lets go of the interpreter lock for images above 5 kB
            tasks = pool.map(self._damaged_of, (rows[at : at + _TASK] for at in range(0, len(rows), _TASK)))
            return list(chain.from_iterable(tasks))

    def check(self) -> None:
        """Check all images, and decode again those that are damaged, with one warning.

        Raises UserError if the source does not give an image as it was.
        """
        if not self._unchecked:
            return
        if damaged := self.damaged():
            first = f"{len(damaged)} of {len(self)} images, the first: {self.where(damaged[0])}"
            _logger.warning("the image cache %s is damaged (%s): decoding them again", self.file, first)
            with ThreadPoolExecutor() as pool:
                written = list(pool.map(self._repair, damaged))
            if not all(written):
                _logger.warning("the image cache %s stays damaged: it cannot be written to", self.file)
        self._checked[:] = True
        self._unchecked = 0

    def _damaged_of(self, rows: np.ndarray) -> list[int]:
        expected = self._records["crc32"][rows].tolist()
        pairs = zip(rows.tolist(), expected, strict=True)
        return [row for row, checksum in pairs if zlib.crc32(self._array[row]) != checksum]

    def _repair(self, row: int) -> bool:
        """Whether the file could be written, too."""
        try:
            image = np.zeros_like(self._array[row]) if self._records["skipped"][row] else self._decode(row)
        except UserError as error:
            raise UserError(
                f"the image cache {self.file} is damaged, and {error}; without this file all images are decoded again"
            ) from error
        if zlib.crc32(image) != self._records["crc32"][row]:
            raise UserError(
                f"the image cache {self.file} is damaged at {self.where(row)}, which decodes to other pixels than it "
                "did: remove this file, and all images are decoded again"
            )
        try:
            with self.file.open("r+b") as file:
                write_at(file.fileno(), image.tobytes(), self._offset + row * image.nbytes)
            written = True
        except OSError:
            written = False
        if self._damaged_of(np.array([row])):  # the mapping shows what is written, unless the page is its own already
            self._array[row] = image
        return written
