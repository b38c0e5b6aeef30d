"""Images, keys and transforms for tests of augmentation."""

from typing import Any

import torch
from torch import Tensor

from lockstep.augment.transform import Transform
from lockstep.randomness import sample_keys
from lockstep.settings.config import AugmentConfig

SINGLE: dict[str, dict[str, Any]] = {
    "resized_crop": {"resized_crop": 0.3},
    "crop_padding": {"crop_padding": 3},
    "flip": {"flip": True},
    "vertical_flip": {"vertical_flip": True},
    "rotation": {"rotation": 30.0},
    "translate": {"translate": 0.3},
    "zoom": {"zoom": 0.3},
    "shear": {"shear": 20.0},
    "perspective": {"perspective": 0.4},
    "policy": {"policy": "randaugment"},
    "brightness": {"jitter": (0.4,)},
    "contrast": {"jitter": (0.0, 0.4)},
    "saturation": {"jitter": (0.0, 0.0, 0.9)},
    "hue": {"jitter": (0.0, 0.0, 0.0, 0.4)},
    "grayscale": {"grayscale": 0.5},
    "blur": {"blur": 0.7},
    "noise": {"noise": 0.1},
    "erasing": {"erasing": 0.7},
}
EVERYTHING: dict[str, Any] = {
    **{key: value for changes in SINGLE.values() for key, value in changes.items()},
    "jitter": (0.4, 0.4, 0.4, 0.2),
}
COLOURS = ("saturation", "hue", "grayscale")


def images_of(count: int = 16, height: int = 20, width: int = 16, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(count * height + channels)
    return torch.randint(0, 256, (count, height, width, channels), generator=generator, dtype=torch.uint8)


def smooth_images(count: int = 6, height: int = 48, width: int = 48) -> Tensor:
    """Slow waves, whose resampling hardly depends on details of the interpolation."""
    y, x = torch.meshgrid(torch.arange(height) / height, torch.arange(width) / width, indexing="ij")
    waves = [torch.sin(3 * x * (c + 1) + i) + torch.cos(4 * y + c * i) for i in range(count) for c in range(3)]
    return (torch.stack(waves).view(count, 3, height, width).permute(0, 2, 3, 1) * 63 + 127).to(torch.uint8)


def keys_of(count: int = 16, seed: int = 0) -> Tensor:
    return sample_keys(seed, 1, torch.arange(count), torch.zeros(count, dtype=torch.int64))


def unscaled(channels: int = 3, dtype: torch.dtype = torch.float64, **changes: Any) -> Transform:
    """A transform that normalises to [0, 1] only."""
    return Transform(AugmentConfig(**changes), (0.0,) * channels, (1.0,) * channels, dtype)


def augmented(transform: Transform, images: Tensor, keys: Tensor) -> Tensor:
    """What a network trains on without mixing: normalised floats (B, C, H, W)."""
    return transform.train_batch(transform.rearrange(images, keys), torch.zeros_like(keys), keys, (0, 0, 0))[0]


def planes(images: Tensor) -> Tensor:
    return images.permute(0, 3, 1, 2).double() / 255
