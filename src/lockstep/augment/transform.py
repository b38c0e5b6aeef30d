"""Training and evaluation transforms: whole microbatches of uint8 images in, normalised floats out.

Every transform works on the batch at once, on whatever device holds it, and takes its random numbers from the
samples' keys by a stream of its own (see randomness.py): the same sample gets the same change in every launch, worker
and restart, and switching one transform on leaves the draws of the others alone.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lockstep.augment import colour, geometry
from lockstep.augment.mix import mix, mixes
from lockstep.augment.policy import apply_policy
from lockstep.errors import UserError
from lockstep.randomness import real_type
from lockstep.settings.config import AugmentConfig, Config


class Record(NamedTuple):
    """One transform: when it happens, what it does, and the settings (0, empty or "none": off) that ask for it.

    - pixels: uint8 (B, H, W, C), keys (B,) and config to such images
    - warp: keys, config and width / height to matrices (B, 3, 3); all are joined and resampled once
    - colour: floats (B, C, H, W) in [0, 255], keys and config to such images
    - normalised: normalised floats (B, C, H, W), keys and config to such images
    """

    stage: Literal["pixels", "warp", "colour", "normalised"]
    apply: Callable[..., Tensor]
    settings: tuple[str, ...]
    needs_colour: bool = False


# In the order in which they are applied, within each stage.
TRANSFORMS = {
    "padded_crop": Record("pixels", geometry.padded_crop, ("crop_padding",)),
    "flip": Record("pixels", geometry.flip, ("flip",)),
    "vertical_flip": Record("pixels", geometry.vertical_flip, ("vertical_flip",)),
    "affine": Record("warp", geometry.affine, ("rotation", "translate", "zoom", "shear")),
    "perspective": Record("warp", geometry.perspective, ("perspective",)),
    "resized_crop": Record("warp", geometry.resized_crop, ("resized_crop",)),
    "policy": Record("colour", apply_policy, ("policy",)),
    "jitter": Record("colour", colour.jitter, ("jitter",)),
    "grayscale": Record("colour", colour.grayscale, ("grayscale",), needs_colour=True),
    "blur": Record("colour", colour.blur, ("blur",)),
    "noise": Record("colour", colour.noise, ("noise",)),
    "erase": Record("normalised", geometry.erase, ("erasing",)),
}


_OFF = (0, (), "none")


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
    steps_per_epoch: int = 1
    """Of training"""

    def evaluate(self, images: Tensor) -> Tensor:
        """Normalise only: (x / 255 - mean) / std."""
        batch, height, width, channels = images.shape
        scale, bias = _scale_and_bias(self.mean, self.std, width, self.dtype, images.device)
        # Rows of W * C numbers: with three at a time it takes four times as long on a CPU.
        rows = images.reshape(batch, height, width * channels).to(self.dtype)
        own = None if images.is_floating_point() else rows  # whose memory is at hand; not the caller's
        return torch.addcmul(bias, rows, scale, out=own).view(images.shape).permute(0, 3, 1, 2)

    def train_batch(
        self, images: Tensor, labels: Tensor, keys: Tensor, seed: tuple[int, int, int]
    ) -> tuple[Tensor, Tensor]:
        """What a network trains on: images (B, C, H, W), and targets (B,), or soft ones (B, classes) with mixing.

        `images` are those that `rearrange` gives. `seed` is (seed, step, microbatch); what depends on the
        epoch follows from the step.
        """
        epoch = seed[1] // self.steps_per_epoch
        pixels = self._sized(self._rendered(images, keys), epoch)
        off_epoch = self.config.mix_off_epoch
        if not mixes(self.config) or (off_epoch is not None and epoch >= off_epoch):
            return pixels, labels
        return mix(pixels, labels, self.config, self.num_classes, seed)

    def logits(self, model: nn.Module, images: Tensor) -> Tensor:
        """What `model` makes of uint8 images in evaluation, (B, classes).

        With augment.tta=flip: logarithms of the mean of its probabilities for the images and for their mirror images.
        """
        pixels = self.evaluate(images)
        return model(pixels) if self.config.tta == "none" else mean_with_mirrored(model, pixels)

    def _sized(self, pixels: Tensor, epoch: int) -> Tensor:
        """The batch in the size of this epoch of progressive resizing."""
        height, width = pixels.shape[2:]
        size = progressive_width(self.config, epoch, width)
        if size == width:
            return pixels
        target = (round(height * size / width), size)
        smaller = F.interpolate(pixels, target, mode="bilinear", antialias=True)
        return smaller.contiguous(memory_format=torch.channels_last)

    def rearrange(self, images: Tensor, keys: Tensor) -> Tensor:
        """The first part of augmentation, which leaves uint8 images (B, H, W, C) what they are: windows and mirrors.

        With the randomness of `keys`, int64 (B,). Apart from the rest because several microbatches at once take less.
        """
        for transform in self._wanted("pixels"):
            images = transform.apply(images, keys, self.config)
        return images

    def _rendered(self, images: Tensor, keys: Tensor) -> Tensor:
        """The rest of augmentation, and normalisation."""
        warps, colours = self._wanted("warp"), self._wanted("colour")
        if warps or colours:
            pixels = images.permute(0, 3, 1, 2).to(self.dtype)
            if warps:
                pixels = geometry.warp(pixels, self._homographies(keys, pixels.shape[3] / pixels.shape[2]))
            for transform in colours:
                pixels = transform.apply(pixels, keys, self.config)
            images = pixels.permute(0, 2, 3, 1)
        images = self.evaluate(images)
        for transform in self._wanted("normalised"):
            images = transform.apply(images, keys, self.config)
        return images

    def _wanted(self, stage: str) -> list[Record]:
        return [
            record
            for name, record in TRANSFORMS.items()
            if record.stage == stage and any(getattr(self.config, setting) not in _OFF for setting in record.settings)
            if not (name == "resized_crop" and self.precropped)
        ]

    def _homographies(self, keys: Tensor, aspect: float) -> Tensor:
        """Matrices (B, 3, 3) that map output to input coordinates in [-1, 1]: the last warp comes first."""
        matrices = torch.eye(3, dtype=real_type(keys.device), device=keys.device)
        for warp in self._wanted("warp"):
            matrices = warp.apply(keys, self.config, aspect) @ matrices
        return matrices


def mean_with_mirrored(model: nn.Module, pixels: Tensor) -> Tensor:
    """Logarithms of the mean of a network's probabilities for images (B, C, H, W) and their mirror images."""
    plain, mirrored = (
        logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(1)
        for logits in (model(pixels), model(pixels.flip(3)))
    )
    return torch.logaddexp(plain, mirrored) - math.log(2)


def progressive_width(config: AugmentConfig, epoch: int, width: int) -> int:
    """The width of training images in an epoch, counted from 0: linear from `progressive_size` to the full one.

    In steps of `progressive_step` pixels; full from epoch `progressive_epochs` on.
    """
    start, epochs = config.progressive_size, config.progressive_epochs
    if start is None or epochs is None or epoch >= epochs:
        return width
    return start + (width - start) * epoch // epochs // config.progressive_step * config.progressive_step


@cache  # a step does not wait for a GPU to have them
def _scale_and_bias(
    mean: tuple[float, ...], std: tuple[float, ...], width: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """What a row of pixels in [0, 255] is multiplied by, and what is then added, (W * C,) each."""
    means, stds = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
    scale, bias = 1 / (255 * stds), -means / stds
    return scale.to(device, dtype).repeat(width), bias.to(device, dtype).repeat(width)


def build_transform(
    config: Config,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    num_classes: int,
    *,
    precropped: bool,
    steps_per_epoch: int = 1,
) -> Transform:
    """The transform for images with these statistics; raises UserError where a setting could have no effect."""
    augment = config.augment
    if len(mean) == 1:
        useless = ["jitter (saturation, hue)"] if any(augment.jitter[2:]) else []
        useless += [
            setting
            for record in TRANSFORMS.values()
            for setting in record.settings
            if record.needs_colour and getattr(augment, setting)
        ]
        if useless:
            raise UserError(f"--augment.{' and '.join(useless)} cannot change grey images: leave it out")
    augment = replace(augment, mean=mean, std=std)  # some draw what is uncovered in the mean colour
    return Transform(augment, mean, std, getattr(torch, config.runtime.dtype), precropped, num_classes, steps_per_epoch)
