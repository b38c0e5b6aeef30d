"""What pixels look like: jitter, grayscale, blur and noise on floats (B, C, H, W) in [0, 255]."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lockstep.randomness import draw, normals
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
    draws = draw(keys, "blur", 2)
    blurred = gaussian_blur(pixels, (0.1 + 1.9 * draws[:, 1]).to(pixels.dtype).view(-1, 1))
    return torch.where((draws[:, 0] < config.blur).view(-1, 1, 1, 1), blurred, pixels)


def gaussian_blur(pixels: Tensor, sigma: Tensor) -> Tensor:
    """Blur each image of floats (B, C, H, W) with its own sigma (B, 1), in pixels up to 2; edges are repeated."""
    batch, channels, height, width = pixels.shape
    offsets = torch.arange(-_BLUR_RADIUS_PIXELS, _BLUR_RADIUS_PIXELS + 1, dtype=pixels.dtype, device=pixels.device)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(channels, 0)
    flat = F.pad(pixels.reshape(1, batch * channels, height, width), (_BLUR_RADIUS_PIXELS,) * 4, mode="replicate")
    flat = F.conv2d(flat, kernel[:, None, :, None], groups=batch * channels)
    flat = F.conv2d(flat, kernel[:, None, None, :], groups=batch * channels)
    return flat.view(pixels.shape)


def noise(pixels: Tensor, keys: Tensor, config: AugmentConfig) -> Tensor:
    """Add Gaussian noise."""
    count = pixels[0].numel()
    draws = draw(keys, "noise", 2 * count)
    return pixels + 255 * config.noise * normals(draws[:, :count], draws[:, count:]).view(pixels.shape).to(pixels.dtype)


def luma(pixels: Tensor) -> Tensor:
    """Brightness (B, 1, H, W) by ITU-R 601, as PIL and torchvision take it."""
    if pixels.shape[1] == 1:
        return pixels
    red, green, blue = pixels.unbind(1)
    return (0.299 * red + 0.587 * green + 0.114 * blue)[:, None]


def turn_hue(pixels: Tensor, turns: Tensor) -> Tensor:
    """Turn the hue of HSV by a share of a full circle, (B,), in colour images (B, 3, H, W); grey stays grey."""
    red, green, blue = pixels.unbind(1)
    value = pixels.amax(1)
    chroma = value - pixels.amin(1)
    divisor = chroma.where(chroma > 0, 1)
    sixths = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    sixths = sixths + 6 * turns.view(-1, 1, 1)
    places = torch.stack([(start + sixths) % 6 for start in (5, 3, 1)], 1)
    return value[:, None] - chroma[:, None] * torch.minimum(places, 4 - places).clamp(0, 1)
