"""`folder:<path>`."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sources import image_folder, open_named, write_images

from lockstep.data.sources.kinds import open_source
from lockstep.errors import UserError
from lockstep.settings.config import DataConfig


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


def test_the_share_that_is_held_out_can_be_set(tmp_path) -> None:
    name = image_folder(tmp_path)
    half = open_source(DataConfig(source=name, test_fraction=0.5))
    assert [len(half.splits[split]) for split in ("train", "test")] == [5, 5]
    assert half.held_out is not None and len(half.held_out) == 5
    none = open_source(DataConfig(source=name, test_fraction=0.0))
    assert set(none.splits) == {"train"} and none.held_out is None
    with pytest.raises(UserError, match=r"0.01 of 10 training images is none: raise --data.test_fraction"):
        open_source(DataConfig(source=name, test_fraction=0.01))
    with pytest.raises(UserError, match=r"cannot hold out 9 of 10 .*lower --data.test_fraction"):
        open_source(DataConfig(source=name, test_fraction=0.9))


def test_splits_without_a_training_set_are_not_taken_for_classes(tmp_path) -> None:
    with pytest.raises(UserError, match="holds test and val, and no train"):
        open_named(image_folder(tmp_path, ("test", "val")))


def test_a_source_with_its_own_validation_split_has_no_folds(tmp_path) -> None:
    name = image_folder(tmp_path, ("train", "val"))
    with pytest.raises(UserError, match="--data.folds=3 has no meaning for .*: it has a validation split"):
        open_source(DataConfig(source=name, folds=3))


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


def link(place: Path, target: Path) -> None:
    place.symlink_to(target, target_is_directory=True)


def test_links_to_folders_are_followed(tmp_path: Path) -> None:
    write_images(tmp_path / "elsewhere" / "more", 3)
    name = image_folder(tmp_path / "set")
    link(tmp_path / "set" / "cat" / "linked", tmp_path / "elsewhere")
    assert sum(map(len, open_named(name).splits.values())) == 13


@pytest.mark.parametrize("target", [".", "..", "../..", "../../.."])
def test_a_link_that_leads_back_is_named(target: str, tmp_path: Path) -> None:
    """It showed 322 images where there were 15, those of other classes among them."""
    name = image_folder(tmp_path / "set", ("train", "test"))
    link(tmp_path / "set/train/cat/loop", (tmp_path / "set/train/cat" / target).resolve())
    with pytest.raises(UserError, match="set/train/cat/loop is a link to a folder that it lies in"):
        open_named(name)


def test_two_links_that_lead_to_one_another_are_named(tmp_path: Path) -> None:
    name = image_folder(tmp_path / "set")
    link(tmp_path / "set/cat/a", tmp_path / "set/dog")
    link(tmp_path / "set/dog/b", tmp_path / "set/cat")
    with pytest.raises(UserError, match="is a link to a folder that it lies in"):
        open_named(name)


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = image_folder(tmp_path / "set")
    write_images(tmp_path / "set/cat/private", 2)
    real = os.scandir

    def refuse(path: str) -> Any:
        if str(path).endswith("private"):  # root, as who tests may run, can read everything
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"set/cat/private cannot be read \(Permission denied\)"):
        open_named(name)


def test_a_pipe_is_named_and_not_waited_for(tmp_path: Path) -> None:
    name = image_folder(tmp_path / "set")
    os.mkfifo(tmp_path / "set/dog/z.png")
    with pytest.raises(UserError, match="set/dog/z.png is not a file: remove it"):
        open_named(name)


def test_postscript_under_another_name_starts_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = image_folder(tmp_path / "set")
    (tmp_path / "set/cat/0.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    )
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a program was started"))
    split = open_named(name).splits["train"]
    row = next(row for row in range(len(split)) if split.where(row).endswith("cat/0.png"))
    with pytest.raises(OSError, match="cannot identify image file"):
        split.read(row).load()


@pytest.mark.parametrize("name", [b"caf\xe9", b"two\nlines", b"bell\x07"])
def test_a_class_whose_name_is_no_text_is_named(name: bytes, tmp_path: Path) -> None:
    os.mkdir(os.path.join(os.fsencode(tmp_path), name))
    (tmp_path / "cat").mkdir()
    with pytest.raises(UserError, match="whose name is no plain text"):
        open_named(f"folder:{tmp_path}")


def test_other_pictures_of_the_same_names_and_sizes_are_other_data(tmp_path: Path) -> None:
    def write(shade: int) -> dict[str, int | str]:
        for name in ("cat", "dog"):
            (tmp_path / name).mkdir(exist_ok=True)
            for number in range(6):
                Image.new("RGB", (4, 4), (shade, number, 0)).save(tmp_path / name / f"{number}.bmp")
        return open_named(f"folder:{tmp_path}").identity

    before = write(10)
    assert write(10) == before, "a copy is the same"
    assert write(20) != before


def test_renamed_classes_are_other_data(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for number in range(6):
            Image.new("L", (4, 4)).save(tmp_path / name / f"{number}.bmp")
    before = open_named(f"folder:{tmp_path}").identity
    (tmp_path / "cat").rename(tmp_path / "zebra")
    assert open_named(f"folder:{tmp_path}").identity["class_names"] != before["class_names"]


def test_the_identity_of_a_folder_is_that_of_earlier_runs(tmp_path: Path) -> None:
    """A run continues only with the data that it knows: another digest of the same files would end it."""
    for split, names in (("train", ("cat", "dog", "fox")), ("val", ("cat", "fox"))):
        for number, name in enumerate(names):
            place = tmp_path / split / name / "below"
            place.mkdir(parents=True)
            for file in range(number + 2):
                (place / f"{file}.ppm").write_bytes(b"P5 1 1 255 " + bytes([40 * number + file]))
            (place.parent / "z.ppm").write_bytes(b"P5 1 1 255 a")
    (tmp_path / "train/dog/gone.png").symlink_to("nowhere")
    source = open_named(f"folder:{tmp_path}")
    assert source.identity["content"] == "1a4975e00f15caaf"
    assert source.splits["train"].labels.tolist() == [0] * 3 + [1] * 5 + [2] * 5
    assert [source.splits["val"].where(row)[len(str(tmp_path)) :] for row in (0, 2, 6)] == [
        "/val/cat/below/0.ppm",
        "/val/cat/z.ppm",
        "/val/fox/z.ppm",
    ]
