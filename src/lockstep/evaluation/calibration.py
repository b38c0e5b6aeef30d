"""Whether a network is right as often as it is confident, and the one number that its outputs can be divided by."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from lockstep.errors import UserError
from lockstep.evaluation.metrics import Predictions

BINS = 15
_COOLEST, _HOTTEST = 0.01, 100.0
_SMALLEST = float(np.finfo(np.float32).tiny)
_CHUNK = 2**22
"""Probabilities worked on at a time"""


@dataclass(frozen=True, eq=False)
class Reliability:
    """Samples by confidence, in bins of equal width that contain their upper edge; (bins,) each, 0 where none is."""

    counts: np.ndarray
    accuracy: np.ndarray
    """Share that is right"""
    confidence: np.ndarray
    """Mean"""

    @property
    def error(self) -> float:
        """Expected calibration error: the mean over samples of |accuracy - confidence| of their bin, in [0, 1].

        Guo et al., On Calibration of Modern Neural Networks, 2017.
        """
        gaps = np.abs(self.accuracy - self.confidence)
        return float((self.counts * gaps).sum() / self.counts.sum())


def reliability(rows: Predictions, bins: int = BINS) -> Reliability:
    """The samples in bins of the predicted class's probability."""
    edges = np.arange(1, bins) / bins
    numbers = np.searchsorted(edges, rows.confidences, side="left")
    counts = np.bincount(numbers, minlength=bins)
    sums = (np.bincount(numbers, of, bins) for of in (rows.predicted == rows.labels, rows.confidences))
    accuracy, confidence = (np.divide(total, counts, out=np.zeros(bins), where=counts > 0) for total in sums)
    return Reliability(counts, accuracy, confidence)


def fit_temperature(rows: Predictions) -> float:
    """The T of the least mean cross-entropy of softmax(logits / T), in [0.01, 100]; Guo et al., 2017.

    The loss is convex in 1 / T, and the root of its derivative is found in float64. Raises UserError without the
    probabilities of all classes, or where one is not finite.
    """
    from scipy.optimize import brentq

    _require_probabilities(rows)

    def slope(log_inverse: float) -> float:
        total, inverse = 0.0, math.exp(log_inverse)
        for labels, logits, _ in _chunks(rows):
            total += float((_softmax(logits * inverse) * logits).sum() - logits[np.arange(len(labels)), labels].sum())
        return total

    low, high = -math.log(_HOTTEST), -math.log(_COOLEST)
    if slope(low) >= 0:
        return _HOTTEST
    if slope(high) <= 0:
        return _COOLEST  # all are right: the surer, the better
    return math.exp(-brentq(slope, low, high, xtol=1e-9))


def at_temperature(rows: Predictions, temperature: float) -> Predictions:
    """The rows as if the network's logits had been divided by `temperature`: the same classes, other probabilities.

    Raises UserError as `fit_temperature` does.
    """
    probabilities = _require_probabilities(rows)
    changed, losses = np.empty_like(probabilities), np.empty(len(rows.labels))
    for labels, logits, part in _chunks(rows):
        exact = _softmax(logits / temperature)
        changed[part] = exact
        losses[part] = -np.log(np.maximum(exact[np.arange(len(labels)), labels], np.finfo(float).tiny))
    confidences = changed.max(1).astype(float)
    return replace(rows, confidences=confidences, losses=losses, probabilities=changed)


def _require_probabilities(rows: Predictions) -> np.ndarray:
    if rows.probabilities is None:
        raise UserError("--temperature: the probabilities of all classes would take more than 1 GiB: leave it out")
    if not np.isfinite(rows.losses).all():
        raise UserError("--temperature: the network puts out numbers that are not finite: leave it out")
    return rows.probabilities


def _chunks(rows: Predictions) -> Iterator[tuple[np.ndarray, np.ndarray, slice]]:
    """Labels (n,), logits up to a constant (n, classes), and which rows they are; float32 ends at e^-87."""
    assert rows.probabilities is not None
    size = max(1, _CHUNK // rows.num_classes)
    for start in range(0, len(rows.labels), size):
        part = slice(start, start + size)
        labels = rows.labels[part]
        logits = np.log(np.maximum(rows.probabilities[part].astype(float), _SMALLEST))
        logits[np.arange(len(labels)), labels] = -rows.losses[part]
        yield labels, logits, part


def _softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)
