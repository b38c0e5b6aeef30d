"""What the copies of a run show beside its curves: layers, predictions, mistakes, samples, and the files they keep."""

import numpy as np
from torch import nn

from lockstep.data.images import Data
from lockstep.evaluation.metrics import Predictions
from lockstep.models.summary import layer_rows
from lockstep.report.predictions import class_names, pixels, worst_mistakes
from lockstep.run.exhibit import Artifact, Confusion, Gallery, Table
from lockstep.run.folder import Run
from lockstep.run.tracker import Tracker

_GALLERY = 25
_MOST_ROWS = 10_000
"""What W&B shows of a table"""
_MOST_CLASSES = 100
"""W&B's own chart of a confusion matrix has a row for each pair of classes"""


def layer_table(model: nn.Module) -> Table:
    """A row per layer of the network."""
    return Table(("layer", "type", "weight", "parameters"), layer_rows(model))


def prediction_table(predictions: Predictions, data: Data) -> Table:
    """A row per test sample, those with the highest losses first, at most 10,000."""
    names = class_names(data)
    rows = np.argsort(-predictions.losses, kind="stable")[:_MOST_ROWS]
    columns = (
        data.test.rows[predictions.samples[rows]].tolist(),
        [names[label] for label in predictions.labels[rows]],
        [names[label] for label in predictions.predicted[rows]],
        predictions.confidences[rows].tolist(),
        predictions.losses[rows].tolist(),
    )
    return Table(("sample", "label", "prediction", "confidence", "loss"), list(zip(*columns, strict=True)))


def sample_gallery(data: Data) -> Gallery:
    """The first training images."""
    first, names = np.arange(min(_GALLERY, len(data.train))), class_names(data)
    return Gallery(pixels(data.train, first), [names[max(int(label), 0)] for label in data.train.labels[: len(first)]])


def mistake_gallery(predictions: Predictions, data: Data) -> Gallery:
    """The wrong predictions with the highest losses."""
    worst, names = worst_mistakes(predictions, _GALLERY), class_names(data)
    rows = zip(predictions.labels[worst], predictions.predicted[worst], predictions.losses[worst], strict=True)
    captions = [f"{names[label]}, taken for {names[taken]} (loss {loss:.2f})" for label, taken, loss in rows]
    return Gallery(pixels(data.test, predictions.samples[worst]), captions)


def show_results(tracker: Tracker, predictions: Predictions, data: Data) -> None:
    """Show what the best checkpoint does on the test set."""
    names = class_names(data)
    if len(names) <= _MOST_CLASSES:
        tracker.exhibit("confusion", lambda: Confusion(predictions.labels, predictions.predicted, names))
    tracker.exhibit("predictions", lambda: prediction_table(predictions, data))
    tracker.exhibit("sample_gallery", lambda: sample_gallery(data))
    if (predictions.predicted != predictions.labels).any():
        tracker.exhibit("mistake_gallery", lambda: mistake_gallery(predictions, data))


def share_files(run: Run, tracker: Tracker) -> None:
    """Hand over the weights of the last and the best checkpoint, and a split that was drawn here."""
    aliases: dict[str, list[str]] = {}
    for alias in ("last", "best"):
        aliases.setdefault((run.checkpoints / alias).resolve().name, []).append(alias)
    for step, names in aliases.items():
        paths = [run.checkpoints / step / file for file in ("model.safetensors", "ema.safetensors", "config.yaml")]
        files = [path for path in paths if path.is_file()]
        tracker.exhibit("model", lambda files=files, names=names: Artifact("model", files, names))  # type: ignore[misc]
    if (split := run.path / "split.json").is_file():
        tracker.exhibit("split", lambda: Artifact("dataset", [split], []))
