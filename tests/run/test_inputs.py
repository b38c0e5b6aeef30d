"""input.json, and in what an evaluation departs from the training."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lockstep.data.images import SKIPPED_LABEL, Data, build_data
from lockstep.errors import UserError
from lockstep.run.inputs import (
    FILE,
    NetworkInput,
    as_trained,
    describe_split,
    differences,
    input_of,
    loose_differences,
    read_input,
    write_input,
)
from lockstep.settings.config import AugmentConfig, Config, DataConfig

PLAIN = AugmentConfig()
GREY = NetworkInput(("cat", "dog"), 3, (1, 8, 8), None, (0.3,), (0.4,))
COLOUR = NetworkInput(("cat", "dog"), 2, (3, 160, 160), 180, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    folder = tmp_path_factory.mktemp("digits")
    return build_data(Config(data=DataConfig(cache_dir=str(folder))), folder, write=False)


def test_what_is_written_is_read(tmp_path: Path, data: Data) -> None:
    assert read_input(tmp_path) is None
    write_input(tmp_path, data)
    assert read_input(tmp_path) == input_of(data)
    checkpoint = tmp_path / "checkpoints" / "step_00000004"
    checkpoint.mkdir(parents=True)
    (tmp_path / "checkpoints" / "best").symlink_to(checkpoint.name)
    assert read_input(checkpoint) == read_input(tmp_path / "checkpoints" / "best") == input_of(data)
    write_input(tmp_path, replace(data, mean=(0.5,)))
    assert read_input(tmp_path) == input_of(data), "a training that goes on has the same"


@pytest.mark.parametrize(
    "damage",
    [
        "[",
        "[]",
        "{}",
        '{"classes": ["a"], "num_classes": 2, "image_shape": [2, 8, 8], "resize_size": null, "mean": [0], "std": [1]}',
        '{"classes": ["a"], "num_classes": 2, "image_shape": [1, 8, 8], "resize_size": null, "mean": [0], "std": [0]}',
        '{"classes": 1, "num_classes": 2, "image_shape": [1, 8, 8], "resize_size": null, "mean": [0], "std": [1]}',
    ],
)
def test_a_damaged_file_is_one_line(tmp_path: Path, damage: str) -> None:
    (tmp_path / FILE).write_text(damage)
    with pytest.raises(UserError, match=f"{FILE} is damaged: remove it"):
        read_input(tmp_path)


def test_settings_change_size_and_normalisation() -> None:
    assert COLOUR.under(PLAIN) == COLOUR
    larger = COLOUR.under(AugmentConfig(image_size=224, eval_crop=0.875))
    assert (larger.image_shape, larger.resize_size) == ((3, 224, 224), 256)
    other = COLOUR.under(AugmentConfig(mean=(0.5,), std=(0.25,)))
    assert (other.mean, other.std) == ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    assert COLOUR.names == ["cat", "dog"] and GREY.names == ["cat", "dog", "2"]


def test_each_departure_is_a_line() -> None:
    assert differences(COLOUR, COLOUR) == []
    larger = replace(COLOUR, image_shape=(3, 224, 224), resize_size=256)
    assert differences(COLOUR, larger) == [
        "note: images are 224x224 (cut from 256) here, and were 160x160 (cut from 180) in training"
    ]
    assert len(differences(COLOUR, replace(COLOUR, resize_size=160))) == 1
    other = replace(COLOUR, mean=(0.5, 0.5, 0.5))
    assert differences(COLOUR, other) == [
        "note: images are normalised by mean 0.5, 0.5, 0.5 and std 0.4, 0.5, 0.6 here, "
        "and were by mean 0.1, 0.2, 0.3 and std 0.4, 0.5, 0.6 in training"
    ]
    with pytest.raises(UserError, match="grey here, and the network was trained on colour ones"):
        differences(COLOUR, GREY)
    assert loose_differences(COLOUR, COLOUR) == []
    assert loose_differences(GREY, GREY) == [
        "note: in training images came in 8x8 and were not resized: those of another size are, here"
    ]


def test_data_of_the_training_are_as_they_are(data: Data) -> None:
    same, notes = as_trained(data, input_of(data), PLAIN)
    assert notes == [] and same.test is data.test and (same.mean, same.std) == (data.mean, data.std)
    assert as_trained(data, None, PLAIN) == (data, [])


def test_classes_in_another_order_are_matched_by_name(data: Data) -> None:
    labels = data.test.labels.clone()
    labels[0] = SKIPPED_LABEL
    trained = replace(input_of(data), classes=data.classes[::-1])
    matched, notes = as_trained(replace(data, test=replace(data.test, labels=labels)), trained, PLAIN)
    assert notes == ["note: 10 of the network's 10 classes are here, and not in its order: they are matched by name"]
    assert matched.classes == trained.classes
    assert matched.test.labels[0] == SKIPPED_LABEL and torch.equal(matched.test.labels[1:], 9 - labels[1:])
    assert torch.equal(matched.train.labels, 9 - data.train.labels) and matched.val is not None


def test_some_of_the_classes_are_matched_and_unknown_ones_are_told(data: Data) -> None:
    trained = replace(input_of(data), classes=("x", *data.classes, "y"), num_classes=12)
    matched, (note,) = as_trained(data, trained, PLAIN)
    assert "10 of the network's 12 classes" in note and torch.equal(matched.test.labels, data.test.labels + 1)
    same, (note,) = as_trained(data, replace(trained, classes=("0", "cat")), PLAIN)
    assert "has no class 1: its outputs are taken in the order" in note and same.test is data.test


def test_normalisation_is_the_trainings_unless_it_is_set(data: Data) -> None:
    trained = replace(input_of(data), mean=(0.5,), std=(0.25,))
    same, notes = as_trained(data, trained, PLAIN)
    assert (same.mean, same.std) == ((0.5,), (0.25,)) and notes == []
    other, (note,) = as_trained(data, trained, AugmentConfig(mean=data.mean, std=data.std))
    assert other.mean == data.mean and "normalised by mean 0.306" in note


def test_images_that_are_not_new_are_told(data: Data) -> None:
    assert describe_split(data, "test") == describe_split(data, "val") == []
    assert "was trained on these" in describe_split(data, "train")[0]
    validated = replace(data, test=replace(data.test, split=data.train.split), val=data.train)
    assert "no test split" in describe_split(validated, "test")[0]
