"""Labels that a network contradicts with confidence: those of them that may be wrong."""

import numpy as np

from lockstep.evaluation.metrics import Predictions


def suspicious_labels(rows: Predictions) -> np.ndarray:
    """Rows whose predicted class is another than the label and has at least its usual probability, int64, worst first.

    Usual for a class is the mean probability of it over the samples of that label; worst is where the prediction is
    furthest above the label. Confident learning, Northcutt et al., 2021 (arXiv:1911.00068), by the likeliest class
    alone. It takes a network that has not seen the labels: of those it was trained on it knows many by heart.
    """
    of_label = np.exp(-rows.losses)
    counts = np.bincount(rows.labels, minlength=rows.num_classes)
    sums = np.bincount(rows.labels, of_label, rows.num_classes)
    usual = np.divide(sums, counts, out=np.full(rows.num_classes, np.inf), where=counts > 0)
    sure = (rows.predicted != rows.labels) & (rows.confidences >= usual[rows.predicted])
    margins = rows.confidences - of_label
    (found,) = np.nonzero(sure)
    return found[np.argsort(-margins[found], kind="stable")]
