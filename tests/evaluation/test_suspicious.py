"""Labels that a network contradicts with confidence: by hand, and of digits whose labels were made wrong."""

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict

from lockstep.evaluation.metrics import Predictions
from lockstep.evaluation.suspicious import suspicious_labels


def predictions(probabilities: np.ndarray, labels: np.ndarray) -> Predictions:
    rows, predicted = np.arange(len(labels)), probabilities.argmax(1)
    losses = -np.log(probabilities[rows, labels])
    return Predictions(rows, labels, predicted, probabilities.max(1), losses, rows, probabilities.shape[1])


def test_a_class_is_as_sure_as_it_usually_is() -> None:
    """Usual is (0.9 + 0.7 + 0.05) / 3 = 0.55 for class 0, (0.8 + 0.45 + 0.4 + 0.05) / 4 = 0.425 for class 1."""
    chances = [[0.9, 0.05, 0.05], [0.7, 0.2, 0.1], [0.05, 0.9, 0.05], [0.2, 0.8, 0.0], [0.5, 0.45, 0.05]]
    rows = predictions(np.array([*chances, [0.6, 0.4, 0.0], [0.05, 0.05, 0.9]]), np.array([0, 0, 0, 1, 1, 1, 1]))
    # The fifth is less sure of 0 than is usual; of a class that no label has nothing is usual.
    assert suspicious_labels(rows).tolist() == [2, 5]
    nan = predictions(np.full((4, 2), np.nan), np.array([0, 1, 0, 1]))
    assert suspicious_labels(nan).tolist() == []


@pytest.mark.filterwarnings("ignore:lbfgs failed")
def test_wrong_labels_of_digits_are_found() -> None:
    images, labels = load_digits(return_X_y=True)
    random, labels = np.random.default_rng(0), labels.copy()
    wrong = random.choice(len(labels), len(labels) // 20, replace=False)
    labels[wrong] = (labels[wrong] + random.integers(1, 10, len(wrong))) % 10
    model = LogisticRegression(C=0.01, max_iter=60)
    probabilities = cross_val_predict(model, images / 16 * 4, labels, cv=2, method="predict_proba")
    found = suspicious_labels(predictions(np.maximum(probabilities, 1e-12), labels))
    hits = np.isin(found, wrong)
    assert hits.mean() > 0.8 and hits.sum() > 0.6 * len(wrong) and hits[:40].mean() > 0.95
