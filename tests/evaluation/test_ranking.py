"""Rankings are those of scikit-learn, ties and missing classes included."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

from lockstep.evaluation.metrics import Predictions
from lockstep.evaluation.ranking import rank_class, rank_classes


@pytest.mark.parametrize("distinct", [3, 50, 10_000])  # many ties, some, none
def test_curves_and_areas_are_those_of_scikit_learn(distinct: int) -> None:
    generator = np.random.default_rng(distinct)
    scores = generator.integers(0, distinct, 500) / distinct
    positive = generator.random(500) < 0.2 + 0.6 * scores
    ranking = rank_class(scores, positive)
    assert ranking is not None
    assert ranking.average_precision == pytest.approx(average_precision_score(positive, scores), abs=1e-12)
    assert ranking.auc == pytest.approx(roc_auc_score(positive, scores), abs=1e-12)
    precision, recall, _ = precision_recall_curve(positive, scores)
    np.testing.assert_allclose(ranking.precision, precision[::-1], atol=1e-12)
    np.testing.assert_allclose(ranking.recall, recall[::-1], atol=1e-12)
    false, true, _ = roc_curve(positive, scores, drop_intermediate=False)
    np.testing.assert_allclose(ranking.false_positive_rate, false, atol=1e-12)
    np.testing.assert_allclose(ranking.recall, true, atol=1e-12)


def test_by_hand() -> None:
    """Ranked: hit, miss, hit (tied with a miss)."""
    ranking = rank_class(np.array([0.9, 0.5, 0.2, 0.2]), np.array([True, False, True, False]))
    assert ranking is not None
    assert ranking.recall.tolist() == [0, 0.5, 0.5, 1]
    assert ranking.precision.tolist() == [1, 1, 0.5, 0.5]
    assert ranking.false_positive_rate.tolist() == [0, 0, 0.5, 1]
    assert ranking.average_precision == 0.75 and ranking.auc == 0.625


def test_a_chart_leaves_out_what_lies_on_straight_lines_first() -> None:
    generator = np.random.default_rng(0)
    scores = generator.random(5_000)
    positive = generator.random(5_000) < 0.02 * scores
    ranking = rank_class(scores, positive)
    assert ranking is not None and len(ranking.recall) == 5_001
    thin = ranking.thinned(200)
    assert len(thin.recall) < 200 and (thin.recall[0], thin.recall[-1]) == (0, 1)
    assert np.trapezoid(thin.recall, thin.false_positive_rate) == pytest.approx(ranking.auc, abs=1e-12)
    assert (np.diff(thin.recall) * thin.precision[1:]).sum() == pytest.approx(ranking.average_precision, abs=1e-12)
    assert len(ranking.thinned(30).recall) == 30 and ranking.thinned(30).recall[-1] == 1


def test_classes_without_a_ranking_are_left_out() -> None:
    labels = np.array([0, 0, 2, 2])  # class 1 has no sample
    probabilities = np.full((4, 3), 1 / 3, np.float32)
    nothing = np.zeros(4)
    rows = Predictions(np.arange(4), labels, labels, nothing, nothing, nothing, 3, probabilities=probabilities)
    assert list(rank_classes(rows)) == [0, 2]
    assert [ranking.auc for ranking in rank_classes(rows).values()] == [0.5, 0.5]
    assert rank_class(nothing, np.zeros(4, bool)) is None and rank_class(nothing, np.ones(4, bool)) is None
    without = Predictions(np.arange(4), labels, labels, nothing, nothing, nothing, 3)
    assert rank_classes(without) == {}
