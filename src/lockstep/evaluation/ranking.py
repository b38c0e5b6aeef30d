"""How well the probability of a class ranks its samples before all others: precision-recall and ROC curves."""

from dataclasses import dataclass, replace

import numpy as np

from lockstep.evaluation.metrics import Predictions

_POINTS = 400


@dataclass(frozen=True, eq=False)
class Ranking:
    """One class against the rest, a point per distinct probability, (K + 1,) each, from no sample taken to all.

    The definitions are scikit-learn's (average precision without interpolation, area under the ROC by trapezoids);
    importing that takes longer than all of this for a hundred classes.
    """

    recall: np.ndarray
    """Share of the class's samples that are taken, which the ROC calls the true positive rate"""
    precision: np.ndarray
    """Share of the class's among those taken; 1 where none is"""
    false_positive_rate: np.ndarray
    """Share of the other samples that are taken"""
    average_precision: float
    """Mean of the precision over the recall"""
    auc: float
    """Area under the ROC: the probability that a sample of the class ranks before another"""

    def thinned(self, most: int) -> "Ranking":
        """At most so many of its points, for a chart, both ends among them.

        Those amid samples of other classes go first: straight lines of both charts lead through them.
        """
        same = np.diff(self.recall) == 0
        corners = np.flatnonzero(~np.concatenate([[False], same[:-1] & same[1:], [False]]))
        kept = corners[np.unique(np.linspace(0, len(corners) - 1, most).round().astype(int))]
        return replace(
            self,
            recall=self.recall[kept],
            precision=self.precision[kept],
            false_positive_rate=self.false_positive_rate[kept],
        )


def rank_class(scores: np.ndarray, positive: np.ndarray) -> Ranking | None:
    """The ranking by scores (N,) of the samples that are `positive`, bool (N,); None if all or none of them are."""
    total = int(positive.sum())
    if total in (0, len(positive)):
        return None
    order = np.argsort(-scores, kind="stable")
    last_of_ties = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    hits = np.concatenate([[0], np.cumsum(positive[order])[last_of_ties]])
    taken = np.concatenate([[0], last_of_ties + 1])
    precision = np.divide(hits, taken, out=np.ones(len(hits)), where=taken > 0)
    recall, others = hits / total, (taken - hits) / (len(positive) - total)
    average_precision = float((np.diff(recall) * precision[1:]).sum())
    return Ranking(recall, precision, others, average_precision, float(np.trapezoid(recall, others)))


def rank_classes(predictions: Predictions) -> dict[int, Ranking]:
    """The ranking of each class that has samples and is not alone, by its number; none without probabilities.

    Thinned to 400 points: whole ones are six times the probabilities.
    """
    probabilities, labels = predictions.probabilities, predictions.labels
    if probabilities is None or not np.isfinite(probabilities).all():
        return {}
    ranked = ((number, rank_class(column, labels == number)) for number, column in enumerate(probabilities.T))
    return {number: ranking.thinned(_POINTS) for number, ranking in ranked if ranking is not None}


def weakest(rankings: dict[int, Ranking], most: int) -> dict[int, Ranking]:
    """Those of the lowest average precision, lowest first, at most `most`."""
    return dict(sorted(rankings.items(), key=lambda item: item[1].average_precision)[:most])
