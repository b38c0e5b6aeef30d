"""`synthetic:HxWxCxN`."""

import numpy as np
from sources import open_named


def test_synthetic_images_are_a_function_of_their_number() -> None:
    source = open_named("synthetic:12x16x3x40")
    train, test = source.splits["train"], source.splits["test"]
    assert (len(train), len(test), len(source.classes)) == (40, 10, 10)
    assert np.bincount(train.labels).tolist() == [4] * 10
    first = np.asarray(train.read(5))
    assert first.shape == (12, 16, 3)
    assert np.array_equal(first, np.asarray(open_named("synthetic:12x16x3x40").splits["train"].read(5)))
    assert not np.array_equal(first, np.asarray(test.read(5)))


def test_synthetic_classes_can_be_learned() -> None:
    source = open_named("synthetic:16x16x1x200")
    flat = {name: np.array([np.asarray(split.read(row)).ravel() for row in range(len(split))], dtype=float)
            for name, split in source.splits.items()}  # fmt: skip
    train, test = source.splits["train"], source.splits["test"]
    means = np.stack([flat["train"][train.labels == label].mean(axis=0) for label in range(10)])
    nearest = ((flat["test"][:, None] - means) ** 2).sum(axis=2).argmin(axis=1)
    assert (nearest == test.labels).mean() > 0.9
