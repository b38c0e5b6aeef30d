"""Epochs and batch size by the number of training images."""

from pathlib import Path
from typing import Any

import pytest
from folders import settings
from sources import image_folder

from lockstep.data.portions import choose_portions
from lockstep.errors import UserError


def chosen(images: int, said: list[str], **more: Any) -> tuple[int, int]:
    """Epochs and batch size for a set that has so many training images."""
    flat = {"train__epochs": -1, "train__batch_size": -1, "train__micro_batch_size": 8, "data__val_fraction": 0.0}
    config = settings(**{**flat, "data__source": f"synthetic:4x4x1x{images}", **more})
    train = choose_portions(config, said.append).train
    return train.epochs, train.batch_size


@pytest.mark.parametrize(
    ("images", "epochs", "batch_size"),
    [(20, 50, 16), (100, 50, 16), (288, 34, 16), (1000, 20, 32), (5000, 8, 64), (50_000, 5, 64)],
)
def test_a_set_gets_some_hundred_steps_at_least(images: int, epochs: int, batch_size: int) -> None:
    said: list[str] = []
    assert chosen(images, said) == (epochs, batch_size)
    (line,) = said
    assert f"{images} training images in 10 classes" in line
    assert f"--train.epochs={epochs}" in line and f"--train.batch_size={batch_size}" in line


def test_what_is_set_stays() -> None:
    said: list[str] = []
    assert chosen(1000, said, train__epochs=3) == (3, 32)
    assert chosen(1000, said, train__batch_size=16) == (10, 16)
    assert chosen(1000, said, train__micro_batch_size=24) == (30, 48)
    assert chosen(1000, said, train__epochs=3, train__batch_size=24) == (3, 24)
    assert len(said) == 3 and "epochs" not in said[0] and "batch_size" not in said[1]


def test_only_images_to_train_on_count() -> None:
    assert chosen(2000, [], data__val_fraction=0.5) == chosen(1000, [])
    assert chosen(2000, [], data__samples_per_class=10) == chosen(100, [])
    assert chosen(2000, [], data__folds=2) == chosen(1000, [])


def test_a_tiny_set_trains_and_a_tinier_one_is_one_line(tmp_path: Path) -> None:
    flat = {"data__val_fraction": 0.1, "data__source": image_folder(tmp_path / "tiny", count=6)}
    assert chosen(0, [], **flat) == (50, 8)  # 9 are left to train on, 2 are tested on, 1 validates
    flat["data__source"] = image_folder(tmp_path / "tinier", count=4)
    with pytest.raises(UserError, match="has 5 training images, and a step takes at least 8: .*batch_size=5"):
        chosen(0, [], **flat)
