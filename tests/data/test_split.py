"""The validation split: sizes, classes, stability, and the file that keeps it."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.data.split import divide, draw_fold, draw_validation_split, load_or_draw_split
from lockstep.errors import UserError
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


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(5, 30), min_size=2, max_size=6), folds=st.integers(2, 5), seed=st.integers(0, 2**63))
def test_folds_hold_every_sample_once_and_every_class_alike(sizes: list[int], folds: int, seed: int) -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    parts = [draw_fold(labels, folds, fold, seed) for fold in range(folds)]
    assert np.array_equal(np.sort(np.concatenate([val for _, val in parts])), np.arange(len(labels)))
    for train, val in parts:
        assert np.array_equal(np.sort(np.concatenate([train, val])), np.arange(len(labels)))
    counts = np.array([np.bincount(labels[val], minlength=len(sizes)) for _, val in parts])
    assert np.ptp(counts, axis=0).max() <= 1 and np.ptp(counts.sum(axis=1)) <= 1


def test_folds_follow_the_seed_and_never_change() -> None:
    assert draw_fold(LABELS, 20, 0, seed=7)[1].tolist() == PINNED_FOLD
    assert draw_fold(LABELS, 20, 0, seed=8)[1].tolist() != PINNED_FOLD


PINNED_FOLD = [28, 34, 42, 51, 93]


def test_a_class_that_a_fold_would_take_whole_is_refused() -> None:
    with pytest.raises(UserError, match="--data.folds=3 leaves .* 9 images, 1 of the smallest class"):
        for fold in range(3):
            draw_fold(np.array([0] * 8 + [1]), 3, fold, seed=0)
    with pytest.raises(UserError, match="--data.folds=30 leaves a fold without images"):
        draw_fold(np.array([0, 1] * 6), 30, 29, seed=0)


def test_few_samples_are_as_many_of_each_class_and_never_held_out_ones() -> None:
    few, val = divide(LABELS, DataConfig(val_fraction=0.2, samples_per_class=4), 3)
    more, same_val = divide(LABELS, DataConfig(val_fraction=0.2, samples_per_class=9), 3)
    assert np.bincount(LABELS[few]).tolist() == [4, 4, 4] and np.all(np.diff(few) > 0)
    assert np.array_equal(val, same_val) and not set(val) & set(more)
    assert set(few) < set(more)  # so that curves over the number of samples are those of growing sets
    draws = [divide(LABELS, DataConfig(val_fraction=0.0, samples_per_class=4), seed)[0].tolist() for seed in (3, 4)]
    assert draws[0] != draws[1]
    with pytest.raises(UserError, match="--data.samples_per_class=17: class 2 has only 16 images"):
        divide(LABELS, DataConfig(val_fraction=0.2, samples_per_class=17), 3)


@pytest.mark.parametrize(
    "changes", [{}, {"folds": 5, "fold": 3}, {"samples_per_class": 4}, {"folds": 5, "samples_per_class": 4}]
)
def test_all_that_was_drawn_is_written_once_and_read_back(tmp_path, changes) -> None:
    path, config, test = tmp_path / "split.json", DataConfig(val_fraction=0.2, **changes), np.array([3, 7])
    drawn = load_or_draw_split(path, LABELS, config, 3, write=True, test=test)
    saved = json.loads(path.read_text())
    assert saved["test_indices"] == [3, 7] and saved["test_fraction"] == 0.2
    for _ in range(2):
        again = load_or_draw_split(path, LABELS, config, 3, write=False, test=test)
        assert all(np.array_equal(one, other) for one, other in zip(drawn, again, strict=True))
    with pytest.raises(UserError, match="drawn for other data .*test_indices"):
        load_or_draw_split(path, LABELS, config, 3, write=False, test=np.array([3, 8]))
    if "samples_per_class" in changes:
        path.write_text(json.dumps(saved | {"train_indices": [0, 1, 2]}))
        with pytest.raises(UserError, match="train_indices"):
            load_or_draw_split(path, LABELS, config, 3, write=False, test=test)


def test_a_file_from_before_the_test_set_was_kept_still_counts(tmp_path) -> None:
    path, config, test = tmp_path / "split.json", DataConfig(val_fraction=0.1), np.arange(20)
    drawn = load_or_draw_split(path, LABELS, config, 3, write=True)
    read = load_or_draw_split(path, LABELS, config, 3, write=True, test=test)
    assert all(np.array_equal(a, b) for a, b in zip(drawn, read, strict=True))
    path.unlink()
    load_or_draw_split(path, LABELS, config, 3, write=True, test=test)
    with pytest.raises(UserError, match="test_indices differ"):
        load_or_draw_split(path, LABELS, config, 3, write=True, test=test + 1)
