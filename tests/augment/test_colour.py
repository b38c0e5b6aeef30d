"""Jitter, grayscale, blur and noise, against torchvision and formulas."""

from typing import Any

import pytest
import torch
import torchvision.transforms.functional as TF
from pictures import augmented, images_of, keys_of, planes, unscaled

from lockstep.augment.colour import turn_hue
from lockstep.randomness import draw


@pytest.mark.parametrize(
    ("place", "reference"),
    [(0, TF.adjust_brightness), (1, TF.adjust_contrast), (2, TF.adjust_saturation)],
    ids=["brightness", "contrast", "saturation"],
)
def test_jitter_is_torchvisions(place: int, reference: Any) -> None:
    images, keys, strength = images_of(), keys_of(), 0.7
    output = augmented(unscaled(jitter=(0.0,) * place + (strength,)), images, keys)
    factors = 1 + strength * (2 * draw(keys, "jitter", 4)[:, place] - 1)
    expected = torch.stack([reference(*pair) for pair in zip(planes(images), factors.tolist(), strict=True)])
    torch.testing.assert_close(output, expected, rtol=0, atol=3e-4)  # 0.2989 there, 0.299 here


def test_hue_is_torchvisions() -> None:
    images, keys = images_of(), keys_of()
    images[0, :4] = torch.tensor([90, 90, 90], dtype=torch.uint8)
    images[0, 4:8] = torch.tensor([200, 200, 10], dtype=torch.uint8)  # two channels share the highest value
    output = augmented(unscaled(jitter=(0, 0, 0, 0.5)), images, keys)
    turns = (0.5 * (2 * draw(keys, "jitter", 4)[:, 3] - 1)).tolist()
    pairs = zip(planes(images).float(), turns, strict=True)  # theirs is in float32
    torch.testing.assert_close(output.float(), torch.stack([TF.adjust_hue(*pair) for pair in pairs]), rtol=0, atol=1e-5)
    assert (output - planes(images)).abs().mean() > 0.02
    third = turn_hue(torch.tensor([[1.0, 0.2, 0.2]]).view(1, 3, 1, 1).double(), torch.tensor([1 / 3]))
    torch.testing.assert_close(third.flatten(), torch.tensor([0.2, 1.0, 0.2]).double(), rtol=0, atol=1e-6)


def test_grayscale_takes_the_colour_of_its_share() -> None:
    images = images_of(1000, 4, 4)
    output, plain = augmented(unscaled(grayscale=0.3), images, keys_of(1000)), planes(images)
    grey = (output[:, 0] == output[:, 2]).flatten(1).all(1)
    assert 230 < grey.sum() < 370  # 300 expected, deviation 14
    expected = TF.rgb_to_grayscale(plain[grey], 3)
    torch.testing.assert_close(output[grey], expected, rtol=0, atol=2e-4)
    torch.testing.assert_close(output[~grey], plain[~grey])


def test_blur_is_torchvisions_for_each_images_own_sigma() -> None:
    images, keys = images_of(12, 24, 20), keys_of(12)
    output, plain = augmented(unscaled(blur=0.6), images, keys), planes(images)
    for image, got, (chance, place) in zip(plain, output, draw(keys, "blur", 2).tolist(), strict=True):
        wanted = TF.gaussian_blur(image, 9, 0.1 + 1.9 * place) if chance < 0.6 else image
        torch.testing.assert_close(got[:, 4:-4, 4:-4], wanted[:, 4:-4, 4:-4], rtol=0, atol=1e-6)
    flat = torch.full((4, 12, 12, 3), 77, dtype=torch.uint8)
    torch.testing.assert_close(augmented(unscaled(blur=1.0), flat, keys_of(4)), planes(flat))  # no dark border


def test_noise_is_normal_with_the_wanted_deviation() -> None:
    flat = torch.full((16, 32, 32, 3), 128, dtype=torch.uint8)
    noise = (augmented(unscaled(noise=0.1), flat, keys_of()) - 128 / 255) / 0.1
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    assert abs((noise.abs() < 1).double().mean() - 0.6827) < 0.01
    rows = noise.reshape(16, -1)
    correlations = torch.corrcoef(rows) - torch.eye(16)
    assert correlations.abs().max() < 0.1, "samples share their noise"
    assert torch.corrcoef(noise.transpose(0, 1).reshape(3, -1)).triu(1).abs().max() < 0.05
