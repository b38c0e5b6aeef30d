"""`torchvision:<name>`."""

import gzip
from pathlib import Path

import numpy as np
import pytest
from sources import open_named, write_mnist


def test_torchvision_reads_local_files_without_network(tmp_path) -> None:
    pixels = write_mnist(tmp_path)
    source = open_named("torchvision:MNIST", tmp_path)
    assert {name: len(split) for name, split in source.splits.items()} == {"train": 40, "test": 40}
    assert source.classes[3] == "3 - three"
    assert np.array_equal(np.asarray(source.splits["train"].read(7)), pixels[7])
    assert source.splits["train"].labels.tolist() == [row % 10 for row in range(40)]


def test_torchvision_without_network_names_the_folder(tmp_path, capfd) -> None:
    with pytest.raises(ValueError, match=rf"is not in {tmp_path}/MNIST/raw and cannot be downloaded") as caught:
        open_named("torchvision:MNIST", tmp_path)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_torchvision_with_a_truncated_file_is_refused(tmp_path) -> None:
    write_mnist(tmp_path)
    file = tmp_path / "MNIST/raw/train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ValueError, match="MNIST/raw are damaged: remove them"):
        open_named("torchvision:MNIST", tmp_path)


def test_every_torchvision_set_on_offer_exists() -> None:
    from torchvision import datasets

    from lockstep.data.sources.torchvision import _torchvision_arguments

    known = _torchvision_arguments()
    assert {"MNIST", "FashionMNIST", "KMNIST", "CIFAR10", "CIFAR100", "USPS", "SVHN"} <= set(known)
    assert all(hasattr(datasets, name) and {"train", "test"} <= set(splits) for name, splits in known.items())


def test_fashion_mnist_is_found_where_debian_puts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import FashionMNIST

    pixels = write_mnist(tmp_path / "made")
    package, resources = tmp_path / "package", []
    package.mkdir()
    for file in sorted((tmp_path / "made/MNIST/raw").iterdir()):
        packed = gzip.compress(file.read_bytes())
        (package / f"{file.name}.gz").write_bytes(packed)
        resources.append((f"{file.name}.gz", "a checksum of theirs"))
    monkeypatch.setattr(FashionMNIST, "resources", resources)
    monkeypatch.setattr("lockstep.data.sources.torchvision._PACKAGED", {"FashionMNIST": package})
    source = open_named("torchvision:FashionMNIST", tmp_path)
    assert np.array_equal(np.asarray(source.splits["train"].read(7)), pixels[7])

    (package / resources[0][0]).write_bytes(b"damaged")
    with pytest.raises(ValueError, match="cannot be downloaded"):
        open_named("torchvision:FashionMNIST", tmp_path / "other")
