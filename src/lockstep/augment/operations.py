"""What augmentation policies do to pictures: each image of a batch its own operation, by its own strength.

Pictures are uint8 (B, C, H, W) and stay so: as in torchvision, a product is cut off at its decimals, and resampled
pixels are rounded. No operation is called image by image. All warps are one resampling by a matrix of each image's own;
whatever maps values to values is one look-up in a table of each image's own; the others blend.
"""

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

from lockstep.augment.colour import gaussian_blur
from lockstep.augment.geometry import warp
from lockstep.randomness import real_type

# ---- tables: pictures and strengths (B, 1, 1) to what becomes of the values 0 to 255, (B, 1 or C, 256)


def _brightness(images: Tensor, strengths: Tensor) -> Tensor:
    return (1 + strengths).float() * _values(images)


def _contrast(images: Tensor, strengths: Tensor) -> Tensor:
    means = _grey(images).mean((2, 3))[:, :, None]
    return (1 + strengths).float() * _values(images) - strengths.float() * means


def _posterize(images: Tensor, strengths: Tensor) -> Tensor:
    step = torch.exp2(8 - strengths.float())
    return (_values(images) / step).floor() * step


def _solarize(images: Tensor, strengths: Tensor) -> Tensor:
    return torch.where(_values(images) >= strengths.float(), 255 - _values(images), _values(images))


def _solarize_add(images: Tensor, strengths: Tensor) -> Tensor:
    return torch.where(_values(images) < 128, _values(images) + strengths.float(), _values(images))


def _invert(images: Tensor, strengths: Tensor) -> Tensor:
    return (255 - _values(images)).expand(len(images), 1, 256)


def _autocontrast(images: Tensor, strengths: Tensor) -> Tensor:
    lowest, highest = (bound[:, :, None].float() for bound in (images.amin((2, 3)), images.amax((2, 3))))
    spread = highest - lowest
    return torch.where(spread > 0, (_values(images) - lowest) * (255 / spread), _values(images))


def _equalize(images: Tensor, strengths: Tensor) -> Tensor:
    counts = _histogram(images)
    highest = images.amax((2, 3)).long()[:, :, None]
    step = (images[0, 0].numel() - counts.gather(2, highest)) // 255
    below = counts.cumsum(2) - counts
    even = (step // 2 + below) // step.clamp(min=1)
    return torch.where(step > 0, even.float(), _values(images))


def _histogram(images: Tensor) -> Tensor:
    """How often each value occurs in each channel, int64 (B, C, 256)."""
    batch, channels = images.shape[:2]
    places = images.reshape(batch * channels, -1).long()
    places += 256 * torch.arange(batch * channels, device=images.device)[:, None]
    counts = torch.zeros(batch * channels * 256, dtype=torch.int64, device=images.device)
    # Not `bincount`, for which a GPU's host waits, nor `histc`, which deterministic algorithms refuse.
    return counts.index_add_(0, places.flatten(), torch.ones_like(places).flatten()).view(batch, channels, 256)


def _values(images: Tensor) -> Tensor:
    return torch.arange(256, dtype=torch.float32, device=images.device)


# ---- blends: pictures and strengths (B, 1, 1) to floats (B, C, H, W)


def _colour(images: Tensor, strengths: Tensor) -> Tensor:
    return _blend(images, _grey(images), strengths) if images.shape[1] == 3 else images.float()


def _sharpness(images: Tensor, strengths: Tensor) -> Tensor:
    """The blurred one is that of torchvision and PIL: a 3x3 mean in which the centre counts five times."""
    inner, (height, width) = images.float(), images.shape[2:]
    if min(height, width) < 3:
        return inner
    ones = sum(inner[:, :, y : y + height - 2, x : x + width - 2] for y in range(3) for x in range(3))
    blurred = inner.clone()
    blurred[:, :, 1:-1, 1:-1] = ((ones + 4 * inner[:, :, 1:-1, 1:-1]) / 13).round()
    return _blend(images, blurred, strengths)


def _gaussian_blur(images: Tensor, strengths: Tensor) -> Tensor:
    return gaussian_blur(images.float(), strengths.float().view(-1, 1)).round()


def _blend(images: Tensor, other: Tensor, strengths: Tensor) -> Tensor:
    return (1 + strengths[..., None]).float() * images - strengths[..., None].float() * other


def _grey(images: Tensor) -> Tensor:
    """Brightness (B, 1, H, W) as torchvision's, in whole numbers."""
    if images.shape[1] == 1:
        return images.float()
    red, green, blue = images.float().unbind(1)
    return (0.2989 * red + 0.587 * green + 0.114 * blue).floor()[:, None]


Change = Callable[[Tensor, Tensor], Tensor]
WARPS = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
"""By strength: tangent, tangent, pixels to the right, pixels down, degrees anticlockwise"""
TABLES: dict[str, Change] = {
    "brightness": _brightness,
    "contrast": _contrast,
    "posterize": _posterize,
    "solarize": _solarize,
    "solarize_add": _solarize_add,
    "invert": _invert,
    "autocontrast": _autocontrast,
    "equalize": _equalize,
}
"""By strength: factor - 1, factor - 1, bits that are kept, first value that is inverted, what dark values gain"""
BLENDS: dict[str, Change] = {"color": _colour, "sharpness": _sharpness, "gaussian_blur": _gaussian_blur}
"""By strength: factor - 1, factor - 1, sigma in pixels"""
OPERATIONS = (*WARPS, *TABLES, *BLENDS, "identity")


def operate(images: Tensor, choices: Tensor, strengths: Tensor, fill: tuple[float, ...] = (0.0,)) -> Tensor:
    """Do to each picture, uint8 (B, C, H, W), the operation `choices` (B,), an index of OPERATIONS, by its strength.

    Strengths (B,) are in each operation's own unit. What a warp uncovers gets the colour `fill`, of 1 or C values.
    """
    warps = choices < len(WARPS)
    images = _where(warps, partial(_warped, fill), images, images, choices, strengths)
    tables = (choices >= len(WARPS)) & (choices < len(WARPS) + len(TABLES))
    images = _where(tables, _looked_up, images, images, choices, strengths)
    for name, blend in BLENDS.items():
        chosen = choices == OPERATIONS.index(name)
        images = _where(chosen, partial(_blended, blend), images, images, strengths[:, None, None])
    return images


def _where(chosen: Tensor, change: Callable[..., Tensor], old: Tensor, *inputs: Tensor) -> Tensor:
    """`old` (B, ...), with `change` of the inputs (B, ...) where `chosen` (B,).

    On a GPU all are changed, because the host would wait to hear which are chosen.
    """
    if chosen.device.type != "cpu":
        return torch.where(chosen.view(-1, *[1] * (old.ndim - 1)), change(*inputs), old)
    rows = chosen.nonzero()[:, 0]
    return old.index_copy(0, rows, change(*(part[rows] for part in inputs))) if len(rows) else old


def _warped(fill: tuple[float, ...], images: Tensor, choices: Tensor, strengths: Tensor) -> Tensor:
    colour = _constant(fill, images.device).view(-1, 1, 1)
    matrices = _matrices(choices, strengths, images.shape[2] / images.shape[3], images.shape[3])
    return _cut((warp(images - colour, matrices) + colour).round())


def _matrices(choices: Tensor, strengths: Tensor, tallness: float, width: int) -> Tensor:
    """From output to input coordinates in [-1, 1], (B, 3, 3); shears leave the upper left corner where it is."""
    strengths = strengths.to(real_type(strengths.device))
    shear_x, shear_y, right, down, turn = (
        torch.where(choices == OPERATIONS.index(name), strengths, 0) for name in WARPS
    )
    angle = torch.deg2rad(turn)
    matrices = torch.zeros(len(choices), 3, 3, dtype=strengths.dtype, device=strengths.device)
    matrices[:, 0, 0] = matrices[:, 1, 1] = angle.cos()
    matrices[:, 0, 1] = (shear_x - angle.sin()) * tallness
    matrices[:, 1, 0] = (shear_y + angle.sin()) / tallness
    matrices[:, 0, 2] = shear_x * tallness - 2 * right / width
    matrices[:, 1, 2] = shear_y / tallness - 2 * down / (width * tallness)
    matrices[:, 2, 2] = 1
    return matrices


def _blended(blend: Change, images: Tensor, strengths: Tensor) -> Tensor:
    return _cut(blend(images, strengths))


def _looked_up(images: Tensor, choices: Tensor, strengths: Tensor) -> Tensor:
    tables = _cut(_values(images)).repeat(*images.shape[:2], 1)
    for name, table in TABLES.items():
        chosen = choices == OPERATIONS.index(name)
        tables = _where(chosen, partial(_tabled, table), tables, images, strengths[:, None, None])
    return tables.gather(2, images.flatten(2).long()).view(images.shape)


def _tabled(table: Change, images: Tensor, strengths: Tensor) -> Tensor:
    return _cut(table(images, strengths)).expand(*images.shape[:2], 256)


def _cut(values: Tensor) -> Tensor:
    return values.clamp(0, 255).to(torch.uint8)


@cache  # a step does not wait for a GPU to have them
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).to(device)
