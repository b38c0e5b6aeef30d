"""`torchvision:<name>`."""

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
