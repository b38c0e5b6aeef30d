"""`synthetic:HxWxCxN`: made-up images that a network can learn, of any size and number."""

import re
from dataclasses import dataclass

import numpy as np
from PIL import Image

from lockstep.data.sources.source import RowName, Source, Split, digest_of
from lockstep.errors import UserError
from lockstep.settings.config import DataConfig


@dataclass(frozen=True)
class _Patterns:
    """Plane waves, one direction and frequency per class, under noise; image `row` is a function of its number."""

    height: int
    width: int
    channels: int
    stream: int

    def __call__(self, row: int) -> Image.Image:
        label = row % _SYNTHETIC_CLASSES
        y, x = np.mgrid[: self.height, : self.width]
        angle = np.pi * label / _SYNTHETIC_CLASSES
        periods = 1 + label % 3
        wave = np.sin(2 * np.pi * periods * (np.cos(angle) * x / self.width + np.sin(angle) * y / self.height))
        noise = np.random.Generator(np.random.Philox(key=row + (self.stream << 64)))
        pixels = noise.normal(128, 32, (self.height, self.width, self.channels)) + 64 * wave[..., None]
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8).squeeze())


_SYNTHETIC_CLASSES = 10


def open_synthetic(name: str, config: DataConfig) -> Source:
    """Open HxWxCxN made-up images; raises UserError if `name` is nothing like it."""
    numbers = re.fullmatch(r"(\d+)x(\d+)x(\d+)x(\d+)", name)
    height, width, channels, count = map(int, numbers.groups()) if numbers else (0, 0, 0, 0)
    if min(height, width) < 2 or channels not in (1, 3) or count < 2 * _SYNTHETIC_CLASSES:
        raise UserError(
            f"--data.source={config.source!r} must read synthetic:HxWxCxN with 1 or 3 channels and "
            f"at least {2 * _SYNTHETIC_CLASSES} images, for example synthetic:32x32x3x1000"
        )
    splits = {}
    for stream, (split, size) in enumerate({"train": count, "test": max(count // 5, _SYNTHETIC_CLASSES)}.items()):
        labels = np.arange(size, dtype=np.int64) % _SYNTHETIC_CLASSES
        read = _Patterns(height, width, channels, stream)
        splits[split] = Split(split, labels, read, RowName(config.source, split))
    return Source(config.source, tuple(map(str, range(_SYNTHETIC_CLASSES))), splits, digest_of(name.encode(), b"1"))
