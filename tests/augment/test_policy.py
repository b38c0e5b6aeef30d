"""Policies against torchvision's and timm's: the same ranges, the same choices and chances, the same pictures."""

import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms as T
from pictures import images_of, keys_of
from timm.data import auto_augment as timm_policies
from torch import Tensor
from torchvision.transforms.autoaugment import _apply_op

from lockstep.augment import policy
from lockstep.augment.operations import OPERATIONS, operate
from lockstep.augment.policy import POLICIES, SPACES, _strengths
from lockstep.settings.config import AugmentConfig

HEIGHT, WIDTH = 40, 32
BLANK = torch.zeros(1, 3, HEIGHT, WIDTH, dtype=torch.uint8)
TIMM_NAMES = {
    "AutoContrast": "autocontrast",
    "SolarizeAdd": "solarize_add",
    "ShearX": "shear_x",
    "ShearY": "shear_y",
    "TranslateXRel": "translate_x",
    "TranslateYRel": "translate_y",
}


def pictures(count: int) -> Tensor:
    return images_of(count, HEIGHT, WIDTH).permute(0, 3, 1, 2).contiguous()


def strength_at(space: str, operation: str, level: float, sign: float = 0.9) -> float:
    place = [entry.operation for entry in SPACES[space]].index(operation)
    level_of, sign_of = (torch.tensor([value], dtype=torch.float64) for value in (level, sign))
    choices, strengths = _strengths(SPACES[space], BLANK, torch.tensor([place]), level_of, sign_of)
    assert OPERATIONS[choices[0]] == operation
    return float(strengths[0])


def own_name(name: str) -> str:
    return {"ShearX": "shear_x", "ShearY": "shear_y", "TranslateX": "translate_x", "TranslateY": "translate_y"}.get(
        name, name.lower()
    )


@pytest.mark.parametrize(
    ("space", "transform", "arguments"),
    [
        ("torchvision", T.RandAugment(), (31, (HEIGHT, WIDTH))),
        ("autoaugment", T.AutoAugment(), (10, (HEIGHT, WIDTH))),
        ("trivialaugment", T.TrivialAugmentWide(), (31,)),
        ("augmix", T.AugMix(), (10, (HEIGHT, WIDTH))),
    ],
)
def test_ranges_are_torchvisions(space: str, transform: Any, arguments: Any) -> None:
    theirs = transform._augmentation_space(*arguments)
    assert sorted(map(own_name, theirs)) == sorted(entry.operation for entry in SPACES[space])
    for name, (magnitudes, signed) in theirs.items():
        if magnitudes.ndim == 0:
            continue
        for place, magnitude in enumerate(magnitudes.tolist()):
            wanted = int(magnitude + 1e-5) if "Translate" in name else magnitude
            got = [strength_at(space, own_name(name), place / (len(magnitudes) - 1), sign) for sign in (0.9, 0.1)]
            assert got == pytest.approx([wanted, -wanted if signed else wanted], abs=1e-4), name


@pytest.mark.parametrize("space", ["timm", "timm_inc"])
def test_ranges_are_timms(space: str, monkeypatch: pytest.MonkeyPatch) -> None:
    increasing = space == "timm_inc"
    theirs = timm_policies._RAND_INCREASING_TRANSFORMS if increasing else timm_policies._RAND_TRANSFORMS
    plain = {name: name.removesuffix("Increasing") for name in theirs}
    names = {name: TIMM_NAMES.get(short, short.lower()) for name, short in plain.items()}
    assert sorted(names.values()) == sorted(entry.operation for entry in SPACES[space])
    for name, own in names.items():
        level_of: Any = timm_policies.LEVEL_TO_ARG[name]
        for magnitude in (0, 0.7, 4, 6.5, 9, 10) if level_of else ():
            for sign, drawn in ((0.9, 0.0), (0.1, 1.0)):
                monkeypatch.setattr(random, "random", lambda drawn=drawn: drawn)
                (wanted,) = level_of(magnitude, {})
                if own in ("color", "contrast", "brightness", "sharpness"):
                    wanted -= 1
                if "translate" in own:  # they say what is seen at the left edge
                    wanted *= WIDTH if own == "translate_x" else HEIGHT
                assert strength_at(space, own, magnitude / 10, sign) == pytest.approx(wanted, abs=1e-4), (
                    name,
                    magnitude,
                )


class Recorded:
    """`operate`, with the names and strengths of every call kept, image by image."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[list[str]] = []
        self.strengths: list[list[float]] = []
        self.fills: list[tuple[float, ...]] = []
        monkeypatch.setattr(policy, "operate", self)

    def __call__(self, images: Tensor, choices: Tensor, strengths: Tensor, fill: tuple[float, ...] = (0.0,)) -> Tensor:
        self.names.append([OPERATIONS[choice] for choice in choices])
        self.strengths.append(strengths.tolist())
        self.fills.append(fill)
        return operate(images, choices, strengths, fill)


def apply(images: Tensor, **changes: Any) -> Tensor:
    config = AugmentConfig(**changes)
    return POLICIES[config.policy].apply(images, keys_of(len(images)), config)


THEIR_NAMES = {own_name(name): name for name in T.AutoAugment()._augmentation_space(10, (8, 8))} | {
    "identity": "Identity"
}


@pytest.mark.parametrize(
    "changes",
    [
        {"policy": "randaugment"},
        {"policy": "randaugment", "policy_magnitude": 15, "policy_ops": 3},
        {"policy": "trivialaugment"},
        {"policy": "autoaugment"},
        {"policy": "autoaugment_cifar10"},
        {"policy": "autoaugment_svhn"},
    ],
    ids=str,
)
def test_pictures_are_those_of_torchvisions_operations(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    images, recorded = pictures(40), Recorded(monkeypatch)
    got = apply(images, **changes)
    wanted = list(images)
    for names, strengths in zip(recorded.names, recorded.strengths, strict=True):
        for i, (name, strength) in enumerate(zip(names, strengths, strict=True)):
            wanted[i] = _apply_op(wanted[i], THEIR_NAMES[name], strength, T.InterpolationMode.BILINEAR, None)
    # Rounding half a unit the other way is all that may differ, until a later operation makes more of it.
    distances = (got.int() - torch.stack(wanted).int()).abs().amax((1, 2, 3))
    assert (distances <= 1).sum() >= 32, distances
    assert len(recorded.names) == {"randaugment": changes.get("policy_ops", 2), "trivialaugment": 1}.get(
        changes["policy"], 2
    )
    changed = (got != images).flatten(1).any(1).sum()
    assert changed >= 20


def test_every_operation_is_as_likely_as_another(monkeypatch: pytest.MonkeyPatch) -> None:
    images = pictures(1)[:, :, :4, :4].expand(4000, 3, 4, 4)
    recorded = Recorded(monkeypatch)
    apply(images, policy="randaugment", policy_ops=1)
    counts = Counter(recorded.names[0])
    assert len(counts) == 14 and min(counts.values()) > 215 and max(counts.values()) < 360  # 286 expected, deviation 16
    turns = [s for name, s in zip(recorded.names[0], recorded.strengths[0], strict=True) if name == "rotate"]
    assert {round(abs(turn), 4) for turn in turns} == {9.0} and 0.35 < np.mean(np.sign(turns) > 0) < 0.65


def test_timms_recipe_strings_are_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """rand-m7-mstd0.5-inc1: half of the operations, magnitudes about 7, and the mean colour where nothing is."""
    images = pictures(1)[:, :, :4, :4].expand(3000, 3, 4, 4)
    recorded = Recorded(monkeypatch)
    settings = {"policy_magnitude": 7, "policy_magnitude_std": 0.5, "policy_space": "timm_inc"}
    apply(images, policy="randaugment", mean=(0.485, 0.456, 0.406), std=(0.2, 0.2, 0.2), **settings)
    names, strengths = sum(recorded.names, []), sum(recorded.strengths, [])
    assert set(recorded.fills) == {(124.0, 116.0, 104.0)} and len(recorded.names) == 2
    assert 0.47 < names.count("identity") / len(names) < 0.53
    counts = Counter(names)
    assert len(counts) == 16 and min(counts.values()) > 150  # 200 expected of each, deviation 14
    levels = [abs(s) / 3 for name, s in zip(names, strengths, strict=True) if name == "rotate"]
    assert abs(np.mean(levels) - 7) < 0.15 and abs(np.std(levels) - 0.5) < 0.1


def test_autoaugment_plays_the_pairs_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    images = pictures(1)[:, :, :4, :4].expand(5000, 3, 4, 4)
    recorded = Recorded(monkeypatch)
    apply(images, policy="autoaugment")
    table = T.AutoAugment().policies
    played = Counter(zip(*recorded.names, strict=True))
    expected = Counter[tuple[str, str]]()
    for pair in table:
        (first, chance, _), (second, other, _) = pair
        for one, p in ((own_name(first), chance), ("identity", 1 - chance)):
            for two, q in ((own_name(second), other), ("identity", 1 - other)):
                expected[one, two] += 5000 / 25 * p * q  # type: ignore[assignment]
    assert set(played) <= {pair for pair, count in expected.items() if count > 0}
    for pair, count in expected.items():
        assert abs(played[pair] - count) < 6 * max(count, 1) ** 0.5, pair


def test_augmix_blends_the_image_and_three_chains(monkeypatch: pytest.MonkeyPatch) -> None:
    images, recorded = pictures(64), Recorded(monkeypatch)
    got = apply(images, policy="augmix", policy_magnitude=5)
    depths = [sum(names[i] != "identity" for names in recorded.names) for i in range(64)]
    assert len(recorded.names) == 9 and min(depths) >= 3 and max(depths) <= 9 and 5 < np.mean(depths) < 7
    turns = [
        abs(s) / 30 * 9
        for names, strengths in zip(recorded.names, recorded.strengths, strict=True)
        for name, s in zip(names, strengths, strict=True)
        if name == "rotate"
    ]
    assert {round(turn, 6) for turn in turns} == {0.0, 1.0, 2.0, 3.0, 4.0}
    assert (got != images).flatten(1).any(1).all()
    # Of one colour there is nothing to warp: a mean of changed colours, never outside their range.
    monkeypatch.setattr(policy, "operate", lambda images, *_: images)
    same = apply(images, policy="augmix")
    assert (same.int() - images.int()).abs().max() <= 1, "the weights do not sum to 1"


def test_three_augment_greys_inverts_or_blurs(monkeypatch: pytest.MonkeyPatch) -> None:
    images, recorded = pictures(300), Recorded(monkeypatch)
    got = apply(images, policy="three_augment")
    counts = Counter(recorded.names[0])
    assert set(counts) == {"color", "solarize", "gaussian_blur"} and min(counts.values()) > 70
    for i, name in enumerate(recorded.names[0][:40]):
        if name == "color":
            wanted = T.functional.rgb_to_grayscale(images[i], 3)
            assert (got[i].int() - wanted.int()).abs().max() <= 1
        elif name == "solarize":
            assert torch.equal(got[i], T.functional.solarize(images[i], 128))
        else:
            assert 0.1 <= recorded.strengths[0][i] <= 2


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "none"])
@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_is_changed_by_its_own_key_alone(name: str, channels: int) -> None:
    images, keys, config = pictures(12)[:, :channels], keys_of(12), AugmentConfig(policy=name)
    original = images.clone()
    together = POLICIES[name].apply(images, keys, config)
    assert torch.equal(images, original), "the batch was written to"
    for i in range(12):
        assert torch.equal(POLICIES[name].apply(images[i : i + 1], keys[i : i + 1], config)[0], together[i])
    assert not torch.equal(POLICIES[name].apply(images, keys_of(12, seed=1), config), together)
