"""Augmentation policies: which operations each image of a batch gets, and how strong.

The names, operations and ranges are those of torchvision's transforms and of timm's `auto_augment`, so that their
recipes can be written down here; a test compares both. Every image draws from its own key.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lockstep.augment.operations import OPERATIONS, operate
from lockstep.randomness import draw, normals
from lockstep.settings.config import AugmentConfig


class Range(NamedTuple):
    """An operation, and its strength at the lowest and the highest level."""

    operation: str
    low: float = 0.0
    high: float = 0.0
    signed: bool = False
    """Either way with probability 1/2"""
    change: Literal["exact", "cut", "rounded"] = "exact"
    """Whether the distance from `low` is brought to whole numbers"""
    of_side: bool = False
    """Strengths are shares of the width, or of the height"""


Space = tuple[Range, ...]


def _torchvision_space(shear: float, shift: float, turn: float, factor: float, bits: tuple[int, int]) -> Space:
    """A shift of up to 1 is a share of the image's side, one above a number of pixels."""
    return (
        *(Range(name, 0, shear, signed=True) for name in ("shear_x", "shear_y")),
        *(Range(f"translate_{axis}", 0, shift, True, "cut", of_side=shift <= 1) for axis in "xy"),
        Range("rotate", 0, turn, signed=True),
        *(Range(name, 0, factor, signed=True) for name in ("brightness", "color", "contrast", "sharpness")),
        Range("posterize", *bits, change="rounded"),
        Range("solarize", 255, 0),
        Range("autocontrast"),
        Range("equalize"),
    )


def _timm_space(*, increasing: bool) -> Space:
    factors = (0.0, 0.9, True) if increasing else (-0.9, 0.9, False)
    return (
        Range("autocontrast"),
        Range("equalize"),
        Range("invert"),
        Range("rotate", 0, 30, signed=True),
        Range("posterize", *((4, 0) if increasing else (0, 4)), change="cut"),
        Range("solarize", *((256, 0) if increasing else (0, 256)), change="cut"),
        Range("solarize_add", 0, 110, change="cut"),
        *(Range(name, *factors) for name in ("color", "contrast", "brightness", "sharpness")),
        *(Range(name, 0, 0.3, signed=True) for name in ("shear_x", "shear_y")),
        *(Range(f"translate_{axis}", 0, 0.45, signed=True, of_side=True) for axis in "xy"),
    )


_SEARCHED = _torchvision_space(0.3, 150 / 331, 30, 0.9, (8, 4))
SPACES: dict[str, Space] = {
    "torchvision": (Range("identity"), *_SEARCHED),
    "timm": _timm_space(increasing=False),
    "timm_inc": _timm_space(increasing=True),
    "autoaugment": (*_SEARCHED, Range("invert")),
    "trivialaugment": (Range("identity"), *_torchvision_space(0.99, 32, 135, 0.99, (8, 2))),
    "augmix": _torchvision_space(0.3, 1 / 3, 30, 0.9, (4, 0)),
}
TOP_LEVEL = {"torchvision": 30, "timm": 10, "timm_inc": 10}
"""The magnitude of the strongest operations"""
_AUGMIX_CHAINS, _AUGMIX_DEPTH = 3, 3


def apply_policy(pixels: Tensor, keys: Tensor, config: AugmentConfig) -> Tensor:
    """Floats (B, C, H, W) in [0, 255] to such, by `augment.policy`; pixels become whole numbers first."""
    images = pixels.round().clamp(0, 255).to(torch.uint8)
    return POLICIES[config.policy].apply(images, keys, config).to(pixels.dtype)


def _randaugment(images: Tensor, keys: Tensor, config: AugmentConfig) -> Tensor:
    """`policy_ops` operations, each any of the space, all of one magnitude, to which a normal number may be added.

    Cubuk et al. 2020, https://arxiv.org/abs/1909.13719. As in timm, each of its operations is left out half the time.
    """
    is_timm = config.policy_space != "torchvision"
    fill = tuple(float(round(255 * mean)) for mean in config.mean or (0.5,)) if is_timm else (0.0,)
    space, top = SPACES[config.policy_space], TOP_LEVEL[config.policy_space]
    magnitude = 9 if config.policy_magnitude is None else config.policy_magnitude
    draws = draw(keys, "policy", 5 * config.policy_ops).view(len(keys), config.policy_ops, 5)
    for layer in range(config.policy_ops):
        picks, chances, signs, *pair = draws[:, layer].unbind(1)
        levels = (magnitude + config.policy_magnitude_std * normals(*pair)).clamp(0, top) / top
        choices, strengths = _strengths(space, images, (picks * len(space)).long(), levels, signs)
        if is_timm:
            choices = choices.where(chances < 0.5, OPERATIONS.index("identity"))
        images = operate(images, choices, strengths, fill)
    return images


def _autoaugment(images: Tensor, keys: Tensor, config: AugmentConfig, found_on: str) -> Tensor:
    """One of 25 pairs of operations, each with its own probability and magnitude, found by search on a data set.

    Cubuk et al. 2019, https://arxiv.org/abs/1805.09501.
    """
    draws = draw(keys, "policy", 5)
    ranges, chances, levels = _found_pairs(found_on, images.device, draws.dtype)
    pairs = (draws[:, 0] * len(ranges)).long()
    for place in (0, 1):
        picks = ranges[pairs, place]
        choices, strengths = _strengths(SPACES["autoaugment"], images, picks, levels[pairs, place], draws[:, 3 + place])
        happens = draws[:, 1 + place] < chances[pairs, place]
        images = operate(images, choices.where(happens, OPERATIONS.index("identity")), strengths)
    return images


@cache
def _found_pairs(found_on: str, device: torch.device, real: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Ranges of the space, probabilities and levels of torchvision's table, (pairs, 2) each."""
    from torchvision.transforms import AutoAugment, AutoAugmentPolicy  # here, because it takes seconds to import

    pairs = AutoAugment(AutoAugmentPolicy(found_on)).policies
    names = ["".join(entry.operation.split("_")) for entry in SPACES["autoaugment"]]
    ranges = [[names.index(name.lower()) for name, _, _ in pair] for pair in pairs]
    chances = [[chance for _, chance, _ in pair] for pair in pairs]
    levels = [[(magnitude or 0) / 9 for _, _, magnitude in pair] for pair in pairs]
    return (
        torch.tensor(ranges).to(device),
        torch.tensor(chances, dtype=real).to(device),
        torch.tensor(levels, dtype=real).to(device),
    )


def _trivialaugment(images: Tensor, keys: Tensor, config: AugmentConfig) -> Tensor:
    """One operation of a wide space, of any of 31 levels: Mueller and Hutter 2021, https://arxiv.org/abs/2103.10158."""
    space = SPACES["trivialaugment"]
    picks, levels, signs = draw(keys, "policy", 3).unbind(1)
    return operate(images, *_strengths(space, images, (picks * len(space)).long(), (levels * 31).floor() / 30, signs))


def _augmix(images: Tensor, keys: Tensor, config: AugmentConfig) -> Tensor:
    """The image and three chains of one to three operations, blended by random weights.

    Hendrycks et al. 2020, https://arxiv.org/abs/1912.02781, with its usual alpha of 1: all weights are equally likely.
    """
    space, severity = SPACES["augmix"], int(config.policy_magnitude or 3)
    draws = draw(keys, "policy", 1 + _AUGMIX_CHAINS * (2 + 3 * _AUGMIX_DEPTH))
    kept, draws = draws[:, 0], draws[:, 1:].view(len(keys), _AUGMIX_CHAINS, -1)
    shares = -torch.log1p(-draws[:, :, 0])
    weights = (1 - kept)[:, None] * shares / shares.sum(1, keepdim=True)
    mixed = kept.float().view(-1, 1, 1, 1) * images
    for chain in range(_AUGMIX_CHAINS):
        picture, depths = images, (draws[:, chain, 1] * _AUGMIX_DEPTH).long()
        for depth in range(_AUGMIX_DEPTH):
            picks, levels, signs = draws[:, chain, 2 + 3 * depth : 5 + 3 * depth].unbind(1)
            levels = (levels * severity).floor() / 9
            choices, strengths = _strengths(space, images, (picks * len(space)).long(), levels, signs)
            picture = operate(picture, choices.where(depth <= depths, OPERATIONS.index("identity")), strengths)
        mixed += weights[:, chain].float().view(-1, 1, 1, 1) * picture
    return mixed.clamp(0, 255).to(torch.uint8)


def _three_augment(images: Tensor, keys: Tensor, config: AugmentConfig) -> Tensor:
    """Grey, or inverted from 128 on, or blurred with sigma 0.1 to 2, of DeiT III: Touvron et al. 2022.

    https://arxiv.org/abs/2204.07118; its mild colour jitter is augment.jitter=[0.3, 0.3, 0.3].
    """
    picks, sigmas = draw(keys, "policy", 2).unbind(1)
    grey, inverted, blurred = (OPERATIONS.index(name) for name in ("color", "solarize", "gaussian_blur"))
    choices = torch.where(picks < 1 / 3, grey, torch.where(picks < 2 / 3, inverted, blurred))
    strengths = torch.where(picks < 1 / 3, -1.0, torch.where(picks < 2 / 3, 128.0, 0.1 + 1.9 * sigmas))
    return operate(images, choices, strengths)


def _strengths(space: Space, images: Tensor, ranges: Tensor, levels: Tensor, signs: Tensor) -> tuple[Tensor, Tensor]:
    """Operations and their strengths, (B,) each, from indices of the space, levels in [0, 1] and draws of a sign."""
    columns = _columns(space, images.shape[2], images.shape[3], images.device, levels.dtype)[ranges]
    operations, low, spread, signed, cut, rounded = columns.unbind(1)
    change = spread * levels
    change = change.where(cut == 0, (change + change.sign() * 1e-5).trunc()).where(rounded == 0, change.round())
    return operations.long(), low + change * torch.where(signs < 0.5, 1 - 2 * signed, 1)


@cache  # a step does not wait for a GPU to have them
def _columns(space: Space, height: int, width: int, device: torch.device, real: torch.dtype) -> Tensor:
    """For each range: its operation, strength at level 0, distance to that at 1, and whether signed, cut, rounded."""
    sides = {"translate_x": width, "translate_y": height}
    rows = [
        (
            OPERATIONS.index(entry.operation),
            entry.low,
            (entry.high - entry.low) * (sides[entry.operation] if entry.of_side else 1),
            entry.signed,
            entry.change == "cut",
            entry.change == "rounded",
        )
        for entry in space
    ]
    return torch.tensor(rows, dtype=real).to(device)


def _unchanged(images: Tensor, keys: Tensor, config: AugmentConfig) -> Tensor:
    return images


class Record(NamedTuple):
    """Pictures uint8 (B, C, H, W), keys and config to pictures; and the settings of its own."""

    apply: Callable[[Tensor, Tensor, AugmentConfig], Tensor]
    settings: frozenset[str] = frozenset()


POLICIES = {
    "none": Record(_unchanged),
    "randaugment": Record(
        _randaugment, frozenset({"policy_ops", "policy_magnitude", "policy_magnitude_std", "policy_space"})
    ),
    "autoaugment": Record(partial(_autoaugment, found_on="imagenet")),
    "autoaugment_cifar10": Record(partial(_autoaugment, found_on="cifar10")),
    "autoaugment_svhn": Record(partial(_autoaugment, found_on="svhn")),
    "trivialaugment": Record(_trivialaugment),
    "augmix": Record(_augmix, frozenset({"policy_magnitude"})),
    "three_augment": Record(_three_augment),
}
