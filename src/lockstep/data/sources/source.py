"""A data set as labelled splits whose images are read one by one."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from lockstep.settings.config import DataConfig

_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
VAL_NAMES = ("validation", "valid", "val", "dev")
"""What others call a validation split"""
LOOKED_INTO, LOOKED_AT_BYTES = 256, 1 << 16
"""Files of a split whose contents count for the identity of the data, and how much of each"""


Identity = dict[str, int | str]
"""What a run needs to know its data again by"""


@dataclass(frozen=True, eq=False)
class Split:
    """Labelled images that are read one by one; can be pickled for workers.

    `labels` is int64 (N,). `read(row)` opens an image (lazily: decoding errors come when its pixels are used);
    `where(row)` names its file or row for messages.
    """

    name: str
    labels: np.ndarray
    read: Callable[[int], Image.Image]
    where: Callable[[int], str]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: np.ndarray, name: str) -> "Split":
        """The samples at `rows`, int (M,), as a split of their own."""
        return Split(name, self.labels[rows], AtRows(self.read, rows), AtRows(self.where, rows))


@dataclass(frozen=True, eq=False)
class Source:
    """A data set: `splits` has "train", "test" unless `data.test_fraction` is 0, and "val" where it brings one.

    `fingerprint` changes when the images do, or their place; it is the key of the cache. `content` stays when they are
    copied elsewhere; empty: it is the fingerprint. `held_out`: the rows, int (T,), of a test set that was drawn here.
    """

    name: str
    classes: tuple[str, ...]
    splits: dict[str, Split]
    fingerprint: str
    content: str = ""
    held_out: np.ndarray | None = None

    def division(self, config: DataConfig) -> DataConfig:
        """The settings by which the training split is divided: nothing is held out if there is a validation split."""
        return replace(config, val_fraction=0.0) if "val" in self.splits else config

    @property
    def identity(self) -> Identity:
        """What a run needs to know its data again by: digests of content and class names, and numbers."""
        counts = {name: len(split) for name, split in self.splits.items()}
        names = digest_of(*(os.fsencode(name) for name in self.classes))
        identity = {"content": (self.content or self.fingerprint)[:16], "class_names": names[:16]}
        return {**identity, "classes": len(self.classes), **counts}


@dataclass(frozen=True, eq=False)
class AtRows:
    """A function of rows, at rows of its own."""

    call: Callable[[int], Any]
    rows: np.ndarray

    def __call__(self, row: int) -> Any:
        return self.call(int(self.rows[row]))


@dataclass(frozen=True)
class RowName:
    """Names a row for messages."""

    source: str
    split: str

    def __call__(self, row: int) -> str:
        return f"{self.source}, {self.split} row {row}"


def open_encoded(file: str | BinaryIO) -> Image.Image:
    """An image of one of the usual formats, whatever its name says; its pixels are decoded when they are used.

    Not every format that Pillow knows: some start other programs, as PostScript does.
    """
    return Image.open(file, formats=_FORMATS)


def spread(count: int, most: int) -> list[int]:
    """At most so many rows of `count`, from the first to the last."""
    return [int(row) for row in np.unique(np.linspace(0, count - 1, most).astype(np.int64))] if count else []


def digest_of(*parts: bytes | np.ndarray) -> str:
    """SHA-256 of some bytes and arrays, in that order."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(np.ascontiguousarray(part).tobytes() if isinstance(part, np.ndarray) else part)
        digest.update(b"|")
    return digest.hexdigest()
