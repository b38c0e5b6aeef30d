"""Each operation of the policies against torchvision's, image by image."""

from collections.abc import Callable

import pytest
import torch
import torchvision.transforms.functional as TF
from pictures import images_of, smooth_images
from PIL import Image, ImageFilter
from timm.data.auto_augment import solarize_add
from torch import Tensor
from torchvision.transforms.autoaugment import _apply_op

from lockstep.augment.operations import OPERATIONS, operate

BILINEAR = TF.InterpolationMode.BILINEAR
REFERENCES: dict[str, tuple[str, tuple[float, ...]]] = {
    "shear_x": ("ShearX", (-0.3, 0.2, 0.99)),
    "shear_y": ("ShearY", (-0.3, 0.2, 0.99)),
    "translate_x": ("TranslateX", (-7, 3, 12)),
    "translate_y": ("TranslateY", (-7, 3, 12)),
    "rotate": ("Rotate", (-30, 12.5, 135)),
    "brightness": ("Brightness", (-0.9, 0.33, 0.9)),
    "contrast": ("Contrast", (-0.9, 0.33, 0.9)),
    "color": ("Color", (-0.9, 0.33, 0.9)),
    "sharpness": ("Sharpness", (-0.9, 0.33, 0.9)),
    "posterize": ("Posterize", (1, 4, 8)),
    "solarize": ("Solarize", (0, 100.5, 255)),
    "invert": ("Invert", (0,)),
    "autocontrast": ("AutoContrast", (0,)),
    "equalize": ("Equalize", (0,)),
    "identity": ("Identity", (0,)),
}


def pictures(channels: int, height: int = 40, width: int = 32) -> Tensor:
    """Noise, dark noise, slow waves, one colour, and few values: uint8 (5, C, H, W)."""
    noise, waves = images_of(2, height, width), smooth_images(1, height, width)
    rows = torch.cat([noise, waves, torch.full_like(waves, 91), noise[:1] // 64 * 64])
    rows[1] = rows[1] // 3 + 20
    return rows[..., :channels].permute(0, 3, 1, 2).contiguous()


def done(images: Tensor, name: str, strength: float, fill: tuple[float, ...] = (0.0,)) -> Tensor:
    choices = torch.full((len(images),), OPERATIONS.index(name))
    return operate(images, choices, torch.full((len(images),), strength, dtype=torch.float64), fill)


def assert_close(got: Tensor, wanted: Tensor, apart: int = 1) -> None:
    assert got.dtype == torch.uint8 and got.shape == wanted.shape
    distance = (got.int() - wanted.int()).abs()
    assert distance.max() <= apart and (distance > 0).double().mean() < 0.03, (distance.max(), (distance > 0).sum())


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", REFERENCES)
def test_operations_are_torchvisions(name: str, channels: int) -> None:
    images, (theirs, strengths) = pictures(channels), REFERENCES[name]
    for strength in strengths:
        wanted = torch.stack([_apply_op(image, theirs, strength, BILINEAR, None) for image in images])
        assert_close(done(images, name, strength), wanted)
        does_nothing = name == "identity" or strength == 8 or (channels == 1 and name == "color")
        assert does_nothing or not torch.equal(wanted[:3], images[:3]), "nothing was asked"


@pytest.mark.parametrize("name", ["shear_x", "translate_y", "rotate"])
def test_what_is_uncovered_gets_the_fill(name: str) -> None:
    images, fill, strength = pictures(3), (124.0, 116.0, 104.0), REFERENCES[name][1][1]
    wanted = torch.stack([_apply_op(image, REFERENCES[name][0], strength, BILINEAR, list(fill)) for image in images])
    got = done(images, name, strength, fill)
    # Torchvision darkens the seam: it weighs pixels there twice by how much of them is inside.
    inside = done(torch.full_like(images, 255), name, strength)
    seam = (inside > 0) & (inside < 255)
    assert_close(got.where(~seam, 0), wanted.where(~seam, 0))
    white = torch.full_like(images, 255)
    blended = inside / 255 * 255 + (1 - inside / 255) * torch.tensor(fill).view(-1, 1, 1)
    assert (done(white, name, strength, fill) - blended).abs().max() <= 1 and (inside == 0).any()
    assert not torch.equal(done(images, name, strength), done(images, name, strength, fill))


def pil(change: Callable[[Image.Image], Image.Image], images: Tensor) -> Tensor:
    return torch.stack([TF.pil_to_tensor(change(TF.to_pil_image(image))) for image in images])


def test_operations_that_torchvision_lacks_are_timms_and_pils() -> None:
    images = pictures(3)
    assert_close(done(images, "solarize_add", 77), pil(lambda image: solarize_add(image, 77), images))
    assert not done(images, "posterize", 0).any()  # as PIL did, which now refuses to
    blurred = (done(images, "gaussian_blur", 1.5)[..., 4:-4, 4:-4], TF.gaussian_blur(images, [9, 9], [1.5, 1.5]))
    assert_close(blurred[0], blurred[1][..., 4:-4, 4:-4])
    theirs = pil(lambda image: image.filter(ImageFilter.GaussianBlur(1.5)), images)[..., 4:-4, 4:-4]
    assert (blurred[0].int() - theirs.int()).abs().double().mean() < 2  # PIL's is three box blurs
    assert (theirs.int() - images[..., 4:-4, 4:-4].int()).abs().double().mean() > 20


def test_each_image_has_its_own_operation_and_strength() -> None:
    base = pictures(3)
    images = base[torch.arange(3 * len(OPERATIONS)) % 3]
    choices = torch.arange(len(images)) % len(OPERATIONS)
    strengths = torch.linspace(1, 2, len(images))
    together = operate(images, choices, strengths)
    for i, image in enumerate(images):
        alone = operate(image[None], choices[i : i + 1], strengths[i : i + 1])
        assert torch.equal(alone[0], together[i]), OPERATIONS[choices[i]]


def test_a_gpu_computes_the_same_without_asking_which(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing may wait, every operation is computed of every image."""

    def everywhere(chosen: Tensor, change: Callable[..., Tensor], old: Tensor, *inputs: Tensor) -> Tensor:
        return torch.where(chosen.view(-1, *[1] * (old.ndim - 1)), change(*inputs), old)

    images = pictures(3)[torch.arange(34) % 5]
    choices, strengths = torch.arange(34) % len(OPERATIONS), torch.linspace(0.1, 2, 34)
    expected = operate(images, choices, strengths)
    monkeypatch.setattr("lockstep.augment.operations._where", everywhere)
    assert torch.equal(operate(images, choices, strengths), expected)
