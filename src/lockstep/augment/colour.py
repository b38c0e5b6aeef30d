"""What pixels look like: jitter, grayscale, blur and noise on floats (B, C, H, W) in [0, 255]."""

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from lockstep.randomness import draw
from lockstep.settings.config import AugmentConfig

_BLUR_RADIUS_PIXELS = 4


def jitter(pixels: Tensor, keys: Tensor, config: AugmentConfig) -> Tensor:
    """Brightness, contrast, saturation and hue, in this order, each by a factor of the image's own."""
    brightness, contrast, saturation, hue = (*config.jitter, 0, 0, 0, 0)[:4]
    draws = (2 * draw(keys, "jitter", 4) - 1).to(pixels.dtype)

    def factor(place: int, strength: float) -> Tensor:
        return (1 + strength * draws[:, place]).clamp(min=0).view(-1, 1, 1, 1)

    if brightness:
        pixels = (pixels * factor(0, brightness)).clamp(0, 255)
    if contrast:
        pixels = pixels.lerp(luma(pixels).mean((1, 2, 3), keepdim=True), 1 - factor(1, contrast)).clamp(0, 255)
    if saturation:
        pixels = pixels.lerp(luma(pixels), 1 - factor(2, saturation)).clamp(0, 255)
    if hue:
        pixels = turn_hue(pixels, draws[:, 3] * hue).clamp(0, 255)
    return pixels


def grayscale(pixels: Tensor, keys: Tensor, config: AugmentConfig) -> Tensor:
    """Take all colour from some of the images."""
    chosen = draw(keys, "grayscale", 1)[:, 0] < config.grayscale
    return torch.where(chosen.view(-1, 1, 1, 1), luma(pixels), pixels)


def blur(pixels: Tensor, keys: Tensor, config: AugmentConfig) -> Tensor:
    """Gaussian blur of some images with each one's own sigma in [0.1, 2] pixels, separable, edges repeated."""
    batch, channels, height, width = pixels.shape
    draws = draw(keys, "blur", 2)
    sigma = (0.1 + 1.9 * draws[:, 1]).to(pixels.dtype).view(-1, 1)
    offsets = torch.arange(-_BLUR_RADIUS_PIXELS, _BLUR_RADIUS_PIXELS + 1, dtype=pixels.dtype, device=pixels.device)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(channels, 0)
    flat = F.pad(pixels.reshape(1, batch * channels, height, width), (_BLUR_RADIUS_PIXELS,) * 4, mode="replicate")
    flat = F.conv2d(flat, kernel[:, None, :, None], groups=batch * channels)
    flat = F.conv2d(flat, kernel[:, None, None, :], groups=batch * channels)
    chosen = (draws[:, 0] < config.blur).view(-1, 1, 1, 1)
    return torch.where(chosen, flat.view_as(pixels), pixels)


def noise(pixels: Tensor, keys: Tensor, config: AugmentConfig) -> Tensor:
    """Add Gaussian noise."""
    return pixels + 255 * config.noise * _normals(keys, pixels[0]).to(pixels.dtype)


def _normals(keys: Tensor, like: Tensor) -> Tensor:
    """Standard normal numbers (B, C, H, W) by Box and Muller (1958)."""
    draws = draw(keys, "noise", 2 * like.numel())
    radius = torch.sqrt(-2 * torch.log1p(-draws[:, : like.numel()]))
    return (radius * torch.cos(2 * math.pi * draws[:, like.numel() :])).view(-1, *like.shape)


def luma(pixels: Tensor) -> Tensor:
    """Brightness (B, 1, H, W) by ITU-R 601, as PIL and torchvision take it."""
    if pixels.shape[1] == 1:
        return pixels
    to_yiq, _ = _yiq(pixels.dtype, pixels.device)
    return (pixels * to_yiq[0].view(1, 3, 1, 1)).sum(1, keepdim=True)


def turn_hue(pixels: Tensor, turns: Tensor) -> Tensor:
    """Rotate the colour plane of YIQ by a share of a full turn, (B,): a linear stand-in for the hue of HSV."""
    to_yiq, from_yiq = _yiq(turns.dtype, pixels.device)
    angle = 2 * math.pi * turns
    rotation = torch.eye(3, dtype=turns.dtype, device=pixels.device).repeat(len(turns), 1, 1)
    rotation[:, 1, 1] = rotation[:, 2, 2] = angle.cos()
    rotation[:, 1, 2], rotation[:, 2, 1] = -angle.sin(), angle.sin()
    matrices = (from_yiq @ rotation @ to_yiq).to(pixels.dtype)
    return torch.einsum("bij,bjhw->bihw", matrices, pixels)


@cache  # a step does not wait for a GPU to have them, nor to say whether the inverse is one
def _yiq(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """The matrices (3, 3) from RGB to YIQ and back."""
    to_yiq = torch.tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]], dtype=dtype)
    return to_yiq.to(device), torch.linalg.inv(to_yiq).to(device)
