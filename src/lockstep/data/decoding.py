"""One image of a file, whatever its kind, as pixels of the size and the channels that a network sees."""

import errno
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageOps

from lockstep.data.sources.source import Split
from lockstep.errors import UserError

RULE_VERSION = 2
"""Raise it when `decode` gives other pixels"""
SKIP = "set --data.on_error=skip"
_GREY_MODES = ("1", "L", "LA", "I;16", "I;16B", "I;16L", "I;16N")
_ERRORS = (
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
    except _ERRORS as error:
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
