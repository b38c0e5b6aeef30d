"""Images decoded once into one uint8 file, shared by all processes and later runs through the page cache."""

import hashlib
import json
import logging
import math
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from lockstep.data.decoded import DecodedImages, record_type, records_of
from lockstep.data.decoding import RULE_VERSION, UnreadableImage, decode_row
from lockstep.data.sources.source import Split
from lockstep.errors import UserError
from lockstep.files import path_of, read_json, remove_unfinished, require_plain_file, write_at, written_aside
from lockstep.launch.copies import map_over_cores
from lockstep.lease import held

_logger = logging.getLogger(__name__)

_FILE_VERSION = 2  # raise it when other things are kept of the same pixels
_TASK = 32  # images per task: one alone is too short to pay for the hand-over


@dataclass(frozen=True, eq=False)
class ImageCache:
    """All images of `split`, decoded once for all runs and kept as a file in `folder`.

    `shape` (H, W, C) and `resize_size` are those of `decode`, `fingerprint` the source's.
    """

    split: Split
    shape: tuple[int, int, int]
    resize_size: int | None
    on_error: Literal["raise", "skip"]
    fingerprint: str
    folder: str | Path

    @property
    def path(self) -> Path:
        """The file of images; beside it lie their records, and the description, which is written last."""
        versions = [RULE_VERSION, _FILE_VERSION]
        split, geometry = [self.split.name, len(self.split)], [self.shape, self.resize_size]
        key = json.dumps([self.fingerprint, *split, *geometry, self.on_error, *versions])
        return path_of(self.folder) / f"{self.split.name}-{hashlib.sha256(key.encode()).hexdigest()[:20]}.npy"

    def images(self) -> tuple[DecodedImages, np.ndarray]:
        """The images, decoded now if they were not before, and bool (N,), true where one was skipped.

        They are mapped (processes share the pages of the file) and checked when they are used. Of several processes
        that call this at once, one decodes and the others wait. Files that are not what was written are reported and
        built again. Raises UserError for an unreadable image under `on_error="raise"`, for an image of another size, if
        all images are unreadable, and for a folder that cannot be written to or is full.
        """
        path = self.path
        try:
            cached = self._open(warn=False)
            if cached is None:
                path.parent.mkdir(parents=True, exist_ok=True)
                with held(path.with_suffix(".lock")):
                    cached = self._open(warn=True)
                    if cached is None:
                        self._build()
                        cached = self._open(warn=True)
        except OSError as error:
            raise UserError(
                f"the image cache {path.parent} cannot be written ({error.strerror or error}): make room there, set "
                "another --data.cache_dir, or --data.memory_budget=0 to do without"
            ) from error
        if cached is None:
            raise UserError(f"the image cache {path} does not keep what is written to it: set another --data.cache_dir")
        return cached

    def find(self) -> DecodedImages | None:
        """The images, if they have been decoded; None, and nothing is decoded, if not."""
        cached = self._open(warn=False)
        return None if cached is None else cached[0]

    def _open(self, *, warn: bool) -> tuple[DecodedImages, np.ndarray] | None:
        """The cached images and which were skipped, if the files are there and the records whole, else None."""
        path = self.path
        records_path, description_path = _beside(path)
        if not any(file.exists() for file in (path, records_path, description_path)):
            return None
        try:
            description = read_json(description_path)
            require_plain_file(path)
            require_plain_file(records_path)
            images = np.load(path, mmap_mode="c", allow_pickle=False)
            records = np.load(records_path, mmap_mode="r", allow_pickle=False)
            is_as_expected = images.shape == (len(self.split), *self.shape) and images.dtype == np.uint8
            is_as_expected &= records.shape == (len(self.split),) and records.dtype == record_type(self.shape[2])
            if is_as_expected and zlib.crc32(records.view(np.uint8)) == description["records_crc32"]:
                return DecodedImages(path, images, records, self._decode, self.split.where), records["skipped"] > 0
            problem = "its content differs from what was written"
        except UserError:
            raise
        except (OSError, ValueError, KeyError, TypeError, IndexError, EOFError, AttributeError) as error:
            problem = " ".join(str(error).split())
        if warn:
            _logger.warning("the image cache %s is damaged (%s): decoding the images again", path, problem)
        return None

    def _build(self) -> None:
        """Write the images, their records, then a description, each aside and renamed: a kill leaves no half."""
        path, count, name = self.path, len(self.split), self.split.name
        records_path, description_path = _beside(path)
        description_path.unlink(missing_ok=True)  # it would describe older files, if this is killed between two of them
        for written in (path, records_path, description_path):
            remove_unfinished(path.parent, written.name)
        _logger.info("decoding %d images of the %s split into %s", count, name, path)
        records = np.zeros(count, record_type(self.shape[2]))
        tasks = [range(start, min(start + _TASK, count)) for start in range(0, count, _TASK)]
        with written_aside(path) as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": (count, *self.shape)}
            np.lib.format.write_array_header_1_0(file, header)
            file.flush()
            write = partial(self._write, file.fileno(), file.tell())
            for rows, described in zip(tasks, map_over_cores(write, tasks), strict=True):
                records[rows.start : rows.stop] = described
            if records["skipped"].all():
                raise UserError(f"none of the {count} images of the {name} split can be decoded")
        with written_aside(records_path) as file:
            np.save(file, records, allow_pickle=False)
        description = {"images": count, "records_crc32": zlib.crc32(records.view(np.uint8))}
        with written_aside(description_path) as file:
            file.write(json.dumps(description).encode())

    def _write(self, file: int, offset: int, rows: range) -> np.ndarray:
        """Decode consecutive images into an open file, in which the first of all is at `offset`; returns records (n,).

        Written by whoever decodes them: handing over what a process decodes took a quarter of its time.
        """
        images = np.zeros((len(rows), *self.shape), dtype=np.uint8)
        skipped = np.zeros(len(rows), dtype=bool)
        for index, row in enumerate(rows):
            try:
                images[index] = self._decode(row)
            except UnreadableImage:
                if self.on_error == "raise":
                    raise
                skipped[index] = True
        write_at(file, images, offset + rows.start * math.prod(self.shape))
        records = records_of(images)
        records["skipped"] = skipped
        return records

    def _decode(self, row: int) -> np.ndarray:
        return decode_row(self.split, row, self.shape, self.resize_size)


def _beside(path: Path) -> tuple[Path, Path]:
    """The files of the records and of the description."""
    return path.with_suffix(".records"), path.with_suffix(".json")
