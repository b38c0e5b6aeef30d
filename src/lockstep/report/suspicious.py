"""The labels that a network contradicts with confidence: a table, and the images of the worst."""

import csv
import io
from pathlib import Path

import numpy as np

from lockstep.data.images import Data, ImageSet
from lockstep.evaluation.metrics import Predictions
from lockstep.evaluation.suspicious import suspicious_labels
from lockstep.files import replace_file
from lockstep.report.figures import plot_samples
from lockstep.report.predictions import class_names, pixels

_GALLERY = 25


def report_suspicious(folder: Path, split: str, rows: Predictions, images: ImageSet, data: Data) -> str:
    """Write `suspicious_labels_<split>.csv`, a row per sample, worst first, and the picture; says so in a line.

    Columns: sample and image as in `predictions_<split>.parquet`, label, its probability, prediction, its probability.
    """
    found, names = suspicious_labels(rows), class_names(data)
    sources = images.rows[rows.samples[found]].tolist()
    path = folder / f"suspicious_labels_{split}.csv"
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["sample", "image", "label", "label_probability", "prediction", "confidence"])
    for row, source in zip(found, sources, strict=True):
        label, of_label = names[rows.labels[row]], f"{np.exp(-rows.losses[row]):.6f}"
        prediction, confidence = names[rows.predicted[row]], f"{rows.confidences[row]:.6f}"
        table.writerow([source, images.split.where(source), label, of_label, prediction, confidence])
    replace_file(path, text.getvalue().encode(errors="replace"))
    told = f"labels that look wrong: {len(found)} of {len(rows.samples)}"
    picture = folder / "figures" / ("suspicious_labels.png" if split == "test" else f"suspicious_labels_{split}.png")
    picture.unlink(missing_ok=True)  # of an earlier checkpoint
    if not len(found):
        return told
    shown = found[:_GALLERY]
    titles = [f"{names[rows.labels[i]]}?\n{names[rows.predicted[i]]} {rows.confidences[i]:.1%}" for i in shown]
    plot_samples(pixels(images, rows.samples[shown]), titles, picture)
    return f"{told}: {path}, {picture}"
