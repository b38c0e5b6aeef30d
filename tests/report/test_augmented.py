"""The augmentation gallery shows what training sees."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from pictures import augmented

from lockstep.augment.transform import build_transform
from lockstep.data.images import SKIPPED_LABEL, Data, build_data
from lockstep.evaluation.metrics import Predictions
from lockstep.report.augmented import EPOCHS, augmented_samples
from lockstep.report.exhibits import augmentation_gallery
from lockstep.settings.config import AugmentConfig, Config, DataConfig

Evaluated = tuple[Data, Predictions]


def test_versions_are_the_pixels_of_training(evaluated: Evaluated) -> None:
    data, _ = evaluated
    config = Config(augment=AugmentConfig(flip=True))
    samples = augmented_samples(config, data)
    assert list(samples) == list(range(6)) and data.train.images is not None
    originals, versions = zip(*((images[0], images[1:]) for images in samples.values()), strict=True)
    assert np.array_equal(np.stack(originals), data.train.images.take(data.train.rows[:6]).numpy())
    mirrored = 0
    for original, own in zip(originals, versions, strict=True):
        assert len(own) == EPOCHS
        for version in own:
            is_mirrored = not np.array_equal(version, original)
            assert not is_mirrored or np.array_equal(version, original[:, ::-1])
            mirrored += is_mirrored
    assert 0 < mirrored < 6 * EPOCHS


def test_without_augmentation_there_is_no_gallery(evaluated: Evaluated) -> None:
    data, _ = evaluated
    assert augmented_samples(Config(), data) == {} and augmentation_gallery(Config(), data) is None


def test_skipped_images_are_left_out(evaluated: Evaluated) -> None:
    data, _ = evaluated
    labels = data.train.labels.clone()
    labels[2] = SKIPPED_LABEL
    some = replace(data, train=replace(data.train, labels=labels))
    config = Config(augment=AugmentConfig(crop_padding=2))
    assert list(augmented_samples(config, some)) == [0, 1, 3, 4, 5]
    gallery = augmentation_gallery(config, some)
    assert gallery is not None and len(gallery.images) == len(gallery.captions) == 5 * (1 + EPOCHS)
    assert gallery.captions[0].endswith(", as it is") and gallery.captions[EPOCHS].endswith(f", epoch {EPOCHS}")


def test_streamed_crops_are_those_of_training(tmp_path: Path) -> None:
    source = DataConfig(source="synthetic:24x24x3x20", memory_budget=0.0, cache_dir=str(tmp_path))
    config = Config(data=source, augment=AugmentConfig(resized_crop=0.2, image_size=16))
    data = build_data(config, tmp_path, write=False)
    assert data.train.images is None
    samples = augmented_samples(config, data)
    assert samples[0].shape == (1 + EPOCHS, 16, 16, 3)
    assert len({version.tobytes() for version in samples[0]}) == 1 + EPOCHS
    from lockstep.data.loader import read_samples
    from lockstep.randomness import sample_keys

    key = sample_keys(config.run.seed, 0, data.train.rows[:1], torch.zeros(1, dtype=torch.int64))
    ((crop, _),) = read_samples(data.train, [0], key, 0.2)
    plain = augmented(build_transform(config, data.mean, data.std, data.num_classes, precropped=True), crop[None], key)
    assert plain.shape == (1, 3, 16, 16) and np.array_equal(samples[0][1], crop.numpy())


def test_smaller_images_of_early_epochs_are_shown_in_full_size(evaluated: Evaluated) -> None:
    data, _ = evaluated
    config = Config(augment=AugmentConfig(progressive_size=4, progressive_epochs=1))
    (original, first, second, *_) = augmented_samples(config, data)[0]
    assert first.shape == original.shape and np.array_equal(second, original)
    assert np.array_equal(first[::2], first[1::2]) and not np.array_equal(first, original)
