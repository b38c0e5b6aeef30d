"""Transforms: what each does to pixels, against torch, torchvision and formulas, and whose randomness it uses."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lockstep.augment import transform as augment
from lockstep.augment.transform import Transform, build_transform, crop_boxes, mix, mixes
from lockstep.randomness import sample_keys, uniforms
from lockstep.settings.config import AugmentConfig, Config, RuntimeConfig

SINGLE: dict[str, dict[str, Any]] = {
    "resized_crop": {"resized_crop": 0.3},
    "crop_padding": {"crop_padding": 3},
    "flip": {"flip": True},
    "vertical_flip": {"vertical_flip": True},
    "rotation": {"rotation": 30.0},
    "translate": {"translate": 0.3},
    "zoom": {"zoom": 0.3},
    "shear": {"shear": 20.0},
    "perspective": {"perspective": 0.4},
    "brightness": {"jitter": (0.4,)},
    "contrast": {"jitter": (0.0, 0.4)},
    "saturation": {"jitter": (0.0, 0.0, 0.9)},
    "hue": {"jitter": (0.0, 0.0, 0.0, 0.4)},
    "grayscale": {"grayscale": 0.5},
    "blur": {"blur": 0.7},
    "noise": {"noise": 0.1},
    "erasing": {"erasing": 0.7},
}
EVERYTHING: dict[str, Any] = {
    **{key: value for changes in SINGLE.values() for key, value in changes.items()},
    "jitter": (0.4, 0.4, 0.4, 0.2),
}
COLOURS = ("saturation", "hue", "grayscale")
few = settings(max_examples=30, deadline=None)


def images_of(count: int = 16, height: int = 20, width: int = 16, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(count * height + channels)
    return torch.randint(0, 256, (count, height, width, channels), generator=generator, dtype=torch.uint8)


def smooth_images(count: int = 6, height: int = 48, width: int = 48) -> Tensor:
    """Slow waves, whose resampling hardly depends on details of the interpolation."""
    y, x = torch.meshgrid(torch.arange(height) / height, torch.arange(width) / width, indexing="ij")
    waves = [torch.sin(3 * x * (c + 1) + i) + torch.cos(4 * y + c * i) for i in range(count) for c in range(3)]
    return (torch.stack(waves).view(count, 3, height, width).permute(0, 2, 3, 1) * 63 + 127).to(torch.uint8)


def keys_of(count: int = 16, seed: int = 0) -> Tensor:
    return sample_keys(seed, 1, torch.arange(count), torch.zeros(count, dtype=torch.int64))


def unscaled(channels: int = 3, dtype: torch.dtype = torch.float64, **changes: Any) -> Transform:
    """A transform that normalises to [0, 1] only."""
    return Transform(AugmentConfig(**changes), (0.0,) * channels, (1.0,) * channels, dtype)


def planes(images: Tensor) -> Tensor:
    return images.permute(0, 3, 1, 2).double() / 255


# ---- what all transforms have in common


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [1, 3])
def test_output_is_nchw_floats_in_channels_last_memory(channels: int, dtype: torch.dtype) -> None:
    images = images_of(channels=channels)
    for name, changes in {**SINGLE, "everything": EVERYTHING, "nothing": {}}.items():
        if channels == 1 and name in (*COLOURS, "everything"):
            continue
        transform = unscaled(channels, dtype, **changes)
        for output in (transform.train(images, keys_of()), transform.evaluate(images)):
            assert output.shape == (16, channels, 20, 16) and output.dtype == dtype, name
            assert output.is_contiguous(memory_format=torch.channels_last), name
            assert torch.isfinite(output).all(), name


@pytest.mark.parametrize("name", [*SINGLE, "everything"])
def test_a_sample_is_changed_by_its_key_alone(name: str) -> None:
    images, keys, original = images_of(), keys_of(), images_of()
    transform = unscaled(**SINGLE.get(name, EVERYTHING))
    output = transform.train(images, keys)
    assert torch.equal(images, original), "the cached images were written to"
    assert torch.equal(output, transform.train(images, keys))
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(transform.train(images[order], keys[order]), output[order], rtol=0, atol=1e-12)
    for i in (0, 7):
        alone = transform.train(images[i : i + 1], keys[i : i + 1])
        torch.testing.assert_close(alone, output[i : i + 1], rtol=0, atol=1e-12)
    changed = (output != transform.evaluate(images)).flatten(1).any(1)
    assert changed.float().mean() > 0.2, "most images come out as they were"
    assert not torch.equal(output, transform.train(images, keys_of(seed=1))), "another key changes nothing"


def test_without_settings_training_only_normalises() -> None:
    images = images_of()
    mean, std = (0.4, 0.5, 0.6), (0.1, 0.2, 0.3)
    transform = Transform(AugmentConfig(), mean, std, torch.float64)
    expected = TF.normalize(planes(images), list(mean), list(std))
    torch.testing.assert_close(transform.evaluate(images), expected)
    assert torch.equal(transform.train(images, keys_of()), transform.evaluate(images))


def test_normalisation_follows_every_transform() -> None:
    images, keys, std = images_of(), keys_of(), (0.1, 0.2, 0.3)
    changes = {key: value for key, value in EVERYTHING.items() if key != "erasing"}
    plain = unscaled(**changes).train(images, keys)
    scaled = Transform(AugmentConfig(**changes), (0.4, 0.5, 0.6), std, torch.float64).train(images, keys)
    torch.testing.assert_close(scaled, TF.normalize(plain, [0.4, 0.5, 0.6], list(std)))


def test_no_two_transforms_share_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that switching one on leaves the draws of the others alone."""
    drawn: list[range] = []

    def recording(keys: Tensor, count: int, first: int = 0) -> Tensor:
        drawn.append(range(first, first + count))
        return uniforms(keys, count, first)

    monkeypatch.setattr(augment, "uniforms", recording)
    places: dict[int, str] = {}
    for name, changes in SINGLE.items():
        drawn.clear()
        unscaled(**changes).train(images_of(), keys_of())
        family = "affine" if {name} & {"rotation", "translate", "zoom", "shear"} else name
        family = "jitter" if name in ("brightness", "contrast", "saturation", "hue") else family
        # Affine and jitter parts are drawn along with their neighbours, at strength 0.
        idle = {augment._WARP: "affine", augment._COLOUR: "jitter"}
        mine = {place for each in drawn if idle.get(each.start, family) == family for place in each}
        assert mine, name
        for place in mine:
            assert places.setdefault(place, family) == family, f"{name} and {places[place]} share number {place}"


def test_switching_one_on_leaves_the_others_as_they_were() -> None:
    images, keys = images_of().clamp(min=1), keys_of()
    both, erased = unscaled(flip=True, erasing=0.7).train(images, keys), unscaled(erasing=0.7).train(images, keys)
    assert torch.equal(both == 0, erased == 0), "flipping moved the erased rectangles"
    flipped = unscaled(flip=True).train(images, keys)
    assert torch.equal(both[both != 0], flipped[both != 0]), "erasing changed which images are flipped"
    plain, zoomed = AugmentConfig(rotation=30), AugmentConfig(rotation=30, zoom=0.2)
    draws = uniforms(keys, 6, augment._WARP)
    one, two = (augment._affine(draws, config, 1.0) for config in (plain, zoomed))
    angle = torch.atan2(one[:, 1, 0], one[:, 0, 0])
    torch.testing.assert_close(angle, torch.atan2(two[:, 1, 0], two[:, 0, 0]))


# ---- geometry


@few
@given(padding=st.integers(1, 6), height=st.integers(2, 12), width=st.integers(2, 12), seed=st.integers(0, 2**40))
@pytest.mark.parametrize("channels", [1, 3])
def test_padded_crop_is_a_slice_of_the_padded_image(
    channels: int, padding: int, height: int, width: int, seed: int
) -> None:
    images, keys = images_of(8, height, width, channels), keys_of(8, seed)
    output = unscaled(channels, crop_padding=padding).train(images, keys)
    offsets = (uniforms(keys, 2, augment._CROP) * (2 * padding + 1)).long().tolist()
    for image, cut, (top, left) in zip(planes(images), output, offsets, strict=True):
        padded = TF.pad(image, [padding] * 4)
        torch.testing.assert_close(cut, padded[:, top : top + height, left : left + width])


def test_padded_crop_reaches_every_offset() -> None:
    keys = keys_of(2000)
    marked = torch.zeros(2000, 5, 5, 1, dtype=torch.uint8)
    marked[:, 2, 2] = 255
    found = unscaled(1, crop_padding=2).train(marked, keys).view(2000, 25).argmax(1)
    counts = torch.bincount(found, minlength=25)
    assert counts.min() > 40 and counts.max() < 130, counts  # 80 expected, deviation 9


@pytest.mark.parametrize(("changes", "axis"), [({"flip": True}, 3), ({"vertical_flip": True}, 2)])
def test_flips_mirror_half_of_the_images(changes: dict[str, Any], axis: int) -> None:
    images = images_of(2000, 4, 3)
    output, plain = unscaled(**changes).train(images, keys_of(2000)), unscaled().evaluate(images)
    kept = (output == plain).flatten(1).all(1)
    assert torch.equal(output[~kept], plain[~kept].flip(axis))
    assert 880 < kept.sum() < 1120  # 1000 expected, deviation 22


def centre(pixels: Tensor) -> Tensor:
    """Without a border of a quarter, where black comes in."""
    height, width = pixels.shape[-2:]
    return pixels[..., height // 4 : -(height // 4), width // 4 : -(width // 4)]


@pytest.mark.parametrize(("height", "width"), [(48, 48), (40, 64)])
@pytest.mark.parametrize("name", ["rotation", "translate", "zoom", "shear"])
def test_affine_transforms_are_torchvisions(name: str, height: int, width: int) -> None:
    images, keys = smooth_images(6, height, width), keys_of(6)
    strength = {"rotation": 20.0, "translate": 0.1, "zoom": 0.2, "shear": 15.0}[name]
    setting: dict[str, Any] = {name: strength}
    output = unscaled(**setting).train(images, keys)
    signed = 2 * uniforms(keys, 6, augment._WARP) - 1
    for image, got, (turn, shear, zoom, right, down, _) in zip(planes(images), output, signed.tolist(), strict=True):
        chosen: dict[str, Any] = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0]}
        chosen |= {
            "rotation": {"angle": -turn * strength},
            "translate": {"translate": [-right * strength * width, -down * strength * height]},
            "zoom": {"scale": 1 + zoom * strength},
            "shear": {"shear": [shear * strength, 0.0]},
        }[name]
        wanted = TF.affine(image, **chosen, interpolation=TF.InterpolationMode.BILINEAR)
        torch.testing.assert_close(centre(got), centre(wanted), rtol=0, atol=1e-4)
        assert (centre(got) - centre(image)).abs().max() > 1e-3


def test_what_a_rotation_uncovers_is_black() -> None:
    white = torch.full((6, 32, 32, 1), 255, dtype=torch.uint8)
    output = unscaled(1, rotation=45.0).train(white, keys_of(6))
    assert (output[:, :, 12:20, 12:20] > 0.999).all() and output.amin() == 0


@few
@given(strength=st.floats(0.01, 0.95), seed=st.integers(0, 2**40))
def test_perspective_moves_the_corners_inwards(strength: float, seed: int) -> None:
    draws = uniforms(keys_of(5, seed), 8, augment._CORNERS)
    matrices = augment._perspective(draws, strength)
    corners = torch.tensor([[-1, -1], [1, -1], [1, 1], [-1, 1]], dtype=torch.float64)
    moved = corners * (1 - strength * draws.view(5, 4, 2))
    assert ((moved.abs() > 1 - strength) & (moved.abs() <= 1)).all()
    mapped = torch.cat([moved, torch.ones(5, 4, 1)], 2) @ matrices.transpose(1, 2)
    torch.testing.assert_close(mapped[..., :2] / mapped[..., 2:], corners.expand(5, 4, 2), rtol=0, atol=1e-6)


def test_perspective_shows_the_whole_image_within_the_moved_corners() -> None:
    white, keys = torch.full((8, 64, 64, 1), 255, dtype=torch.uint8), keys_of(8)
    output = unscaled(1, perspective=0.4).train(white, keys)
    corners = torch.tensor([[-1, -1], [1, -1], [1, 1], [-1, 1]], dtype=torch.float64)
    x, y = (corners * (1 - 0.4 * uniforms(keys, 8, augment._CORNERS).view(8, 4, 2))).unbind(-1)
    share = 0.5 * (x * y.roll(-1, 1) - y * x.roll(-1, 1)).sum(1).abs() / 4  # shoelace formula
    torch.testing.assert_close(output.mean((1, 2, 3)), share, rtol=0, atol=0.02)


@few
@given(min_area=st.floats(0.05, 1), seed=st.integers(0, 2**40))
def test_crop_boxes_lie_inside_and_are_large_enough(min_area: float, seed: int) -> None:
    x, y, width, height = crop_boxes(keys_of(64, seed), min_area)
    for middle, side in ((x, width), (y, height)):
        assert (side > 0).all() and (middle - side / 2 >= -1e-12).all() and (middle + side / 2 <= 1 + 1e-12).all()
    whole = (width < 1) & (height < 1)
    area, aspect = width * height, width / height
    assert (area[whole] >= min_area - 1e-12).all()
    assert (area >= min_area * math.sqrt(3 / 4) - 1e-12).all()  # shortened on one side
    assert ((aspect >= 3 / 4 - 1e-12) & (aspect <= 4 / 3 + 1e-12)).all()


def test_crop_boxes_spread_over_areas_and_places() -> None:
    x, y, width, height = crop_boxes(keys_of(4000), 0.08)
    area = width * height
    assert area.min() < 0.1 and area.max() > 0.95 and abs(area.mean() - 0.54) < 0.03
    for middle, side in ((x, width), (y, height)):
        share = ((middle - side / 2) / (1 - side))[side < 0.99]
        assert abs(share.mean() - 0.5) < 0.03 and share.min() < 0.02 and share.max() > 0.98


def test_resized_crop_shows_the_box_in_full_size() -> None:
    keys, size = keys_of(8), 64
    ramp = torch.arange(size, dtype=torch.uint8)
    across = ramp.expand(8, size, size)
    for axis, images in enumerate((across, across.transpose(1, 2))):
        output = unscaled(1, resized_crop=0.2).train(images[..., None].contiguous(), keys)[:, 0] * 255
        box = crop_boxes(keys, 0.2)
        middle, side = box[axis], box[2 + axis]
        steps = (torch.arange(size, dtype=torch.float64) + 0.5) / size
        expected = (middle[:, None] - side[:, None] / 2 + side[:, None] * steps) * size - 0.5
        got = output[:, size // 2] if axis == 0 else output[:, :, size // 2]
        inside = (expected > 0.5) & (expected < size - 1.5)  # at the border the black outside is mixed in
        torch.testing.assert_close(got[inside], expected[inside], rtol=0, atol=1e-6)


def test_images_cropped_while_decoding_are_not_cropped_again() -> None:
    images, keys = images_of(), keys_of()
    precropped = Transform(AugmentConfig(resized_crop=0.3), (0.0,) * 3, (1.0,) * 3, torch.float64, True)
    assert torch.equal(precropped.train(images, keys), precropped.evaluate(images))
    both = Transform(AugmentConfig(resized_crop=0.3, rotation=20), (0.0,) * 3, (1.0,) * 3, torch.float64, True)
    assert torch.equal(both.train(images, keys), unscaled(rotation=20).train(images, keys))


# ---- colour


@pytest.mark.parametrize(
    ("place", "reference"),
    [(0, TF.adjust_brightness), (1, TF.adjust_contrast), (2, TF.adjust_saturation)],
    ids=["brightness", "contrast", "saturation"],
)
def test_jitter_is_torchvisions(place: int, reference: Any) -> None:
    images, keys, strength = images_of(), keys_of(), 0.7
    output = unscaled(jitter=(0.0,) * place + (strength,)).train(images, keys)
    factors = 1 + strength * (2 * uniforms(keys, 4, augment._COLOUR)[:, place] - 1)
    expected = torch.stack([reference(*pair) for pair in zip(planes(images), factors.tolist(), strict=True)])
    torch.testing.assert_close(output, expected, rtol=0, atol=3e-4)  # 0.2989 there, 0.299 here


def test_hue_turns_colours_and_keeps_brightness_and_grey() -> None:
    images, keys = images_of() // 4 + 96, keys_of()  # pale, so that nothing is cut off
    output, plain = unscaled(jitter=(0, 0, 0, 0.5)).train(images, keys), planes(images)
    torch.testing.assert_close(augment._luma(output), augment._luma(plain), rtol=0, atol=2e-3)
    assert (output - plain).abs().mean() > 0.02
    grey = images[..., :1].expand(-1, -1, -1, 3)
    torch.testing.assert_close(unscaled(jitter=(0, 0, 0, 0.5)).train(grey, keys), planes(grey), rtol=0, atol=1e-3)
    third = augment._turn_hue(torch.tensor([[1.0, 0.2, 0.2]]).view(1, 3, 1, 1).double(), torch.tensor([1 / 3]))
    assert third.flatten().argmax() != 0, "a third of a turn leaves red red"


def test_grayscale_takes_the_colour_of_its_share() -> None:
    images = images_of(1000, 4, 4)
    output, plain = unscaled(grayscale=0.3).train(images, keys_of(1000)), planes(images)
    grey = (output[:, 0] == output[:, 2]).flatten(1).all(1)
    assert 230 < grey.sum() < 370  # 300 expected, deviation 14
    expected = TF.rgb_to_grayscale(plain[grey], 3)
    torch.testing.assert_close(output[grey], expected, rtol=0, atol=2e-4)
    torch.testing.assert_close(output[~grey], plain[~grey])


def test_blur_is_torchvisions_for_each_images_own_sigma() -> None:
    images, keys = images_of(12, 24, 20), keys_of(12)
    output, plain = unscaled(blur=0.6).train(images, keys), planes(images)
    for image, got, (chance, place) in zip(plain, output, uniforms(keys, 2, augment._BLUR).tolist(), strict=True):
        wanted = TF.gaussian_blur(image, 9, 0.1 + 1.9 * place) if chance < 0.6 else image
        torch.testing.assert_close(got[:, 4:-4, 4:-4], wanted[:, 4:-4, 4:-4], rtol=0, atol=1e-6)
    flat = torch.full((4, 12, 12, 3), 77, dtype=torch.uint8)
    torch.testing.assert_close(unscaled(blur=1.0).train(flat, keys_of(4)), planes(flat))  # no dark border


def test_noise_is_normal_with_the_wanted_deviation() -> None:
    flat = torch.full((16, 32, 32, 3), 128, dtype=torch.uint8)
    noise = (unscaled(noise=0.1).train(flat, keys_of()) - 128 / 255) / 0.1
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    assert abs((noise.abs() < 1).double().mean() - 0.6827) < 0.01
    rows = noise.reshape(16, -1)
    correlations = torch.corrcoef(rows) - torch.eye(16)
    assert correlations.abs().max() < 0.1, "samples share their noise"
    assert torch.corrcoef(noise.transpose(0, 1).reshape(3, -1)).triu(1).abs().max() < 0.05


# ---- erasing


def test_erasing_paints_a_rectangle_of_the_promised_size_in_the_mean_colour() -> None:
    count, size = 600, 64
    images = torch.full((count, size, size, 3), 255, dtype=torch.uint8)
    transform = Transform(AugmentConfig(erasing=0.5), (0.4, 0.5, 0.6), (0.2, 0.2, 0.2), torch.float32)
    output, plain = transform.train(images, keys_of(count)), transform.evaluate(images)
    erased = (output == 0).all(1)
    assert torch.equal(output.movedim(1, -1)[~erased], plain.movedim(1, -1)[~erased])
    chosen = erased.flatten(1).any(1)
    assert 240 < chosen.sum() < 360  # 300 expected, deviation 12
    areas = []
    for mask in erased[chosen]:
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        height, width = int(rows[-1] - rows[0] + 1), int(columns[-1] - columns[0] + 1)
        assert mask.sum() == height * width, "not a rectangle"
        areas.append(height * width / size**2)
        if max(height, width) < size:
            assert 0.3 * 0.8 < width / height < 1 / 0.3 / 0.8
    assert 0.02 * 0.8 < min(areas) < 0.06 and 0.36 < max(areas) < 0.4 * 1.05


# ---- mixup and cutmix


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


def test_a_training_batch_is_augmented_and_then_mixed() -> None:
    images, labels, keys, seed = images_of(4), torch.tensor([0, 1, 2, 3]), keys_of(4), (0, 3, 1)
    plain = unscaled(flip=True)
    augmented, same_labels = plain.train_batch(images, labels, keys, seed)
    assert torch.equal(augmented, plain.train(images, keys)) and torch.equal(same_labels, labels)
    config = AugmentConfig(flip=True, mixup=1.0)
    mixing = Transform(config, (0.0,) * 3, (1.0,) * 3, torch.float64, num_classes=5)
    expected = mix(augmented, labels, config, 5, seed)
    for got, wanted in zip(mixing.train_batch(images, labels, keys, seed), expected, strict=True):
        assert torch.equal(got, wanted) and got.shape[0] == 4


# ---- settings


@pytest.mark.parametrize("changes", [{"grayscale": 0.1}, {"jitter": (0, 0, 0.2)}, {"jitter": (0, 0, 0, 0.1)}])
def test_colour_settings_are_refused_for_grey_images(changes: dict[str, Any]) -> None:
    config = Config(augment=AugmentConfig(**changes))
    with pytest.raises(ValueError, match=r"--augment\.(grayscale|jitter) .*cannot change grey images") as error:
        build_transform(config, (0.5,), (0.2,), 10, precropped=False)
    assert "\n" not in str(error.value)
    assert build_transform(config, (0.5,) * 3, (0.2,) * 3, 10, precropped=False).mean == (0.5,) * 3


def test_brightness_and_contrast_work_on_grey_images() -> None:
    config = Config(augment=AugmentConfig(jitter=(0.3, 0.3)), runtime=RuntimeConfig(dtype="float64"))
    transform = build_transform(config, (0.5,), (0.2,), 10, precropped=True)
    assert transform.precropped and transform.dtype == torch.float64
    output = transform.train(images_of(channels=1), keys_of())
    assert output.dtype == torch.float64 and not torch.equal(output, transform.evaluate(images_of(channels=1)))
