"""Metrics of rows that a person can count."""

import numpy as np
import pytest

from lockstep.evaluation.metrics import METRICS, Predictions

# Two cats, one of them taken for a dog, and two dogs, one of them taken for a fox.
LABELS, PREDICTED = np.array([0, 0, 1, 1]), np.array([0, 1, 1, 2])
LOSSES = np.array([0.1, 0.9, 0.2, 0.8])


def rows(num_classes: int = 3) -> Predictions:
    better = np.array([0, 4, 0, 7])
    return Predictions(np.arange(4), LABELS, PREDICTED, np.full(4, 0.5), LOSSES, better, num_classes)


def test_a_confusion_has_labels_in_rows() -> None:
    assert rows().confusion.tolist() == [[1, 1, 0], [0, 1, 1], [0, 0, 0]]


def test_scores_of_a_class_that_was_never_seen_or_predicted_are_0() -> None:
    scores = rows(4).per_class()
    assert scores["precision"].tolist() == [1.0, 0.5, 0.0, 0.0]
    assert scores["recall"].tolist() == [0.5, 0.5, 0.0, 0.0]
    assert scores["f1"] == pytest.approx([2 / 3, 0.5, 0.0, 0.0])
    assert scores["support"].tolist() == [2, 2, 0, 0]


def test_means_are_over_all_samples() -> None:
    assert METRICS["loss"].compute(rows()) == pytest.approx(0.5) and METRICS["accuracy"].compute(rows()) == 0.5
    assert METRICS["top5_accuracy"].compute(rows(20)) == 0.75  # of the last, 7 classes had a higher output


def test_a_headline_has_what_says_something_about_so_many_classes() -> None:
    assert list(rows(10).headline()) == ["loss", "accuracy"]
    assert list(rows(11).headline()) == ["loss", "accuracy", "top5_accuracy"]
