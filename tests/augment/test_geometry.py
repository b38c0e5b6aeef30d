"""Windows, mirrors, warps and erased rectangles, against torchvision and formulas."""

import random
from typing import Any

import pytest
import torch
import torchvision.transforms.functional as TF
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import augmented, images_of, keys_of, planes, smooth_images, unscaled
from torch import Tensor
from torchvision.transforms import RandomErasing, RandomResizedCrop

from lockstep.augment.geometry import crop_boxes, crop_draws, erase, perspective, pixel_box
from lockstep.augment.transform import Transform
from lockstep.randomness import draw
from lockstep.settings.config import AugmentConfig

few = settings(max_examples=30, deadline=None)


@few
@given(padding=st.integers(1, 6), height=st.integers(2, 12), width=st.integers(2, 12), seed=st.integers(0, 2**40))
@pytest.mark.parametrize("channels", [1, 3])
def test_padded_crop_is_a_slice_of_the_padded_image(
    channels: int, padding: int, height: int, width: int, seed: int
) -> None:
    images, keys = images_of(8, height, width, channels), keys_of(8, seed)
    output = augmented(unscaled(channels, crop_padding=padding), images, keys)
    offsets = (draw(keys, "padded_crop", 2) * (2 * padding + 1)).long().tolist()
    for image, cut, (top, left) in zip(planes(images), output, offsets, strict=True):
        padded = TF.pad(image, [padding] * 4)
        torch.testing.assert_close(cut, padded[:, top : top + height, left : left + width])


def test_padded_crop_reaches_every_offset() -> None:
    keys = keys_of(2000)
    marked = torch.zeros(2000, 5, 5, 1, dtype=torch.uint8)
    marked[:, 2, 2] = 255
    found = augmented(unscaled(1, crop_padding=2), marked, keys).view(2000, 25).argmax(1)
    counts = torch.bincount(found, minlength=25)
    assert counts.min() > 40 and counts.max() < 130, counts  # 80 expected, deviation 9


@pytest.mark.parametrize(("changes", "axis"), [({"flip": True}, 3), ({"vertical_flip": True}, 2)])
@pytest.mark.parametrize("size", [(8, 8), (4, 3), (2, 3), (3, 5)])  # of 192, 36, 18 and 45 bytes
def test_flips_mirror_half_of_the_images(changes: dict[str, Any], axis: int, size: tuple[int, int]) -> None:
    images = images_of(2000, *size)
    output, plain = augmented(unscaled(**changes), images, keys_of(2000)), unscaled().evaluate(images)
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
    output = augmented(unscaled(**setting), images, keys)
    signed = 2 * draw(keys, "affine", 6) - 1
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
    output = augmented(unscaled(1, rotation=45.0), white, keys_of(6))
    assert (output[:, :, 12:20, 12:20] > 0.999).all() and output.amin() == 0


@few
@given(strength=st.floats(0.01, 0.95), seed=st.integers(0, 2**40))
def test_perspective_moves_the_corners_inwards(strength: float, seed: int) -> None:
    draws = draw(keys_of(5, seed), "perspective", 8)
    matrices = perspective(keys_of(5, seed), AugmentConfig(perspective=strength), 1.0)
    corners = torch.tensor([[-1, -1], [1, -1], [1, 1], [-1, 1]], dtype=torch.float64)
    moved = corners * (1 - strength * draws.view(5, 4, 2))
    assert ((moved.abs() > 1 - strength) & (moved.abs() <= 1)).all()
    mapped = torch.cat([moved, torch.ones(5, 4, 1)], 2) @ matrices.transpose(1, 2)
    torch.testing.assert_close(mapped[..., :2] / mapped[..., 2:], corners.expand(5, 4, 2), rtol=0, atol=1e-6)


def test_perspective_shows_the_whole_image_within_the_moved_corners() -> None:
    white, keys = torch.full((8, 64, 64, 1), 255, dtype=torch.uint8), keys_of(8)
    output = augmented(unscaled(1, perspective=0.4), white, keys)
    corners = torch.tensor([[-1, -1], [1, -1], [1, 1], [-1, 1]], dtype=torch.float64)
    x, y = (corners * (1 - 0.4 * draw(keys, "perspective", 8).view(8, 4, 2))).unbind(-1)
    share = 0.5 * (x * y.roll(-1, 1) - y * x.roll(-1, 1)).sum(1).abs() / 4  # shoelace formula
    torch.testing.assert_close(output.mean((1, 2, 3)), share, rtol=0, atol=0.02)


@few
@given(min_area=st.floats(0.05, 1), seed=st.integers(0, 2**40), aspect=st.floats(0.2, 5))
def test_crop_boxes_lie_inside_and_are_large_enough(min_area: float, seed: int, aspect: float) -> None:
    x, y, width, height = crop_boxes(keys_of(64, seed), min_area, aspect)
    for middle, side in ((x, width), (y, height)):
        assert (side > 0).all() and (middle - side / 2 >= -1e-12).all() and (middle + side / 2 <= 1 + 1e-12).all()
    central = min(1.0, 4 / 3 / aspect) * min(1.0, aspect * 4 / 3)
    assert (width * height >= min(min_area, central) - 1e-12).all()
    in_pixels = width * aspect / height
    assert ((in_pixels >= 3 / 4 - 1e-12) & (in_pixels <= 4 / 3 + 1e-12)).all()


@pytest.mark.parametrize(("width", "height"), [(500, 375), (640, 360), (224, 224), (100, 400)])
def test_crop_boxes_are_distributed_as_torchvisions(width: int, height: int) -> None:
    """Area and aspect, by their quantiles; torchvision rounds sides to whole pixels."""
    count = 4000
    x, y, box_width, box_height = crop_boxes(keys_of(count), 0.08, width / height)
    image = torch.zeros(1, height, width)
    torch.manual_seed(0)
    theirs = torch.tensor(
        [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(count)], dtype=torch.float64
    )
    quantiles = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    for own, other in (
        (box_width * width / (box_height * height), theirs[:, 3] / theirs[:, 2]),
        (box_width * box_height, theirs[:, 3] * theirs[:, 2] / (width * height)),
        ((x - box_width / 2) * width, theirs[:, 1]),
        ((y - box_height / 2) * height, theirs[:, 0]),
    ):
        scale = max(1.0, float(other.abs().max()))
        torch.testing.assert_close(own.quantile(quantiles), other.quantile(quantiles), rtol=0, atol=0.03 * scale)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 96)])
def test_erased_rectangles_are_distributed_as_torchvisions(height: int, width: int) -> None:
    count, image = 2000, torch.ones(1, height, width)
    erased = erase(torch.ones(count, 1, height, width), keys_of(count), AugmentConfig(erasing=1.0))[:, 0] == 0
    rows, columns = erased.any(2).sum(1), erased.any(1).sum(1)
    torch.manual_seed(0)
    boxes = [RandomErasing.get_params(image, (0.02, 1 / 3), (0.3, 1 / 0.3), [0.0]) for _ in range(count)]
    their_rows, their_columns = (torch.tensor([box[side] for box in boxes]) for side in (2, 3))
    assert (rows > 0).double().mean() > 0.99
    quantiles = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    for own, theirs in ((rows, their_rows), (columns, their_columns)):
        torch.testing.assert_close(
            own.double().quantile(quantiles), theirs.double().quantile(quantiles), rtol=0, atol=3
        )


def test_resized_crop_shows_the_box_in_full_size() -> None:
    keys, size = keys_of(8), 64
    ramp = torch.arange(size, dtype=torch.uint8)
    across = ramp.expand(8, size, size)
    for axis, images in enumerate((across, across.transpose(1, 2))):
        output = augmented(unscaled(1, resized_crop=0.2), images[..., None].contiguous(), keys)[:, 0] * 255
        box = crop_boxes(keys, 0.2, 1.0)
        middle, side = box[axis], box[2 + axis]
        steps = (torch.arange(size, dtype=torch.float64) + 0.5) / size
        expected = (middle[:, None] - side[:, None] / 2 + side[:, None] * steps) * size - 0.5
        got = output[:, size // 2] if axis == 0 else output[:, :, size // 2]
        inside = (expected > 0.5) & (expected < size - 1.5)  # at the border the black outside is mixed in
        torch.testing.assert_close(got[inside], expected[inside], rtol=0, atol=1e-6)


def test_images_cropped_while_decoding_are_not_cropped_again() -> None:
    images, keys = images_of(), keys_of()
    precropped = Transform(AugmentConfig(resized_crop=0.3), (0.0,) * 3, (1.0,) * 3, torch.float64, True)
    assert torch.equal(augmented(precropped, images, keys), precropped.evaluate(images))
    both = Transform(AugmentConfig(resized_crop=0.3, rotation=20), (0.0,) * 3, (1.0,) * 3, torch.float64, True)
    assert torch.equal(augmented(both, images, keys), augmented(unscaled(rotation=20), images, keys))


def test_erasing_paints_a_rectangle_of_the_promised_size_in_the_mean_colour() -> None:
    count, size = 600, 64
    images = torch.full((count, size, size, 3), 255, dtype=torch.uint8)
    transform = Transform(AugmentConfig(erasing=0.5), (0.4, 0.5, 0.6), (0.2, 0.2, 0.2), torch.float32)
    output, plain = augmented(transform, images, keys_of(count)), transform.evaluate(images)
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
    assert 0.02 * 0.8 < min(areas) < 0.06 and 0.3 < max(areas) < 1 / 3 * 1.05


@pytest.mark.parametrize("mode", ["rand", "pixel"])
def test_erased_rectangles_are_painted_with_normal_colours(mode: Any) -> None:
    blank = torch.full((400, 3, 24, 24), 9.0, dtype=torch.float64)
    painted = erase(blank.clone(), keys_of(400), AugmentConfig(erasing=1.0, erasing_mode=mode))
    const = erase(blank.clone(), keys_of(400), AugmentConfig(erasing=1.0))
    assert torch.equal(painted != 9, const != 9), "the mode moves the rectangles"
    colours = painted[painted != 9] if mode == "pixel" else torch.stack([image[image != 9][:1] for image in painted])
    assert abs(colours.mean()) < 0.15 and abs(colours.std() - 1) < 0.1
    for image in painted[:20]:
        different = image[0][image[0] != 9].unique().numel()
        assert different == (1 if mode == "rand" else (image[0] != 9).sum())
        assert image.permute(1, 2, 0)[image[0] != 9][0].unique().numel() == 3, "channels share a number"


def test_several_erased_rectangles_share_the_area_as_timms() -> None:
    from timm.data.random_erasing import RandomErasing as TimmErasing

    count, size = 1500, 48
    mine = erase(torch.ones(count, 1, size, size), keys_of(count), AugmentConfig(erasing=1.0, erasing_count=3)) == 0
    random.seed(0)
    timms = TimmErasing(1.0, max_count=3, device="cpu")(torch.ones(count, 1, size, size)) == 0
    quantiles = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    own, theirs = (mask.double().mean((1, 2, 3)).quantile(quantiles) for mask in (mine, timms))
    torch.testing.assert_close(own, theirs, rtol=0, atol=0.015)
    spread = [mask.any(2).double().mean((1, 2)).quantile(quantiles) for mask in (mine, timms)]  # rows that are touched
    torch.testing.assert_close(spread[0], spread[1], rtol=0, atol=0.05)


@pytest.mark.parametrize(("width", "height"), [(900, 100), (7, 5), (2, 300), (1, 1)])
def test_boxes_in_whole_pixels_lie_inside_and_reach_both_ends(width: int, height: int) -> None:
    boxes = torch.tensor([pixel_box(draws, 0.3, width, height) for draws in crop_draws(keys_of(500)).tolist()])
    left, top, box_width, box_height = boxes.unbind(1)
    assert (left >= 0).all() and (top >= 0).all() and (box_width > 0).all() and (box_height > 0).all()
    ends = left + box_width, top + box_height
    assert ends[0].max() <= width and ends[1].max() <= height
    if (width, height) == (7, 5):
        assert (left.min(), top.min(), ends[0].max(), ends[1].max()) == (0, 0, 7, 5)


def test_boxes_in_whole_pixels_are_torchvisions(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the numbers that torchvision would draw, to the pixel."""
    shares: list[float] = []

    def uniform_(tensor: torch.Tensor, low: float, high: float) -> torch.Tensor:
        return tensor.fill_(low + (high - low) * shares.pop(0))

    monkeypatch.setattr(torch.Tensor, "uniform_", uniform_)
    places: list[float] = []

    def randint(low: int, high: int, size: tuple[int, ...]) -> torch.Tensor:
        return torch.tensor([low + int(places.pop(0) * (high - low))])

    monkeypatch.setattr(torch, "randint", randint)
    for width, height in ((500, 375), (300, 640), (1000, 90)):
        for draws in crop_draws(keys_of(100)).tolist():
            shares[:], places[:] = draws[2:], [draws[1], draws[0]]  # it draws the row first
            image = torch.empty(3, height, width)
            top, left, box_height, box_width = RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3])
            assert pixel_box(draws, 0.08, width, height) == (left, top, box_width, box_height)
