"""Metrics: functions of what a network predicted for every sample of a set."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a network does on a set: one row per sample, by sample index; samples of skipped images are left out."""

    samples: np.ndarray
    """Indices into the set, int64 (N,)"""
    labels: np.ndarray
    predicted: np.ndarray
    """Class of the highest probability, int64 (N,)"""
    confidences: np.ndarray
    """Probability of the predicted class, (N,)"""
    losses: np.ndarray
    """Cross-entropy, (N,)"""
    better: np.ndarray
    """How many other classes were given at least the probability of the label, (N,)"""
    num_classes: int
    skipped: int = 0
    """Samples of the set without an image"""
    probabilities: np.ndarray | None = None
    """Of all classes, float32 (N, classes); None where they were not kept"""

    @property
    def loss(self) -> float:
        """Mean cross-entropy."""
        return _loss(self)

    @property
    def accuracy(self) -> float:
        """Share of samples whose label was predicted."""
        return _accuracy(self)

    def headline(self) -> dict[str, float]:
        """Every metric of METRICS that says something about so many classes; skipped_images if there were any."""
        metrics = {
            name: metric.compute(self) for name, metric in METRICS.items() if self.num_classes >= metric.least_classes
        }
        return {**metrics, "skipped_images": self.skipped} if self.skipped else metrics

    @property
    def confusion(self) -> np.ndarray:
        """Counts (classes, classes): row is the label, column the prediction."""
        pairs = np.bincount(self.labels * self.num_classes + self.predicted, minlength=self.num_classes**2)
        return pairs.reshape(self.num_classes, self.num_classes)

    def per_class(self) -> dict[str, np.ndarray]:
        """precision, recall, f1 and support of each class, (classes,); 0 where a class was never predicted or seen."""
        confusion = self.confusion
        hits = np.diag(confusion).astype(float)
        predicted, support = confusion.sum(0), confusion.sum(1)
        precision = np.divide(hits, predicted, out=np.zeros_like(hits), where=predicted > 0)
        recall = np.divide(hits, support, out=np.zeros_like(hits), where=support > 0)
        total = precision + recall
        f1 = np.divide(2 * precision * recall, total, out=np.zeros_like(hits), where=total > 0)
        return {"precision": precision, "recall": recall, "f1": f1, "support": support}


def _loss(rows: Predictions) -> float:
    return float(rows.losses.mean())


def _accuracy(rows: Predictions) -> float:
    return float((rows.predicted == rows.labels).mean())


def _top5_accuracy(rows: Predictions) -> float:
    return float((rows.better < 5).mean())


class Metric(NamedTuple):
    """A number for all rows together, and the number of classes from which on it says something."""

    compute: Callable[[Predictions], float]
    least_classes: int = 2


METRICS = {
    "loss": Metric(_loss),
    "accuracy": Metric(_accuracy),
    "top5_accuracy": Metric(_top5_accuracy, least_classes=11),
}
"""What every validation and test line of metrics.jsonl holds"""
