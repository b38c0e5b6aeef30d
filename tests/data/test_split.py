"""The validation split: sizes, classes, stability, and the file that keeps it."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.data.split import draw_validation_split, load_or_draw_split
from lockstep.settings.config import DataConfig

LABELS = np.repeat([0, 1, 2], [50, 30, 20])


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=2, max_size=8),
    fraction=st.floats(0, 0.6),
    seed=st.integers(0, 2**63),
)
def test_every_sample_is_in_one_part_and_every_class_is_trained(sizes: list[int], fraction: float, seed: int) -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    total = round(fraction * len(labels))
    if total > len(labels) - len(sizes) or (fraction > 0 and total == 0):
        with pytest.raises(ValueError, match="--data.val_fraction"):
            draw_validation_split(labels, fraction, seed)
        return
    train, val = draw_validation_split(labels, fraction, seed)
    assert len(val) == total
    assert np.array_equal(np.sort(np.concatenate([train, val])), np.arange(len(labels)))
    assert np.all(np.diff(train) > 0) and np.all(np.diff(val) > 0)
    assert set(labels[train]) == set(range(len(sizes)))


def test_classes_share_by_largest_remainder() -> None:
    _, val = draw_validation_split(LABELS, 0.25, seed=0)
    assert np.bincount(LABELS[val]).tolist() == [13, 7, 5]  # exact shares: 12.5, 7.5, 5; the tie goes to class 0


def test_the_draw_never_changes() -> None:
    _, val = draw_validation_split(LABELS, 0.05, seed=7)
    assert val.tolist() == PINNED  # another answer here would move the validation set (and the digits' test set)


PINNED = [21, 28, 44, 70, 93]


def test_another_seed_draws_another_split() -> None:
    assert draw_validation_split(LABELS, 0.2, 0)[1].tolist() != draw_validation_split(LABELS, 0.2, 1)[1].tolist()


def test_the_split_is_written_once_and_read_back(tmp_path) -> None:
    path = tmp_path / "run" / "split.json"
    config = DataConfig(val_fraction=0.2)
    undrawn = load_or_draw_split(path, LABELS, config, 3, write=False)
    assert not path.exists()
    drawn = load_or_draw_split(path, LABELS, config, 3, write=True)
    saved = json.loads(path.read_text())
    assert saved["val_indices"] == drawn[1].tolist() == undrawn[1].tolist()
    # What counts from now on is the file, not the draw.
    saved["val_indices"] = list(range(20))
    path.write_text(json.dumps(saved))
    train, val = load_or_draw_split(path, LABELS, config, 3, write=True)
    assert val.tolist() == list(range(20)) and train.tolist() == list(range(20, 100))
    assert [file.name for file in path.parent.iterdir()] == ["split.json"]


@pytest.mark.parametrize(
    ("labels", "config", "seed", "named"),
    [
        (LABELS[::-1], DataConfig(val_fraction=0.2), 3, "labels_sha256"),
        (LABELS, DataConfig(val_fraction=0.1), 3, "val_fraction"),
        (LABELS, DataConfig(val_fraction=0.2), 4, "seed"),
        (LABELS, DataConfig(val_fraction=0.2, source="folder:x"), 3, "source"),
    ],
)
def test_a_split_of_other_data_is_refused(tmp_path, labels, config, seed, named) -> None:
    path = tmp_path / "split.json"
    load_or_draw_split(path, LABELS, DataConfig(val_fraction=0.2), 3, write=True)
    with pytest.raises(ValueError, match=f"split.json was drawn for other data .*{named}"):
        load_or_draw_split(path, labels, config, seed, write=True)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"val_indices": "x"}'])
def test_a_damaged_file_is_named(tmp_path, content: str) -> None:
    path = tmp_path / "split.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="split.json is damaged"):
        load_or_draw_split(path, LABELS, DataConfig(), 0, write=True)


@pytest.mark.parametrize("indices", [[5, 5], [3, 100], [-1, 3], [4, 3], [[1, 2]]])
def test_impossible_indices_are_refused(tmp_path, indices: list) -> None:
    path = tmp_path / "split.json"
    load_or_draw_split(path, LABELS, DataConfig(val_fraction=0.02), 0, write=True)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"val_indices": indices}))
    with pytest.raises(ValueError, match="val_indices"):
        load_or_draw_split(path, LABELS, DataConfig(val_fraction=0.02), 0, write=True)
