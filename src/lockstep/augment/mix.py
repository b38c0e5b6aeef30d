"""Mixup and cutmix: images of a microbatch into one another, and their labels with them."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lockstep.augment.geometry import inside
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
        mask = inside((x, y, side, side), *images.shape[2:])
        weight = 1 - mask.double().mean().item()
        images = torch.where(to_device(mask, images.device), partners, images)
    else:
        images = images.lerp(partners, 1 - weight)
    dtype = torch.promote_types(images.dtype, torch.float32)
    targets = F.one_hot(labels.clamp(min=0), num_classes).to(dtype) * (labels >= 0).unsqueeze(1)
    return images, targets.lerp(targets.roll(1, 0), 1 - weight)
