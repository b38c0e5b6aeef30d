"""What all transforms have in common, and the way of a batch through them."""

from typing import Any

import pytest
import torch
import torchvision.transforms.functional as TF
from pictures import COLOURS, EVERYTHING, SINGLE, augmented, images_of, keys_of, planes, unscaled
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lockstep.augment import colour, geometry, policy
from lockstep.augment.mix import mix
from lockstep.augment.transform import TRANSFORMS, Transform, build_transform, progressive_width
from lockstep.randomness import draw
from lockstep.settings.config import AugmentConfig, Config, RuntimeConfig


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [1, 3])
def test_output_is_nchw_floats_in_channels_last_memory(channels: int, dtype: torch.dtype) -> None:
    images = images_of(channels=channels)
    for name, changes in {**SINGLE, "everything": EVERYTHING, "nothing": {}}.items():
        if channels == 1 and name in (*COLOURS, "everything"):
            continue
        transform = unscaled(channels, dtype, **changes)
        for output in (augmented(transform, images, keys_of()), transform.evaluate(images)):
            assert output.shape == (16, channels, 20, 16) and output.dtype == dtype, name
            assert output.is_contiguous(memory_format=torch.channels_last), name
            assert torch.isfinite(output).all(), name


@pytest.mark.parametrize("name", [*SINGLE, "everything"])
def test_a_sample_is_changed_by_its_key_alone(name: str) -> None:
    images, keys, original = images_of(), keys_of(), images_of()
    transform = unscaled(**SINGLE.get(name, EVERYTHING))
    output = augmented(transform, images, keys)
    assert torch.equal(images, original), "the cached images were written to"
    assert torch.equal(output, augmented(transform, images, keys))
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(augmented(transform, images[order], keys[order]), output[order], rtol=0, atol=1e-12)
    for i in (0, 7):
        alone = augmented(transform, images[i : i + 1], keys[i : i + 1])
        torch.testing.assert_close(alone, output[i : i + 1], rtol=0, atol=1e-12)
    changed = (output != transform.evaluate(images)).flatten(1).any(1)
    assert changed.float().mean() > 0.2, "most images come out as they were"
    assert not torch.equal(output, augmented(transform, images, keys_of(seed=1))), "another key changes nothing"


def test_without_settings_training_only_normalises() -> None:
    images = images_of()
    mean, std = (0.4, 0.5, 0.6), (0.1, 0.2, 0.3)
    transform = Transform(AugmentConfig(), mean, std, torch.float64)
    expected = TF.normalize(planes(images), list(mean), list(std))
    torch.testing.assert_close(transform.evaluate(images), expected)
    assert torch.equal(augmented(transform, images, keys_of()), transform.evaluate(images))


def test_normalisation_leaves_its_input_as_it_was() -> None:
    images = images_of()
    pixels = images.double()  # which needs no copy to become what is computed with
    assert torch.equal(unscaled().evaluate(pixels), unscaled().evaluate(images))
    assert torch.equal(pixels, images.double())


def test_normalisation_follows_every_transform() -> None:
    images, keys, std = images_of(), keys_of(), (0.1, 0.2, 0.3)
    changes = {key: value for key, value in EVERYTHING.items() if key != "erasing"}
    plain = augmented(unscaled(**changes), images, keys)
    scaled = augmented(Transform(AugmentConfig(**changes), (0.4, 0.5, 0.6), std, torch.float64), images, keys)
    torch.testing.assert_close(scaled, TF.normalize(plain, [0.4, 0.5, 0.6], list(std)))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_draws_from_the_stream_of_its_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no two share random numbers, and switching one on leaves the draws of the others alone."""
    drawn: set[str] = set()

    def recording(keys: Tensor, stream: str, count: int) -> Tensor:
        drawn.add(stream)
        return draw(keys, stream, count)

    for module in (geometry, colour, policy):
        monkeypatch.setattr(module, "draw", recording)
    wanted = {setting: EVERYTHING[setting] for setting in TRANSFORMS[name].settings}
    augmented(unscaled(**wanted), images_of(), keys_of())
    assert drawn == {name}


def test_switching_one_on_leaves_the_others_as_they_were() -> None:
    images, keys = images_of().clamp(min=1), keys_of()
    both, erased = (
        augmented(unscaled(flip=True, erasing=0.7), images, keys),
        augmented(unscaled(erasing=0.7), images, keys),
    )
    assert torch.equal(both == 0, erased == 0), "flipping moved the erased rectangles"
    flipped = augmented(unscaled(flip=True), images, keys)
    assert torch.equal(both[both != 0], flipped[both != 0]), "erasing changed which images are flipped"
    plain, zoomed = AugmentConfig(rotation=30), AugmentConfig(rotation=30, zoom=0.2)
    one, two = (geometry.affine(keys, config, 1.0) for config in (plain, zoomed))
    angle = torch.atan2(one[:, 1, 0], one[:, 0, 0])
    torch.testing.assert_close(angle, torch.atan2(two[:, 1, 0], two[:, 0, 0]))


def test_a_training_batch_is_augmented_and_then_mixed() -> None:
    images, labels, keys, seed = images_of(4), torch.tensor([0, 1, 2, 3]), keys_of(4), (0, 3, 1)
    plain = unscaled(flip=True)
    rearranged = plain.rearrange(images, keys)
    assert not torch.equal(rearranged, images) and rearranged.dtype == torch.uint8
    pixels, same_labels = plain.train_batch(rearranged, labels, keys, seed)
    assert torch.equal(pixels, plain.evaluate(rearranged)) and torch.equal(same_labels, labels)
    config = AugmentConfig(flip=True, mixup=1.0)
    mixing = Transform(config, (0.0,) * 3, (1.0,) * 3, torch.float64, num_classes=5)
    expected = mix(pixels, labels, config, 5, seed)
    for got, wanted in zip(mixing.train_batch(rearranged, labels, keys, seed), expected, strict=True):
        assert torch.equal(got, wanted) and got.shape[0] == 4


def test_mixing_ends_with_its_epoch() -> None:
    images, labels, keys = images_of(4), torch.tensor([0, 1, 2, 3]), keys_of(4)
    config = AugmentConfig(mixup=1.0, mix_off_epoch=2)
    mixing = Transform(config, (0.0,) * 3, (1.0,) * 3, torch.float64, num_classes=5, steps_per_epoch=10)
    for step in (0, 19):
        assert mixing.train_batch(images, labels, keys, (0, step, 0))[1].is_floating_point()
    for step in (20, 55):
        output, targets = mixing.train_batch(images, labels, keys, (0, step, 0))
        assert torch.equal(output, mixing.evaluate(images)) and torch.equal(targets, labels)


def test_images_grow_with_the_epoch() -> None:
    config = AugmentConfig(progressive_size=128, progressive_epochs=60)
    sizes = [progressive_width(config, epoch, 224) for epoch in range(100)]
    assert sizes == [128] * 20 + [160] * 20 + [192] * 20 + [224] * 40
    images, labels, keys = images_of(4, 30, 20), torch.tensor([0, 1, 2, 3]), keys_of(4)
    config = AugmentConfig(flip=True, progressive_size=10, progressive_epochs=2, progressive_step=5)
    growing = Transform(config, (0.0,) * 3, (1.0,) * 3, torch.float64, steps_per_epoch=3)
    for step, size in ((0, (15, 10)), (2, (15, 10)), (3, (22, 15)), (6, (30, 20)), (99, (30, 20))):
        rearranged = growing.rearrange(images, keys)
        output, _ = growing.train_batch(rearranged, labels, keys, (0, step, 0))
        assert output.is_contiguous(memory_format=torch.channels_last)
        wanted = TF.resize(growing.evaluate(rearranged), list(size), antialias=True)
        torch.testing.assert_close(output, wanted, rtol=0, atol=1e-9)
    assert growing.evaluate(images).shape[2:] == (30, 20)


def test_a_flip_in_evaluation_averages_probabilities() -> None:
    images = images_of(6)
    weights = torch.randn(3 * 20 * 16, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 10
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 20 * 16, 5, bias=False, dtype=torch.float64))
    model[1].weight.data = weights.T.contiguous()
    plain, flipped = (unscaled(tta=name).logits(model, images) for name in ("none", "flip"))
    assert torch.equal(plain, model(planes(images))) or torch.allclose(plain, model(planes(images)))
    mirrored = model(planes(images.flip(2))).softmax(1)
    torch.testing.assert_close(flipped.softmax(1), (plain.softmax(1) + mirrored) / 2)
    assert not torch.allclose(flipped.softmax(1), plain.softmax(1), atol=1e-3)


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
    output = augmented(transform, images_of(channels=1), keys_of())
    assert output.dtype == torch.float64 and not torch.equal(output, transform.evaluate(images_of(channels=1)))


def test_where_a_device_has_no_float64_none_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Apple's GPUs; the few numbers of normalisation are made on the CPU."""

    class NoFloat64(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else [result]:
                if isinstance(tensor, Tensor) and tensor.dtype == torch.float64:
                    assert tensor.numel() <= 3, f"{function} made float64 {tuple(tensor.shape)}"
            return result

    for place in ("randomness", "augment.geometry", "augment.operations", "augment.transform"):
        monkeypatch.setattr(f"lockstep.{place}.real_type", lambda device: torch.float32)
    transform = Transform(AugmentConfig(**EVERYTHING), (0.5,) * 3, (0.2,) * 3, torch.float32)
    images, keys = images_of(), keys_of()
    with NoFloat64():
        assert augmented(transform, images, keys).dtype == torch.float32
