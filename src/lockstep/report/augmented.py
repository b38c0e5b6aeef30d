"""What augmentation makes of a few training images: the very pixels that the network is given, epoch after epoch."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lockstep.augment.transform import build_transform
from lockstep.data.images import SKIPPED_LABEL, Data
from lockstep.data.loader import crops_while_decoding, read_samples
from lockstep.randomness import sample_keys
from lockstep.settings.config import Config

_SAMPLES = 6
EPOCHS = 7


def augmented_samples(config: Config, data: Data) -> dict[int, np.ndarray]:
    """The first images, uint8 (1 + EPOCHS, H, W, C) by sample: as evaluation sees them, then as the epochs do.

    Mixing, where it is on, happens among them. Empty where augmentation changes nothing, or no image can be read.
    """
    chosen = [index for index in range(min(_SAMPLES, len(data.train))) if data.train.load(index) is not None]
    if not chosen:
        return {}
    plain = torch.stack([image for index in chosen if (image := data.train.load(index)) is not None])
    versions = [plain, *(_as_in(epoch, chosen, config, data) for epoch in range(EPOCHS))]
    if all(torch.equal(plain, version) for version in versions):
        return {}
    return {index: np.stack([version[place].numpy() for version in versions]) for place, index in enumerate(chosen)}


def _as_in(epoch: int, chosen: list[int], config: Config, data: Data) -> Tensor:
    """uint8 (B, H, W, C)."""
    precropped = crops_while_decoding(data.train, config.augment)
    transform = build_transform(config, data.mean, data.std, data.num_classes, precropped=precropped)
    keys = sample_keys(config.run.seed, epoch, data.train.rows[chosen], torch.zeros(len(chosen), dtype=torch.int64))
    min_area = config.augment.resized_crop if precropped else 0.0
    images, labels = map(torch.stack, zip(*read_samples(data.train, chosen, keys, min_area), strict=True))
    assert not (labels == SKIPPED_LABEL).any(), "only images that can be read were chosen"
    pixels, _ = transform.train_batch(transform.rearrange(images, keys), labels, keys, (config.run.seed, epoch, 0))
    pixels = functional.interpolate(pixels, images.shape[1:3])  # those of smaller epochs, in blocks
    mean, std = (torch.tensor(values, dtype=pixels.dtype).view(-1, 1, 1) for values in (data.mean, data.std))
    return ((pixels * std + mean) * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
