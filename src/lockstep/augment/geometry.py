"""Where pixels go: windows, mirrors, warps and erased rectangles, in whole batches."""

import math
from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from lockstep.randomness import draw, normals, real_type
from lockstep.settings.config import AugmentConfig

Box = tuple[Tensor, Tensor, Tensor, Tensor]
"""Centre x, centre y, width and height, each (B,) as shares of the image"""


def padded_crop(images: Tensor, keys: Tensor, config: AugmentConfig) -> Tensor:
    """Pad uint8 (B, H, W, C) with black, then cut each image's own window of the old size."""
    padding = config.crop_padding
    batch, height, width, channels = images.shape
    padded = F.pad(images, (0, 0, padding, padding, padding, padding))
    tops, lefts = (draw(keys, "padded_crop", 2) * (2 * padding + 1)).long().unbind(1)
    first_rows = torch.arange(batch, device=images.device) * padded.shape[1] + tops
    rows = first_rows[:, None] + torch.arange(height, device=images.device)
    # A row of a window is a run of bytes, so the windows are slices of an overlapping view: six times as fast as
    # one index per pixel (2.2 M against 0.36 M 32x32 images/s on two CPU cores).
    run = width * channels
    runs = padded.flatten().as_strided((padded.numel() - run + 1, run), (1, 1))
    starts = (rows * padded.shape[2] + lefts[:, None]) * channels
    return runs.index_select(0, starts.flatten()).view(images.shape)


def flip(images: Tensor, keys: Tensor, config: AugmentConfig) -> Tensor:
    """Mirror half of the images (B, H, W, C) left-right."""
    return _mirrored(images, draw(keys, "flip", 1)[:, 0] < 0.5, axis=2)


def vertical_flip(images: Tensor, keys: Tensor, config: AugmentConfig) -> Tensor:
    """Mirror half of the images (B, H, W, C) top-bottom."""
    return _mirrored(images, draw(keys, "vertical_flip", 1)[:, 0] < 0.5, axis=1)


_WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)


def _mirrored(images: Tensor, chosen: Tensor, axis: int) -> Tensor:
    # By words of as many bytes as divide an image: a choice for each byte takes six times as long on a CPU.
    image_bytes = math.prod(images.shape[1:])
    word = next(word for word in _WORDS if image_bytes % word.itemsize == 0)
    plain, mirrored = (version.reshape(-1, image_bytes).view(word) for version in (images, images.flip(axis)))
    return torch.where(chosen[:, None], mirrored, plain).view(torch.uint8).view(images.shape)


# ---- warps: matrices (B, 3, 3) that map output to input coordinates in [-1, 1]; aspect is width / height


def affine(keys: Tensor, config: AugmentConfig, aspect: float) -> Tensor:
    """Rotation, zoom, shear and shift about the centre; angles are those of pixels, so the aspect counts."""
    signed = 2 * draw(keys, "affine", 6) - 1
    angle, shear = torch.deg2rad(signed[:, 0] * config.rotation), torch.deg2rad(signed[:, 1] * config.shear)
    scale = 1 / (1 + signed[:, 2] * config.zoom)
    matrices = torch.zeros(len(keys), 3, 3, dtype=real_type(keys.device), device=keys.device)
    matrices[:, 0, 0] = scale * angle.cos()
    matrices[:, 0, 1] = scale * (shear.tan() * angle.cos() - angle.sin()) / aspect
    matrices[:, 1, 0] = scale * angle.sin() * aspect
    matrices[:, 1, 1] = scale * (shear.tan() * angle.sin() + angle.cos())
    matrices[:, :2, 2] = 2 * signed[:, 3:5] * config.translate
    matrices[:, 2, 2] = 1
    return matrices


def perspective(keys: Tensor, config: AugmentConfig, aspect: float) -> Tensor:
    """Projective maps that take points inside the corners, by up to strength * half size, back to them."""
    corners = _corners(real_type(keys.device), keys.device)
    moved = corners * (1 - config.perspective * draw(keys, "perspective", 8).view(-1, 4, 2))
    x, y = moved.unbind(-1)
    u, v = corners.expand_as(moved).unbind(-1)
    one, zero = torch.ones_like(x), torch.zeros_like(x)
    # Eight unknowns h with (h0 x + h1 y + h2) / (h6 x + h7 y + 1) = u, likewise v, at the four corners.
    rows_u = torch.stack([x, y, one, zero, zero, zero, -x * u, -y * u], -1)
    rows_v = torch.stack([zero, zero, zero, x, y, one, -x * v, -y * v], -1)
    # Not `solve`, for which a GPU's host waits to see whether there is a solution.
    solution = torch.linalg.solve_ex(torch.cat([rows_u, rows_v], 1), torch.cat([u, v], 1)).result
    return torch.cat([solution, one[:, :1]], 1).view(-1, 3, 3)


@cache  # a step does not wait for a GPU to have them
def _corners(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor([[-1, -1], [1, -1], [1, 1], [-1, 1]], dtype=dtype).to(device)


def resized_crop(keys: Tensor, config: AugmentConfig, aspect: float) -> Tensor:
    """A random crop, resized to the whole image."""
    x, y, width, height = crop_boxes(keys, config.resized_crop, aspect)
    matrices = torch.eye(3, dtype=real_type(keys.device), device=keys.device).repeat(len(keys), 1, 1)
    matrices[:, 0, 0], matrices[:, 0, 2] = width, 2 * x - 1
    matrices[:, 1, 1], matrices[:, 1, 2] = height, 2 * y - 1
    return matrices


_TRIES = 10
"""As torchvision: boxes drawn until one lies inside the image"""


def crop_boxes(keys: Tensor, min_area: float, aspect: float) -> Box:
    """A random crop for each key (B,) of an image whose width is `aspect` times its height.

    As torchvision's RandomResizedCrop, after GoogLeNet (Szegedy et al. 2015): area uniform in [min_area, 1], logarithm
    of the aspect in pixels uniform between those of 3/4 and 4/3, drawn until the box fits; after ten tries the
    largest central box of an aspect in this range.
    """
    draws = crop_draws(keys)
    area, ratio = _spread(draws[:, 2::2], min_area, 1), _spread(draws[:, 3::2], -1, 1).mul(math.log(4 / 3)).exp()
    width, height, fits = _first_that_fits(area, ratio / aspect)
    width = torch.where(fits, width, min(1.0, 4 / 3 / aspect))
    height = torch.where(fits, height, min(1.0, aspect * 4 / 3))
    places = torch.where(fits[:, None], draws[:, :2], 0.5)
    return width / 2 + (1 - width) * places[:, 0], height / 2 + (1 - height) * places[:, 1], width, height


def crop_draws(keys: Tensor) -> Tensor:
    """What the crop of each key (B,) is made of, (B, 22) in [0, 1): its place, then area and aspect of each try."""
    return draw(keys, "resized_crop", 2 + 2 * _TRIES)


def pixel_box(draws: Sequence[float], min_area: float, width: int, height: int) -> tuple[int, int, int, int]:
    """The crop of `crop_boxes` in whole pixels of one image: left, top, width and height.

    `draws` is its row of `crop_draws`. Sides are rounded, and the place is one of all that the box has inside the
    image, as in torchvision's RandomResizedCrop.
    """
    x, y, *tries = draws
    for area_share, ratio_share in zip(tries[::2], tries[1::2], strict=True):
        area = (min_area + (1 - min_area) * area_share) * width * height
        ratio = math.exp((2 * ratio_share - 1) * math.log(4 / 3))
        box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            return int(x * (width - box_width + 1)), int(y * (height - box_height + 1)), box_width, box_height
    box_width, box_height = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return (width - box_width) // 2, (height - box_height) // 2, box_width, box_height


def _spread(shares: Tensor, low: float, high: float) -> Tensor:
    """Numbers in [0, 1) as numbers in [low, high)."""
    return low + (high - low) * shares


def _first_that_fits(area: Tensor, ratio: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Width and height (B,) of the first box that lies inside the image, and whether there is one, from tries (B, N).

    Sides, `area` and `ratio` (width / height) are in shares of the image.
    """
    width, height = (area * ratio).sqrt(), (area / ratio).sqrt()
    fit = (width <= 1) & (height <= 1)
    first = fit.to(torch.uint8).argmax(1, keepdim=True)  # 0 if there is none
    return width.gather(1, first)[:, 0], height.gather(1, first)[:, 0], fit.any(1)


def warp(pixels: Tensor, homographies: Tensor) -> Tensor:
    """Resample floats (B, C, H, W) bilinearly; what lies outside is black."""
    _, _, height, width = pixels.shape
    y = (torch.arange(height, dtype=homographies.dtype, device=pixels.device) * 2 + 1) / height - 1
    x = (torch.arange(width, dtype=homographies.dtype, device=pixels.device) * 2 + 1) / width - 1
    points = torch.stack([x.expand(height, width), y[:, None].expand(height, width), torch.ones_like(x * y[:, None])])
    mapped = homographies @ points.flatten(1)
    grid = (mapped[:, :2] / mapped[:, 2:]).transpose(1, 2).reshape(-1, height, width, 2)
    return F.grid_sample(pixels, grid.to(pixels.dtype), align_corners=False)


# ---- rectangles


def erase(pixels: Tensor, keys: Tensor, config: AugmentConfig) -> Tensor:
    """Paint rectangles of normalised floats (B, C, H, W), in place: 0, the mean colour, or normal random numbers.

    Zhong et al. 2020, "Random erasing data augmentation"; as in timm and torchvision 2 % to a third of the area, which
    several rectangles share, aspect in pixels from 0.3 to 1 / 0.3.
    """
    most, block = config.erasing_count, 2 + 2 * _TRIES
    draws = draw(keys, "erase", 1 + most * block + (most > 1))
    counts = (draws[:, -1] * most).long() + 1 if most > 1 else torch.ones_like(keys)
    for number in range(most):
        box, fits = _erased_box(draws[:, 1 + number * block :][:, :block], counts, pixels.shape[3] / pixels.shape[2])
        chosen = (draws[:, 0] < config.erasing) & fits & (number < counts)
        mask = inside(box, *pixels.shape[2:]) & chosen.view(-1, 1, 1, 1)
        if config.erasing_mode == "const":
            pixels.masked_fill_(mask, 0)
        else:
            pixels.copy_(torch.where(mask, _paint(pixels, keys, config.erasing_mode, number), pixels))
    return pixels


def _erased_box(draws: Tensor, counts: Tensor, aspect: float) -> tuple[Box, Tensor]:
    """One of `counts` (B,) rectangles, and whether there is one that fits."""
    area = _spread(draws[:, 2::2], 0.02, 1 / 3) / counts[:, None]
    ratio = _spread(draws[:, 3::2], -1, 1).mul(math.log(1 / 0.3)).exp()
    width, height, fits = _first_that_fits(area, ratio / aspect)
    return (width / 2 + (1 - width) * draws[:, 0], height / 2 + (1 - height) * draws[:, 1], width, height), fits


def _paint(pixels: Tensor, keys: Tensor, mode: str, number: int) -> Tensor:
    """Normal random numbers: a colour for each image, (B, C, 1, 1), or one for each pixel."""
    batch, channels, height, width = pixels.shape
    shape = (channels, height, width) if mode == "pixel" else (channels, 1, 1)
    count = math.prod(shape)
    draws = draw(keys, f"erase_paint_{number}", 2 * count)
    return normals(draws[:, :count], draws[:, count:]).view(batch, *shape).to(pixels.dtype)


def inside(box: Box, height: int, width: int) -> Tensor:
    """Mask (B, 1, H, W) of the pixels whose centres lie in each box."""
    x, y, box_width, box_height = (side.view(-1, 1) for side in box)
    rows = (torch.arange(height, device=x.device) + 0.5) / height
    columns = (torch.arange(width, device=x.device) + 0.5) / width
    in_rows = (rows - y).abs() < box_height / 2
    in_columns = (columns - x).abs() < box_width / 2
    return (in_rows[:, :, None] & in_columns[:, None, :])[:, None]
