"""Training and evaluation transforms: whole microbatches of uint8 images in, normalised floats out.

Every transform works on the batch at once, on whatever device holds it, and takes its random numbers from the
samples' keys (see randomness.py): the same sample gets the same change in every launch, worker and restart. Each
transform owns fixed places in a sample's stream of numbers, so switching one on leaves the draws of the others alone.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lockstep.randomness import mix_seed, uniforms
from lockstep.settings.config import AugmentConfig, Config

# First place of each transform in a sample's stream of random numbers.
_CROP, _FLIP, _WARP, _CORNERS, _COLOUR, _GRAY, _BLUR, _ERASE, _BOX, _NOISE = 0, 2, 4, 10, 18, 22, 23, 25, 30, 64

Box = tuple[Tensor, Tensor, Tensor, Tensor]


def crop_boxes(keys: Tensor, min_area: float) -> Box:
    """Centre x, centre y, width and height of a random crop, each (B,) as shares of the image, from keys (B,).

    Area is uniform in [min_area, 1], the logarithm of the aspect ratio between those of 3/4 and
    4/3, as in GoogLeNet training (Szegedy et al. 2015); a box that would leave the image is shortened to it.
    """
    draws = uniforms(keys, 4, _BOX)
    area = min_area + (1 - min_area) * draws[:, 0]
    log_aspect = math.log(4 / 3) * (2 * draws[:, 1] - 1)
    width = (area * log_aspect.exp()).sqrt().clamp(max=1)
    height = (area / log_aspect.exp()).sqrt().clamp(max=1)
    x = width / 2 + (1 - width) * draws[:, 2]
    y = height / 2 + (1 - height) * draws[:, 3]
    return x, y, width, height


@dataclass(frozen=True)
class Transform:
    """Turns uint8 images (B, H, W, C) into normalised floats (B, C, H, W), in channels_last memory."""

    config: AugmentConfig
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dtype: torch.dtype
    precropped: bool = False
    """The random resized crop was done where the images were decoded"""
    num_classes: int = 0
    """Width of the soft targets that mixing makes"""

    def evaluate(self, images: Tensor) -> Tensor:
        """Normalise only: (x / 255 - mean) / std."""
        mean = torch.tensor(self.mean, dtype=torch.float64)
        std = torch.tensor(self.std, dtype=torch.float64)
        scale = (1 / (255 * std)).to(images.device, self.dtype).view(-1, 1, 1)
        bias = (-mean / std).to(images.device, self.dtype).view(-1, 1, 1)
        pixels = images.permute(0, 3, 1, 2).to(self.dtype, memory_format=torch.channels_last)
        return torch.addcmul(bias, pixels, scale)

    def train_batch(
        self, images: Tensor, labels: Tensor, keys: Tensor, seed: tuple[int, int, int]
    ) -> tuple[Tensor, Tensor]:
        """`train`, and mixing if the settings ask for it: images (B, C, H, W), targets (B,) or soft (B, classes)."""
        pixels = self.train(images, keys)
        return mix(pixels, labels, self.config, self.num_classes, seed) if mixes(self.config) else (pixels, labels)

    def train(self, images: Tensor, keys: Tensor) -> Tensor:
        """Augment with the randomness of `keys`, int64 (B,), then normalise."""
        if self.config.crop_padding:
            images = _padded_crop(images, uniforms(keys, 2, _CROP), self.config.crop_padding)
        images = _flip(images, keys, self.config)
        if self._warps or self._recolours:
            pixels = images.permute(0, 3, 1, 2).to(self.dtype)
            if self._warps:
                pixels = _warp(pixels, self._homographies(keys, pixels.shape[3] / pixels.shape[2]))
            pixels = _recolour(pixels, keys, self.config)
            images = pixels.permute(0, 2, 3, 1)
        images = self.evaluate(images)
        return _erase(images, keys, self.config.erasing) if self.config.erasing else images

    @property
    def _warps(self) -> bool:
        c = self.config
        crops = c.resized_crop > 0 and not self.precropped
        return crops or any((c.rotation, c.translate, c.zoom, c.shear, c.perspective))

    @property
    def _recolours(self) -> bool:
        c = self.config
        return any((*c.jitter, c.grayscale, c.blur, c.noise))

    def _homographies(self, keys: Tensor, aspect: float) -> Tensor:
        """Matrices (B, 3, 3), float64, that map output to input coordinates in [-1, 1]: crop, then warp.

        `aspect` is width / height.
        """
        matrices = _affine(uniforms(keys, 6, _WARP), self.config, aspect)
        if self.config.perspective:
            matrices = _perspective(uniforms(keys, 8, _CORNERS), self.config.perspective) @ matrices
        if self.config.resized_crop and not self.precropped:
            x, y, width, height = crop_boxes(keys, self.config.resized_crop)
            box = torch.eye(3, dtype=torch.float64, device=keys.device).repeat(len(keys), 1, 1)
            box[:, 0, 0], box[:, 0, 2] = width, 2 * x - 1
            box[:, 1, 1], box[:, 1, 2] = height, 2 * y - 1
            matrices = box @ matrices
        return matrices


def _padded_crop(images: Tensor, draws: Tensor, padding: int) -> Tensor:
    """Pad with black, then cut each image's own window of the old size."""
    batch, height, width, channels = images.shape
    padded = F.pad(images, (0, 0, padding, padding, padding, padding))
    tops, lefts = (draws * (2 * padding + 1)).long().unbind(1)
    first_rows = torch.arange(batch, device=images.device) * padded.shape[1] + tops
    rows = first_rows[:, None] + torch.arange(height, device=images.device)
    # A row of a window is a run of bytes, so the windows are slices of an overlapping view: six times as fast as
    # one index per pixel (2.2 M against 0.36 M 32x32 images/s on two CPU cores).
    run = width * channels
    runs = padded.flatten().as_strided((padded.numel() - run + 1, run), (1, 1))
    starts = (rows * padded.shape[2] + lefts[:, None]) * channels
    return runs.index_select(0, starts.flatten()).view(images.shape)


def _flip(images: Tensor, keys: Tensor, config: AugmentConfig) -> Tensor:
    for wanted, axis, place in ((config.flip, 2, _FLIP), (config.vertical_flip, 1, _FLIP + 1)):
        if wanted:
            chosen = uniforms(keys, 1, place)[:, 0] < 0.5
            images = torch.where(chosen.view(-1, 1, 1, 1), images.flip(axis), images)
    return images


def _affine(draws: Tensor, config: AugmentConfig, aspect: float) -> Tensor:
    """Rotation, zoom, shear and shift about the centre, (B, 3, 3); angles are those of pixels, so `aspect` counts."""
    signed = 2 * draws - 1
    angle, shear = torch.deg2rad(signed[:, 0] * config.rotation), torch.deg2rad(signed[:, 1] * config.shear)
    scale = 1 / (1 + signed[:, 2] * config.zoom)
    matrices = torch.zeros(len(draws), 3, 3, dtype=torch.float64, device=draws.device)
    matrices[:, 0, 0] = scale * angle.cos()
    matrices[:, 0, 1] = scale * (shear.tan() * angle.cos() - angle.sin()) / aspect
    matrices[:, 1, 0] = scale * angle.sin() * aspect
    matrices[:, 1, 1] = scale * (shear.tan() * angle.sin() + angle.cos())
    matrices[:, :2, 2] = 2 * signed[:, 3:5] * config.translate
    matrices[:, 2, 2] = 1
    return matrices


def _perspective(draws: Tensor, strength: float) -> Tensor:
    """Projective maps (B, 3, 3) that take points inside the corners, by up to strength * half size, back to them."""
    corners = torch.tensor([[-1, -1], [1, -1], [1, 1], [-1, 1]], dtype=torch.float64, device=draws.device)
    moved = corners * (1 - strength * draws.view(-1, 4, 2))
    x, y = moved.unbind(-1)
    u, v = corners.expand_as(moved).unbind(-1)
    one, zero = torch.ones_like(x), torch.zeros_like(x)
    # Eight unknowns h with (h0 x + h1 y + h2) / (h6 x + h7 y + 1) = u, likewise v, at the four corners.
    rows_u = torch.stack([x, y, one, zero, zero, zero, -x * u, -y * u], -1)
    rows_v = torch.stack([zero, zero, zero, x, y, one, -x * v, -y * v], -1)
    solution = torch.linalg.solve(torch.cat([rows_u, rows_v], 1), torch.cat([u, v], 1))
    return torch.cat([solution, one[:, :1]], 1).view(-1, 3, 3)


def _warp(pixels: Tensor, homographies: Tensor) -> Tensor:
    """Resample (B, C, H, W) bilinearly; what lies outside is black."""
    _, _, height, width = pixels.shape
    y = (torch.arange(height, dtype=torch.float64, device=pixels.device) * 2 + 1) / height - 1
    x = (torch.arange(width, dtype=torch.float64, device=pixels.device) * 2 + 1) / width - 1
    points = torch.stack([x.expand(height, width), y[:, None].expand(height, width), torch.ones_like(x * y[:, None])])
    mapped = homographies @ points.flatten(1)
    grid = (mapped[:, :2] / mapped[:, 2:]).transpose(1, 2).reshape(-1, height, width, 2)
    return F.grid_sample(pixels, grid.to(pixels.dtype), align_corners=False)


def _recolour(pixels: Tensor, keys: Tensor, config: AugmentConfig) -> Tensor:
    """Colour jitter, grayscale, blur and noise on floats (B, C, H, W) in [0, 255]."""
    brightness, contrast, saturation, hue = (*config.jitter, 0, 0, 0, 0)[:4]
    draws = (2 * uniforms(keys, 4, _COLOUR) - 1).to(pixels.dtype)

    def factor(place: int, strength: float) -> Tensor:
        return (1 + strength * draws[:, place]).clamp(min=0).view(-1, 1, 1, 1)

    if brightness:
        pixels = (pixels * factor(0, brightness)).clamp(0, 255)
    if contrast:
        pixels = pixels.lerp(_luma(pixels).mean((1, 2, 3), keepdim=True), 1 - factor(1, contrast)).clamp(0, 255)
    if saturation:
        pixels = pixels.lerp(_luma(pixels), 1 - factor(2, saturation)).clamp(0, 255)
    if hue:
        pixels = _turn_hue(pixels, draws[:, 3] * hue).clamp(0, 255)
    if config.grayscale:
        chosen = uniforms(keys, 1, _GRAY)[:, 0] < config.grayscale
        pixels = torch.where(chosen.view(-1, 1, 1, 1), _luma(pixels), pixels)
    if config.blur:
        pixels = _blur(pixels, uniforms(keys, 2, _BLUR), config.blur)
    if config.noise:
        pixels = pixels + 255 * config.noise * _normals(keys, pixels[0]).to(pixels.dtype)
    return pixels


def _luma(pixels: Tensor) -> Tensor:
    """Brightness (B, 1, H, W) by ITU-R 601, as PIL and torchvision take it."""
    if pixels.shape[1] == 1:
        return pixels
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=pixels.dtype, device=pixels.device)
    return (pixels * weights.view(1, 3, 1, 1)).sum(1, keepdim=True)


def _turn_hue(pixels: Tensor, turns: Tensor) -> Tensor:
    """Rotate the colour plane of YIQ by a share of a full turn, (B,): a linear stand-in for the hue of HSV."""
    to_yiq = torch.tensor(
        [[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]],
        dtype=torch.float64,
        device=pixels.device,
    )
    angle = 2 * math.pi * turns.double()
    rotation = torch.eye(3, dtype=torch.float64, device=pixels.device).repeat(len(turns), 1, 1)
    rotation[:, 1, 1] = rotation[:, 2, 2] = angle.cos()
    rotation[:, 1, 2], rotation[:, 2, 1] = -angle.sin(), angle.sin()
    matrices = (torch.linalg.inv(to_yiq) @ rotation @ to_yiq).to(pixels.dtype)
    return torch.einsum("bij,bjhw->bihw", matrices, pixels)


def _blur(pixels: Tensor, draws: Tensor, probability: float) -> Tensor:
    """Gaussian blur with each image's own sigma in [0.1, 2] pixels, separable, edges repeated."""
    batch, channels, height, width = pixels.shape
    radius = 4
    sigma = (0.1 + 1.9 * draws[:, 1]).to(pixels.dtype).view(-1, 1)
    offsets = torch.arange(-radius, radius + 1, dtype=pixels.dtype, device=pixels.device)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(channels, 0)
    flat = F.pad(pixels.reshape(1, batch * channels, height, width), (radius,) * 4, mode="replicate")
    flat = F.conv2d(flat, kernel[:, None, :, None], groups=batch * channels)
    flat = F.conv2d(flat, kernel[:, None, None, :], groups=batch * channels)
    chosen = (draws[:, 0] < probability).view(-1, 1, 1, 1)
    return torch.where(chosen, flat.view_as(pixels), pixels)


def _normals(keys: Tensor, like: Tensor) -> Tensor:
    """Standard normal numbers (B, C, H, W), float64, by Box and Muller (1958)."""
    draws = uniforms(keys, 2 * like.numel(), _NOISE)
    radius = torch.sqrt(-2 * torch.log1p(-draws[:, : like.numel()]))
    return (radius * torch.cos(2 * math.pi * draws[:, like.numel() :])).view(-1, *like.shape)


def _inside(box: Box, height: int, width: int) -> Tensor:
    """Mask (B, 1, H, W) of the pixels whose centres lie in each box."""
    x, y, box_width, box_height = (side.view(-1, 1) for side in box)
    rows = (torch.arange(height, device=x.device) + 0.5) / height
    columns = (torch.arange(width, device=x.device) + 0.5) / width
    in_rows = (rows - y).abs() < box_height / 2
    in_columns = (columns - x).abs() < box_width / 2
    return (in_rows[:, :, None] & in_columns[:, None, :])[:, None]


def _erase(images: Tensor, keys: Tensor, probability: float) -> Tensor:
    """Set a rectangle to the mean colour, in place (Zhong et al. 2020, "Random erasing data augmentation")."""
    draws = uniforms(keys, 5, _ERASE)
    area = 0.02 + 0.38 * draws[:, 1]
    aspect = torch.exp(math.log(0.3) + 2 * math.log(1 / 0.3) * draws[:, 2])
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    box = (width / 2 + (1 - width) * draws[:, 3], height / 2 + (1 - height) * draws[:, 4], width, height)
    chosen = (draws[:, 0] < probability).view(-1, 1, 1, 1)
    return images.masked_fill_(_inside(box, *images.shape[2:]) & chosen, 0)


def mixes(config: AugmentConfig) -> bool:
    """Whether these settings call for `mix`."""
    return bool(config.mixup or config.cutmix)


def mix(
    images: Tensor, labels: Tensor, config: AugmentConfig, num_classes: int, seed: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    """Mixup or cutmix within a microbatch: images (B, C, H, W) and soft targets (B, num_classes).

    One weight for the microbatch, each image with its neighbour, all from `seed`, that is (seed, step, microbatch).
    A sample whose image was skipped (label -100) has no target and mixes with weight 0. Mixup: Zhang et al. 2018;
    cutmix: Yun et al. 2019.
    """
    random = np.random.default_rng(mix_seed(*seed, 1))
    alphas = {name: getattr(config, name) for name in ("mixup", "cutmix") if getattr(config, name)}
    kind = str(random.choice(list(alphas)))
    weight = random.beta(alphas[kind], alphas[kind])
    partners = images.roll(1, 0)
    if kind == "cutmix":
        side = torch.tensor([math.sqrt(1 - weight)], dtype=torch.float64)
        x, y = torch.tensor(random.random((2, 1)))
        mask = _inside((x, y, side, side), *images.shape[2:])
        weight = 1 - mask.double().mean().item()
        images = torch.where(mask.to(images.device), partners, images)
    else:
        images = images.lerp(partners, 1 - weight)
    dtype = torch.promote_types(images.dtype, torch.float32)
    targets = F.one_hot(labels.clamp(min=0), num_classes).to(dtype) * (labels >= 0).unsqueeze(1)
    return images, targets.lerp(targets.roll(1, 0), 1 - weight)


def build_transform(
    config: Config, mean: tuple[float, ...], std: tuple[float, ...], num_classes: int, *, precropped: bool
) -> Transform:
    """The transform for images with these statistics; raises ValueError where a setting could have no effect."""
    augment = config.augment
    if len(mean) == 1:
        colour = {"jitter (saturation, hue)": any(augment.jitter[2:]), "grayscale": augment.grayscale > 0}
        useless = [name for name, wanted in colour.items() if wanted]
        if useless:
            raise ValueError(f"--augment.{' and '.join(useless)} cannot change grey images: leave it out")
    return Transform(augment, mean, std, getattr(torch, config.runtime.dtype), precropped, num_classes)
