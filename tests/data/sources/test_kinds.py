"""Every kind of source by its name, and every way in which a name can be wrong."""

import pickle

import numpy as np
import pytest
from sources import hub_folder, image_folder, open_named, png, tar_of_folder, write_mnist


@pytest.fixture(autouse=True)
def _hub_cache(tmp_path, monkeypatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("digits", "not of a known kind: embedded:..., torchvision:..., hf:..., folder:..., tar:..., synthetic:..."),
        ("embeded:digits", "Did you mean embedded"),
        ("embedded:digit", "the only embedded data set is embedded:digits"),
        ("torchvision:FashionMINST", "Did you mean FashionMNIST"),
        ("torchvision:cifar10", "Did you mean CIFAR10"),
        ("torchvision:zzzzz", "Known: CIFAR10"),
        ("hf:./no/such/folder", "there is no folder /.*/no/such/folder"),
        ("synthetic:32x32", "must read synthetic:HxWxCxN"),
        ("synthetic:32x32x4x100", "1 or 3 channels"),
        ("synthetic:32x32x3x10", "at least 20 images"),
    ],
)
def test_unknown_names_are_refused_in_one_line(source: str, message: str, tmp_path) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        open_named(source, tmp_path)
    assert "\n" not in str(caught.value)


def test_splits_can_be_sent_to_workers(tmp_path) -> None:
    write_mnist(tmp_path)
    rows = {"train": [(png(1), 0), (png(2), 1)], "test": [(png(3), 0)]}
    names = ["embedded:digits", "torchvision:MNIST", image_folder(tmp_path / "images"), "synthetic:8x8x1x20"]
    names.append(tar_of_folder(tmp_path / "images", tmp_path / "shards", ("",)))
    for name in [*names, hub_folder(tmp_path / "set", rows)]:
        split = open_named(name, tmp_path).splits["test"]
        copy = pickle.loads(pickle.dumps(split))
        assert np.array_equal(np.asarray(copy.read(0)), np.asarray(split.read(0))), name
        assert copy.where(0) == split.where(0)
