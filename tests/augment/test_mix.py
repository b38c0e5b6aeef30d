"""Mixup and cutmix: pixels and targets share alike."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import images_of, planes
from timm.data.mixup import Mixup
from torch import Tensor

from lockstep.augment.mix import _draw, mix, mixes
from lockstep.randomness import mix_seed
from lockstep.settings.config import AugmentConfig

few = settings(max_examples=30, deadline=None)


def mixed(kind: str, seed: tuple[int, int, int], labels: Tensor, alpha: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    images = planes(images_of(len(labels), 16, 16))
    setting: dict[str, Any] = {kind: alpha}
    return images, *mix(images, labels, AugmentConfig(**setting), 5, seed)


@few
@given(step=st.integers(0, 10**6), number=st.integers(0, 7), alpha=st.floats(0.1, 4))
@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_targets_share_what_the_pixels_share(kind: str, step: int, number: int, alpha: float) -> None:
    labels = torch.tensor([0, 1, 2, 3, 4, 1])
    images, output, targets = mixed(kind, (7, step, number), labels, alpha)
    torch.testing.assert_close(targets.sum(1), torch.ones(6, dtype=torch.float64))
    partners, own = images.flip(0), targets[0, 0].item()
    if kind == "mixup":
        torch.testing.assert_close(output, own * images + (1 - own) * partners, rtol=0, atol=1e-9)
    else:
        pasted = (output != images).any(1)
        assert torch.equal(output.movedim(1, -1)[pasted], partners.movedim(1, -1)[pasted])
        share = pasted.double().mean((1, 2))
        torch.testing.assert_close(share, torch.full((6,), 1 - own, dtype=torch.float64), rtol=0, atol=1e-9)
        assert (pasted == pasted[0]).all()
    one_hot = torch.eye(5, dtype=torch.float64)[labels]
    torch.testing.assert_close(targets, own * one_hot + (1 - own) * one_hot.flip(0))


def test_mixing_is_a_function_of_its_seed() -> None:
    labels = torch.arange(4)
    first = mixed("mixup", (0, 3, 1), labels)
    again = mixed("mixup", (0, 3, 1), labels)
    assert torch.equal(first[1], again[1]) and torch.equal(first[2], again[2])
    for seed in ((1, 3, 1), (0, 4, 1), (0, 3, 2)):
        assert not torch.equal(first[1], mixed("mixup", seed, labels)[1]), seed


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixing_weights_come_from_the_beta_distribution(kind: str) -> None:
    labels = torch.arange(2)
    own = [mixed(kind, (0, step, 0), labels, 2.0)[2][0, 0].item() for step in range(400)]
    if kind == "mixup":  # Beta(2, 2): mean 1/2, variance 1/20
        assert abs(np.mean(own) - 0.5) < 0.04 and abs(np.var(own) - 0.05) < 0.01
    else:  # a box that leaves the image is cut: more is kept
        assert 0.5 < np.mean(own) < 0.8 and np.std(own) > 0.1


def test_with_both_each_microbatch_draws_one() -> None:
    images, labels = planes(images_of(4)), torch.arange(4)
    config = AugmentConfig(mixup=1.0, cutmix=1.0)
    outputs = [mix(images, labels, config, 5, (0, step, 0))[0] for step in range(200)]
    pasted = [((output == images) | (output == images.flip(0))).all() for output in outputs]
    assert 60 < sum(pasted) < 140
    assert mixes(config) and not mixes(AugmentConfig()) and not mixes(AugmentConfig(mixup=0.0, cutmix=0.0))


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_skipped_samples_have_no_target(kind: str) -> None:
    _, _, targets = mixed(kind, (0, 0, 0), torch.tensor([2, -100, 3, -100]))
    own = targets[0, 2].item()  # its partner, the last one, was skipped
    assert 0 < own < 1 and targets[0].sum() == own
    torch.testing.assert_close(targets[1], torch.tensor([0, 0, 0, 1 - own, 0], dtype=torch.float64))
    torch.testing.assert_close(targets[2], torch.tensor([0, 0, 0, own, 0], dtype=torch.float64))
    torch.testing.assert_close(targets[3], torch.tensor([0, 0, 1 - own, 0, 0], dtype=torch.float64))


def test_mixing_keeps_the_dtype_of_the_images() -> None:
    images, labels = planes(images_of(4)), torch.arange(4)
    for dtype in (torch.float32, torch.float64):
        output, targets = mix(images.to(dtype), labels, AugmentConfig(mixup=1.0), 5, (0, 0, 0))
        assert output.dtype == targets.dtype == dtype


class Replayed:
    """Instead of numpy's generator: gives timm the numbers that were drawn here."""

    def __init__(self, config: AugmentConfig, count: int, seed: tuple[int, int, int], size: tuple[int, int]) -> None:
        self.draws = _draw(np.random.default_rng(mix_seed(*seed, 1)), config, count, size)
        self.both = bool(config.mixup and config.cutmix)
        self.alone = config.mix_mode == "batch"
        self.centres = [c for p, *pair in zip(self.draws.pastes, self.draws.rows, self.draws.columns, strict=True)
                        if p for c in pair]  # fmt: skip
        # For a batch timm asks whether to mix and then how; for images the other way round.
        switches, off = 1.0 - self.draws.pastes, (self.draws.weights == 1) * 1.0
        self.uniforms = [off, switches] if self.alone else [switches, off]
        if not self.both:
            self.uniforms.remove(switches)

    def rand(self, *shape: int) -> Any:
        values = self.uniforms.pop(0)
        return values if shape else values[0]

    def beta(self, *_: float, size: int | None = None) -> Any:
        return self.draws.weights if size else self.draws.weights[0]

    def randint(self, *_: int, size: None = None) -> int:
        return int(self.centres.pop(0))


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize(("mixup", "cutmix"), [(0.3, 0.0), (0.0, 1.0), (0.3, 1.0)])
def test_images_and_targets_are_timms_for_the_same_draws(
    mixup: float, cutmix: float, mode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels = planes(images_of(8, 16, 12)), torch.tensor([0, 1, 2, 3, 4, 1, 0, 2])
    config = AugmentConfig(mixup=mixup, cutmix=cutmix, mix_mode=mode, mix_prob=0.7, mix_switch_prob=0.4)
    theirs = Mixup(mixup, cutmix, prob=0.7, switch_prob=0.4, mode=mode, label_smoothing=0.1, num_classes=5)
    mixed_at_all = 0
    for step in range(12):
        seed = (3, step, 0)
        output, targets = mix(images, labels, config, 5, seed)
        replayed = Replayed(config, {"batch": 1, "pair": 4, "elem": 8}[mode], seed, (16, 12))
        with monkeypatch.context() as patch:
            for name in ("rand", "beta", "randint"):
                patch.setattr(np.random, name, getattr(replayed, name))
            their_images, their_targets = theirs(images.clone(), labels)
        torch.testing.assert_close(output, their_images, rtol=0, atol=1e-6)
        smoothed = targets.lerp(targets.mean(1, keepdim=True), 0.1)
        torch.testing.assert_close(smoothed, their_targets.double(), rtol=0, atol=1e-6)
        mixed_at_all += int((output != images).flatten(1).any(1).sum())
    assert 0.4 * 96 < mixed_at_all < 0.95 * 96


def test_an_odd_image_in_the_middle_of_pairs_stays_itself() -> None:
    images, labels = planes(images_of(5)), torch.arange(5)
    config = AugmentConfig(mixup=1.0, cutmix=1.0, mix_mode="pair")
    output, targets = mix(images, labels, config, 5, (0, 1, 0))
    torch.testing.assert_close(output[2], images[2])
    torch.testing.assert_close(targets[2], torch.eye(5, dtype=torch.float64)[2])
    torch.testing.assert_close(targets[[0, 1]].sum(0), targets[[3, 4]].sum(0).flip(0))


def test_switch_probability_is_the_share_of_cutmix() -> None:
    for switch, low, high in ((0.2, 20, 60), (0.9, 165, 195)):
        config = AugmentConfig(mixup=1.0, cutmix=1.0, mix_switch_prob=switch)
        assert low < sum(_draw(np.random.default_rng(i), config, 1, (8, 8)).pastes[0] for i in range(200)) < high
