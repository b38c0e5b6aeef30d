"""Images decoded once into one uint8 file, shared by all processes and later runs through the page cache."""

import errno
import hashlib
import json
import logging
import struct
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from lockstep.data.decoded import DecodedImages, record_type, records_of
from lockstep.data.sources.kinds import Split
from lockstep.errors import UserError
from lockstep.files import path_of, read_json, remove_unfinished, require_plain_file, written_aside
from lockstep.lease import held

_logger = logging.getLogger(__name__)

_RULE_VERSION = 2  # raise it when `decode` gives other pixels
_FILE_VERSION = 2  # raise it when other things are kept of the same pixels
SKIP = "set --data.on_error=skip"
_BLOCK = 2048  # images decoded between two writes
_TASK = 32  # images per task of the thread pool: one alone is too short to pay for the hand-over
_GREY_MODES = ("1", "L", "LA", "I;16", "I;16B", "I;16L", "I;16N")
_DECODING_ERRORS = (
    ValueError,
    SyntaxError,
    EOFError,
    LookupError,
    Image.DecompressionBombError,
    zlib.error,
    struct.error,
)


class UnreadableImage(UserError):
    """The bytes of one image are missing or broken; the message names it. `data.on_error=skip` skips these alone."""


def channels_of(image: Image.Image) -> int:
    """1 for grey modes, 3 for all others."""
    return 1 if image.mode in _GREY_MODES else 3


def open_image(split: Split, row: int) -> Image.Image:
    """The image at `row`, completely decoded, in its own mode and size, turned as its EXIF orientation says.

    Raises UnreadableImage, naming file or row, if its bytes are missing or broken; plain UserError if the file cannot
    be reached for another reason (an input/output error says nothing about the image, so it is never skipped).
    """
    with damage_named(split, row):
        return decoded(split.read(row))


@contextmanager
def damage_named(split: Split, row: int) -> Iterator[None]:
    """Within it, what goes wrong with the image at `row` is raised as `open_image` does."""
    try:
        yield
    except OSError as error:
        if error.errno in (None, errno.ENOENT, errno.EISDIR):
            raise UnreadableImage(f"{_broken(split, row, error)}, or {SKIP}") from error
        raise UserError(_broken(split, row, error)) from error
    except _DECODING_ERRORS as error:
        raise UnreadableImage(f"{_broken(split, row, error)}, or {SKIP}") from error


def decoded(image: Image.Image) -> Image.Image:
    """All pixels of an image that `Split.read` has opened, upright, and its file closed."""
    return _upright(_first_frame(image))


def _first_frame(image: Image.Image) -> Image.Image:
    """The image decoded, and its file closed, which Pillow leaves open for animations and what it cannot decode."""
    try:
        image.load()
        if not getattr(image, "is_animated", False):
            return image
        first = image.copy()
    except BaseException:
        image.close()
        raise
    image.close()
    return first


def _upright(image: Image.Image) -> Image.Image:
    """As a camera that was held sideways meant it; as it is stored where its EXIF data are broken."""
    try:
        turned = ImageOps.exif_transpose(image)
    except Exception:  # Pillow's own errors, and whatever a damaged tag makes its parsers do
        return image
    return image if turned is None else turned


def read_image(split: Split, row: int, channels: int) -> Image.Image:
    """`open_image` in mode L (`channels` 1) or RGB (3), as Pillow converts: transparency is dropped.

    Raises plain UserError if it holds 32-bit pixels.
    """
    return in_channels(open_image(split, row), channels, split, row)


def in_channels(image: Image.Image, channels: int, split: Split, row: int) -> Image.Image:
    """The second half of `read_image`."""
    if image.mode in ("I", "F"):
        raise UserError(f"{split.where(row)} has 32-bit pixels (mode {image.mode}): convert it to 8 or 16 bits")
    if image.mode.startswith("I;16"):  # Pillow would clip at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode == "LAB":  # from which Pillow knows no way to grey
        image = image.convert("RGB")
    return image.convert("L" if channels == 1 else "RGB")


def _broken(split: Split, row: int, error: Exception) -> str:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
    return f"{split.where(row)} cannot be decoded ({reason or repr(error)}): replace or remove it"


def decode(image: Image.Image, shape: tuple[int, int, int], resize_size: int | None) -> np.ndarray:
    """Pixels of `image` as uint8 of `shape` (H, W, C), C being 1 or 3.

    The shorter side is resized to `resize_size` (bilinear, antialiased) and the centre of H x W cut out, filled up
    with black where it is larger. `resize_size=None` takes the image as it is and raises UserError if its size is
    another one.
    """
    height, width, channels = shape
    mode = "L" if channels == 1 else "RGB"
    image = image if image.mode == mode else image.convert(mode)
    if resize_size is None and image.size != (width, height):
        raise UserError(
            f"is {image.height}x{image.width} where others are {height}x{width}: "
            "set --augment.image_size to bring all images to one size"
        )
    if resize_size is not None and min(image.size) != resize_size:
        image = _without_far_ends(image)
        scale = resize_size / min(image.size)
        size = (max(round(image.width * scale), resize_size), max(round(image.height * scale), resize_size))
        image = image.resize(size, Image.Resampling.BILINEAR)
    if image.size != (width, height):
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    return np.asarray(image, dtype=np.uint8).reshape(shape)


_LONGEST = 8
"""Times its shorter side, as far as an image is looked at"""


def _without_far_ends(image: Image.Image) -> Image.Image:
    """The middle of an image that is much longer than wide: resized whole, 60,000 x 1 pixels would fill the memory."""
    longest = _LONGEST * min(image.size)
    left, top = ((side - min(side, longest)) // 2 for side in image.size)
    return image.crop((left, top, image.width - left, image.height - top)) if left or top else image


def decode_row(split: Split, row: int, shape: tuple[int, int, int], resize_size: int | None) -> np.ndarray:
    """`decode` the image at `row`, uint8 of `shape`; an error is a UserError that names the image."""
    image = read_image(split, row, shape[2])
    try:
        return decode(image, shape, resize_size)
    except UserError as error:
        raise UserError(f"{split.where(row)} {error}") from error


def decode_cached(
    split: Split,
    shape: tuple[int, int, int],
    resize_size: int | None,
    cache_dir: str | Path,
    fingerprint: str,
    on_error: Literal["raise", "skip"],
) -> tuple[DecodedImages, np.ndarray]:
    """All images of `split`, decoded once for all runs and kept as a file in `cache_dir`.

    `shape` and `resize_size` are those of `decode`, `fingerprint` the source's. Returns the images, mapped (processes
    share the pages of the file) and checked when they are used, and bool (N,), true where an image was skipped. Of
    several processes that call this at once, one decodes and the others wait. A file that is not what was written is
    reported and built again. Raises UserError for an unreadable image under `on_error="raise"`, for an image of
    another size, if all images are unreadable, and for a folder that cannot be written to or is full.
    """
    path = _path(split, shape, resize_size, cache_dir, fingerprint, on_error)
    folder = path.parent
    open_whole = partial(_open, path, split, shape, resize_size)
    try:
        cached = open_whole(warn=False)
        if cached is None:
            folder.mkdir(parents=True, exist_ok=True)
            with held(path.with_suffix(".lock")):
                cached = open_whole(warn=True)
                if cached is None:
                    _build(path, split, shape, resize_size, on_error)
                    cached = open_whole(warn=True)
    except OSError as error:
        raise UserError(
            f"the image cache {folder} cannot be written ({error.strerror or error}): make room there, set another "
            "--data.cache_dir, or --data.memory_budget=0 to do without"
        ) from error
    if cached is None:
        raise UserError(f"the image cache {path} does not keep what is written to it: set another --data.cache_dir")
    return cached


def find_cached(
    split: Split,
    shape: tuple[int, int, int],
    resize_size: int | None,
    cache_dir: str | Path,
    fingerprint: str,
    on_error: Literal["raise", "skip"],
) -> DecodedImages | None:
    """The images that `decode_cached` has kept; None, and nothing is decoded, where it would decode them."""
    path = _path(split, shape, resize_size, cache_dir, fingerprint, on_error)
    cached = _open(path, split, shape, resize_size, warn=False)
    return None if cached is None else cached[0]


def _path(
    split: Split,
    shape: tuple[int, int, int],
    resize_size: int | None,
    cache_dir: str | Path,
    fingerprint: str,
    on_error: Literal["raise", "skip"],
) -> Path:
    """Where the images are kept."""
    versions = [_RULE_VERSION, _FILE_VERSION]
    key = json.dumps([fingerprint, split.name, len(split), shape, resize_size, on_error, *versions])
    return path_of(cache_dir) / f"{split.name}-{hashlib.sha256(key.encode()).hexdigest()[:20]}.npy"


def _beside(path: Path) -> tuple[Path, Path]:
    """Where the records of the images are kept, and the description, which is written last."""
    return path.with_suffix(".records"), path.with_suffix(".json")


def _open(
    path: Path, split: Split, shape: tuple[int, int, int], resize_size: int | None, *, warn: bool
) -> tuple[DecodedImages, np.ndarray] | None:
    """The cached images and which were skipped, if the files are there and the records whole, else None."""
    records_path, description_path = _beside(path)
    if not any(file.exists() for file in (path, records_path, description_path)):
        return None
    try:
        description = read_json(description_path)
        require_plain_file(path)
        require_plain_file(records_path)
        images = np.load(path, mmap_mode="c", allow_pickle=False)
        records = np.load(records_path, mmap_mode="r", allow_pickle=False)
        is_as_expected = images.shape == (len(split), *shape) and images.dtype == np.uint8
        is_as_expected &= records.shape == (len(split),) and records.dtype == record_type(shape[2])
        if is_as_expected and zlib.crc32(records.view(np.uint8)) == description["records_crc32"]:
            decode_again = partial(decode_row, split, shape=shape, resize_size=resize_size)
            return DecodedImages(path, images, records, decode_again, split.where), records["skipped"] > 0
        problem = "its content differs from what was written"
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, IndexError, EOFError, AttributeError) as error:
        problem = " ".join(str(error).split())
    if warn:
        _logger.warning("the image cache %s is damaged (%s): decoding the images again", path, problem)
    return None


def _build(
    path: Path,
    split: Split,
    shape: tuple[int, int, int],
    resize_size: int | None,
    on_error: Literal["raise", "skip"],
) -> None:
    """Write the images, their records, then a description, each aside and renamed: a kill leaves nothing half done."""
    records_path, description_path = _beside(path)
    description_path.unlink(missing_ok=True)  # it would describe older files, if this is killed between two of them
    for written in (path, records_path, description_path):
        remove_unfinished(path.parent, written.name)
    _logger.info("decoding %d images of the %s split into %s", len(split), split.name, path)
    records = np.zeros(len(split), record_type(shape[2]))
    with written_aside(path) as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(split), *shape)}
        np.lib.format.write_array_header_1_0(file, header)
        start = 0
        for images, described in _decoded_blocks(split, shape, resize_size, on_error):
            file.write(images)
            records[start : start + len(images)] = described
            start += len(images)
        if records["skipped"].all():
            raise UserError(f"none of the {len(split)} images of the {split.name} split can be decoded")
    with written_aside(records_path) as file:
        np.save(file, records, allow_pickle=False)
    description = {"images": len(split), "records_crc32": zlib.crc32(records.view(np.uint8))}
    with written_aside(description_path) as file:
        file.write(json.dumps(description).encode())


def _decoded_blocks(
    split: Split, shape: tuple[int, int, int], resize_size: int | None, on_error: Literal["raise", "skip"]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Consecutive images, uint8 (n, *shape), black where skipped, with their records (n,)."""

    def decode_rows(rows: range) -> tuple[np.ndarray, np.ndarray]:
        images = np.zeros((len(rows), *shape), dtype=np.uint8)
        skipped = np.zeros(len(rows), dtype=bool)
        for index, row in enumerate(rows):
            try:
                images[index] = decode_row(split, row, shape, resize_size)
            except UnreadableImage:
                if on_error == "raise":
                    raise
                skipped[index] = True
        records = records_of(images)
        records["skipped"] = skipped
        return images, records

    rows = range(len(split))
    with ThreadPoolExecutor() as pool:  # Pillow lets go of the interpreter lock while it decodes
        for start in range(0, len(split), _BLOCK):  # block by block, so that results never pile up in memory
            block = rows[start : start + _BLOCK]
            yield from pool.map(decode_rows, [block[task : task + _TASK] for task in range(0, len(block), _TASK)])
