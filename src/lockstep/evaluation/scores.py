"""What a paper gives beside accuracy and loss: functions of what a network predicted for every sample of a set.

They are for the end, in eval.py, and may take seconds; METRICS (metrics.py) are those of every validation.
"""

from collections.abc import Callable, Collection
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from lockstep.evaluation.calibration import reliability
from lockstep.evaluation.chance import bootstrap_interval
from lockstep.evaluation.metrics import Predictions
from lockstep.evaluation.ranking import rank_classes


class Score(NamedTuple):
    """A number for all rows together, and whether it needs the probabilities of all classes."""

    compute: Callable[[Predictions], float]
    needs_probabilities: bool = False


def scores(rows: Predictions, names: Collection[str] | None = None) -> dict[str, float | None]:
    """Scores of SCORES, default: all; None where one needs probabilities that were not kept."""
    kept = rows.probabilities is not None
    chosen = {name: score for name, score in SCORES.items() if names is None or name in names}
    return {
        name: score.compute(rows) if kept or not score.needs_probabilities else None for name, score in chosen.items()
    }


def mean_scores(rows: Predictions) -> dict[str, dict[str, float]]:
    """Means over classes of precision, recall and f1: "macro", each class alike, and "weighted" by its samples."""
    per_class = rows.per_class()
    means: dict[str, dict[str, float]] = {"macro": {}, "weighted": {}}
    for name in ("precision", "recall", "f1"):
        means["macro"][name] = float(per_class[name].mean())
        means["weighted"][name] = float(np.average(per_class[name], weights=per_class["support"]))
    return means


def _balanced_accuracy(rows: Predictions) -> float:
    """Mean recall of the classes that have samples."""
    per_class = rows.per_class()
    return float(per_class["recall"][per_class["support"] > 0].mean())


def _accuracy_low(rows: Predictions) -> float:
    return bootstrap_interval(rows.predicted == rows.labels)[0]


def _accuracy_high(rows: Predictions) -> float:
    return bootstrap_interval(rows.predicted == rows.labels)[1]


def _calibration_error(rows: Predictions) -> float:
    return reliability(rows).error


def _brier(rows: Predictions) -> float:
    """Mean over samples of the sum over classes of (probability - 1 or 0)^2, in [0, 2]; Brier, 1950."""
    assert rows.probabilities is not None
    squares = np.einsum("nc,nc->n", rows.probabilities, rows.probabilities, dtype=float)
    true = rows.probabilities[np.arange(len(rows.labels)), rows.labels].astype(float)
    return float((squares - 2 * true + 1).mean())


def _roc_auc(rows: Predictions) -> float:
    """Mean area under the ROC, each class against the rest."""
    return _mean_areas(rows)[0]


def _mean_average_precision(rows: Predictions) -> float:
    """Mean over classes of the average precision, each class against the rest."""
    return _mean_areas(rows)[1]


@lru_cache(maxsize=1)  # two scores, one ranking
def _mean_areas(rows: Predictions) -> tuple[float, float]:
    """Of the classes that have samples and are not alone; not a number if there is none, or an output is not finite."""
    areas = [(ranking.auc, ranking.average_precision) for ranking in rank_classes(rows).values()]
    auc, precision = np.mean(areas, axis=0) if areas else (np.nan, np.nan)
    return float(auc), float(precision)


SCORES = {
    "accuracy_low": Score(_accuracy_low),
    "accuracy_high": Score(_accuracy_high),
    "balanced_accuracy": Score(_balanced_accuracy),
    "calibration_error": Score(_calibration_error),
    "brier": Score(_brier, needs_probabilities=True),
    "roc_auc": Score(_roc_auc, needs_probabilities=True),
    "mean_average_precision": Score(_mean_average_precision, needs_probabilities=True),
}
"""What eval.py prints and writes into metrics_<split>.json beside METRICS"""
