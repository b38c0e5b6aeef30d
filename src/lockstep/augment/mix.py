"""Mixup and cutmix: images of a microbatch into one another, and their labels with them."""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lockstep.launch.transfer import to_device
from lockstep.randomness import mix_seed
from lockstep.settings.config import AugmentConfig


def mixes(config: AugmentConfig) -> bool:
    """Whether these settings call for `mix`."""
    return bool(config.mixup or config.cutmix)


def mix(
    images: Tensor, labels: Tensor, config: AugmentConfig, num_classes: int, seed: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    """Mixup or cutmix within a microbatch: images (B, C, H, W) and soft targets (B, num_classes).

    All draws are from `seed`, that is (seed, step, microbatch). As timm's Mixup: the first image goes with the last,
    and so on; `augment.mix_mode` says who shares weight and box. A sample whose image was skipped (label -100) has no
    target and mixes with weight 0. Mixup: Zhang et al. 2018; cutmix: Yun et al. 2019.
    """
    batch, _, height, width = images.shape
    count = {"batch": 1, "pair": (batch + 1) // 2, "elem": batch}[config.mix_mode]
    draws = _draw(np.random.default_rng(mix_seed(*seed, 1)), config, count, (height, width))
    boxes = _boxes(draws, height, width)
    areas = (boxes[1] - boxes[0]) * (boxes[3] - boxes[2]) / (height * width)
    partners, dtype = images.flip(0), torch.promote_types(images.dtype, torch.float32)

    def share(weights: np.ndarray) -> Tensor:
        """What each image (B,) takes of its partner."""
        return to_device(torch.from_numpy(_of_each(1 - weights, batch)).to(dtype), images.device)

    if not draws.pastes.all():
        images = images.lerp(
            partners, share(np.where(draws.pastes, 1, draws.weights)).to(images.dtype)[:, None, None, None]
        )
    if draws.pastes.any():
        edges = to_device(torch.from_numpy(_of_each(boxes, batch)), images.device)
        images = torch.where(_within(edges, height, width), partners, images)
    targets = F.one_hot(labels.clamp(min=0), num_classes).to(dtype) * (labels >= 0).unsqueeze(1)
    shares = share(np.where(draws.pastes, 1 - areas, draws.weights))
    return images, targets.lerp(targets.flip(0), shares[:, None])


class _Draws(NamedTuple):
    """How an image mixes, (count,) each: what it keeps of itself, and whether it pastes, a box about which centre."""

    weights: np.ndarray
    pastes: np.ndarray
    rows: np.ndarray
    columns: np.ndarray


def _draw(random: np.random.Generator, config: AugmentConfig, count: int, size: tuple[int, int]) -> _Draws:
    """Images that are not to mix have weight 1 and do not paste."""
    mixes = random.random(count) < config.mix_prob
    pastes = random.random(count) < (config.mix_switch_prob if config.mixup else 1)
    pastes &= mixes & bool(config.cutmix)
    weights = random.beta(config.mixup or 1, config.mixup or 1, count)
    weights = np.where(pastes, random.beta(config.cutmix or 1, config.cutmix or 1, count), weights)
    rows, columns = (random.random((2, count)) * np.array(size)[:, None]).astype(np.int64)
    return _Draws(np.where(mixes, weights, 1), pastes, rows, columns)


def _boxes(draws: _Draws, height: int, width: int) -> np.ndarray:
    """First and last rows, first and last columns, (4, count): as much of the image as its weight is below 1.

    What lies outside the image is cut off, and boxes of images that do not paste are empty.
    """
    edges = []
    for centres, side in ((draws.rows, height), (draws.columns, width)):
        length = (side * np.sqrt(1 - np.where(draws.pastes, draws.weights, 1))).astype(np.int64)
        edges += [np.clip(centres - length // 2, 0, side), np.clip(centres + (length + 1) // 2, 0, side)]
    return np.stack(edges)


def _of_each(values: np.ndarray, batch: int) -> np.ndarray:
    """Values (..., 1), of the first half, or of all, for each image of the batch; the second half mirrors the first."""
    count = values.shape[-1]
    if count == batch:
        return values
    if count == 1:
        return np.repeat(values, batch, axis=-1)
    return np.concatenate([values, values[..., ::-1][..., 2 * count - batch :]], axis=-1)


def _within(edges: Tensor, height: int, width: int) -> Tensor:
    """Mask (B, 1, H, W) of the pixels in boxes (4, B)."""
    top, bottom, left, right = edges[:, :, None].unbind(0)
    rows, columns = (torch.arange(side, device=edges.device) for side in (height, width))
    in_rows, in_columns = (rows >= top) & (rows < bottom), (columns >= left) & (columns < right)
    return (in_rows[:, :, None] & in_columns[:, None, :])[:, None]
