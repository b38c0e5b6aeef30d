"""`embedded:digits`."""

import numpy as np
from sources import open_named


def test_digits_are_the_published_ones_with_a_fixed_test_fifth() -> None:
    from sklearn.datasets import load_digits

    source = open_named("embedded:digits")
    train, test = source.splits["train"], source.splits["test"]
    assert (len(train), len(test), set(source.splits)) == (1438, 359, {"train", "test"})
    assert source.classes == tuple("0123456789")
    published = np.rint(load_digits().images * 255 / 16)
    ours = [np.asarray(split.read(row)) for split in (train, test) for row in range(len(split))]
    assert np.array_equal(
        sorted(image.tobytes() for image in ours), sorted(i.astype("u1").tobytes() for i in published)
    )
    shares = np.bincount(test.labels) / np.bincount(load_digits().target)
    assert np.all(np.abs(shares - 0.2) < 0.01)
    # The very digits of the test set: a change would make accuracies before and after it incomparable.
    assert [test.where(row).rpartition(" ")[2] for row in range(6)] == ["16", "17", "22", "31", "34", "38"]
