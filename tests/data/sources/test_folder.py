"""`folder:<path>`."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sources import image_folder, open_named, write_images


def test_folder_with_splits(tmp_path) -> None:
    name = image_folder(tmp_path, ("train", "valid", "test"))
    write_images(tmp_path / "train/cat/nested", 2)
    (tmp_path / "train/cat/notes.txt").write_text("no image")
    source = open_named(name)
    assert source.classes == ("cat", "dog")
    assert {name: split.labels.tolist() for name, split in source.splits.items()} == {
        "train": [0] * 7 + [1] * 5,
        "val": [0] * 5 + [1] * 5,
        "test": [0] * 5 + [1] * 5,
    }
    assert source.splits["test"].where(6) == str(tmp_path / "test/dog/1.png")
    assert source.splits["test"].read(6).getpixel((0, 0)) == (10, 0, 0)


def test_folder_without_splits_holds_out_a_fifth(tmp_path) -> None:
    source = open_named(image_folder(tmp_path))
    splits = source.splits
    assert {name: np.bincount(split.labels).tolist() for name, split in splits.items()} == {
        "train": [4, 4],
        "test": [1, 1],
    }
    names = [split.where(row) for split in splits.values() for row in range(len(split))]
    assert len(set(names)) == 10 and all(Path(name).is_file() for name in names)


def test_folder_with_a_changed_file_has_another_fingerprint(tmp_path) -> None:
    name = image_folder(tmp_path)
    before = open_named(name).fingerprint
    assert open_named(name).fingerprint == before
    Image.new("RGB", (60, 50)).save(tmp_path / "cat" / "0.png")
    assert open_named(name).fingerprint != before


def test_folder_problems_are_named(tmp_path) -> None:
    with pytest.raises(ValueError, match=f"there is no folder {tmp_path}/nowhere"):
        open_named(f"folder:{tmp_path}/nowhere")
    with pytest.raises(ValueError, match="holds no class folders"):
        open_named(f"folder:{tmp_path}")
    write_images(tmp_path / "one/cat", 3)
    with pytest.raises(ValueError, match="one holds only one class, cat"):
        open_named(f"folder:{tmp_path}/one")
    (tmp_path / "one/dog").mkdir()
    with pytest.raises(ValueError, match="one/dog holds no images"):
        open_named(f"folder:{tmp_path}/one")
    name = image_folder(tmp_path / "two", ("train", "val"))
    write_images(tmp_path / "two/val/fox", 1)
    with pytest.raises(ValueError, match="two/val/fox is a class that .*two/train does not have"):
        open_named(name)
