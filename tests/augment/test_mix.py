"""Mixup and cutmix: pixels and targets share alike."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import images_of, planes
from torch import Tensor

from lockstep.augment.mix import mix, mixes
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
    partners, own = images.roll(1, 0), targets[0, 0].item()
    if kind == "mixup":
        torch.testing.assert_close(output, own * images + (1 - own) * partners, rtol=0, atol=1e-9)
    else:
        pasted = (output != images).any(1)
        assert torch.equal(output.movedim(1, -1)[pasted], partners.movedim(1, -1)[pasted])
        share = pasted.double().mean((1, 2))
        torch.testing.assert_close(share, torch.full((6,), 1 - own, dtype=torch.float64), rtol=0, atol=1e-9)
        assert (pasted == pasted[0]).all()
    one_hot = torch.eye(5, dtype=torch.float64)[labels]
    torch.testing.assert_close(targets, own * one_hot + (1 - own) * one_hot.roll(1, 0))


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
    pasted = [((output == images) | (output == images.roll(1, 0))).all() for output in outputs]
    assert 60 < sum(pasted) < 140
    assert mixes(config) and not mixes(AugmentConfig()) and not mixes(AugmentConfig(mixup=0.0, cutmix=0.0))


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_skipped_samples_have_no_target(kind: str) -> None:
    _, _, targets = mixed(kind, (0, 0, 0), torch.tensor([2, -100, 3, -100]))
    own = targets[0, 2].item()  # its partner, the last one, was skipped
    assert 0 < own < 1 and targets[0].sum() == own
    torch.testing.assert_close(targets[1], torch.tensor([0, 0, 1 - own, 0, 0], dtype=torch.float64))
    torch.testing.assert_close(targets[2], torch.tensor([0, 0, 0, own, 0], dtype=torch.float64))
    assert targets[2, 3] == own


def test_mixing_keeps_the_dtype_of_the_images() -> None:
    images, labels = planes(images_of(4)), torch.arange(4)
    for dtype in (torch.float32, torch.float64):
        output, targets = mix(images.to(dtype), labels, AugmentConfig(mixup=1.0), 5, (0, 0, 0))
        assert output.dtype == targets.dtype == dtype
