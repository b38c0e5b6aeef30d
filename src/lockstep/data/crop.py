"""Random crops of streamed images: no finer decoded than they need to be, resized with antialiasing."""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image
from torch import Tensor

from lockstep.augment.geometry import pixel_box
from lockstep.data.decoding import damage_named, decoded, in_channels
from lockstep.data.sources.kinds import Split

CROP_VERSION = 2
"""Raised when the same file, draws and settings give other pixels: it is among the numerics of runs with such crops"""

_FINER = 2
"""Times the pixels wanted, as far as an image is decoded finer: what Pillow's thumbnails take for enough"""

_Box = tuple[int, int, int, int]  # left, top, width, height


def read_crop(split: Split, row: int, shape: tuple[int, int, int], draws: Sequence[float], min_area: float) -> Tensor:
    """The part of the image at `row` that `pixel_box` says, resized to uint8 of `shape` (H, W, C).

    An upright JPEG in the right mode is decoded to a half, 3/8, a quarter or an eighth (by libjpeg-turbo, as a smaller
    inverse cosine transform) where its crop then still has 2 H x 2 W pixels. All other images are those of
    `read_image`, and errors are its errors.
    """
    with damage_named(split, row):
        image = split.read(row)
        box = pixel_box(draws, min_area, *image.size)
        if (pixels := _decode_jpeg(image, box, shape)) is None:
            image = decoded(image)
    if pixels is None:
        left, top, width, height = box = pixel_box(draws, min_area, *image.size)  # which may have been turned
        image = image.crop((left, top, left + width, top + height))
        cut = torch.from_numpy(np.array(in_channels(image, shape[2], split, row)).reshape(height, width, -1))
    else:
        left, top, width, height = _scaled(box, image.size, (pixels.shape[1], pixels.shape[0]))
        cut = torch.from_numpy(pixels)[top : top + height, left : left + width]
    # In a batch of one image, whose channels come last, it takes a fifth of Pillow's time (AVX2).
    resized = F.interpolate(cut[None].permute(0, 3, 1, 2), size=shape[:2], mode="bilinear", antialias=True)
    return resized[0].permute(1, 2, 0).contiguous()


def _decode_jpeg(image: Image.Image, box: _Box, shape: tuple[int, int, int]) -> np.ndarray | None:
    """Pixels uint8 (h, w, C) of an opened JPEG file; None if Pillow has to see to it.

    Without scaling they are Pillow's, bit for bit, in two thirds of its time: it keeps four bytes a pixel.
    """
    import simplejpeg

    height, width, channels = shape
    file = getattr(image, "fp", None)
    mode, colours = ("L", "GRAY") if channels == 1 else ("RGB", "RGB")
    if image.format != "JPEG" or image.mode != mode or file is None or _is_turned(image):
        return None
    file.seek(0)
    least = (math.ceil(_FINER * image.height * height / box[3]), math.ceil(_FINER * image.width * width / box[2]))
    try:
        pixels = simplejpeg.decode_jpeg(file.read(), colours, min_height=least[0], min_width=least[1], min_factor=2)
    except ValueError:  # damaged: Pillow says how, or makes what it can of it
        return None
    image.close()
    return pixels


def _is_turned(image: Image.Image) -> bool:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    except Exception:  # Pillow's own errors, and whatever a damaged tag makes its parsers do
        return True


def _scaled(box: _Box, size: tuple[int, int], new_size: tuple[int, int]) -> _Box:
    """The box on an image that was made smaller, to the nearest pixels; sizes are width and height."""
    (left, top, width, height), (across, down) = box, (new / old for new, old in zip(new_size, size, strict=True))
    right, bottom = round((left + width) * across), round((top + height) * down)
    return round(left * across), round(top * down), right - round(left * across), bottom - round(top * down)
