"""What the copies of a run show beside its curves: layers, predictions, mistakes, samples, and the files they keep."""

from collections.abc import Callable, Sequence

import numpy as np
from torch import nn

from lockstep.data.images import Data, ImageSet
from lockstep.evaluation.metrics import Predictions
from lockstep.evaluation.ranking import Ranking, rank_classes, weakest
from lockstep.models.summary import layer_rows
from lockstep.report.augmented import EPOCHS, augmented_samples
from lockstep.report.predictions import class_names, pixels, worst_mistakes
from lockstep.run.exhibit import Artifact, Confusion, Exhibit, Gallery, Scores, Table
from lockstep.run.folder import Run
from lockstep.run.tracker import Tracker
from lockstep.settings.config import Config

_GALLERY = 25
_MOST_ROWS = 10_000
"""What W&B shows of a table"""
_MOST_CURVES = 12
_MOST_CLASSES = 100
"""W&B's own chart of a confusion matrix has a row for each pair of classes"""


def layer_table(model: nn.Module) -> Table:
    """A row per layer of the network."""
    return Table(("layer", "type", "weight", "parameters"), layer_rows(model))


def prediction_table(predictions: Predictions, images: ImageSet, names: Sequence[str]) -> Table:
    """A row per sample, those with the highest losses first, at most 10,000."""
    rows = np.argsort(-predictions.losses, kind="stable")[:_MOST_ROWS]
    columns = (
        images.rows[predictions.samples[rows]].tolist(),
        [names[label] for label in predictions.labels[rows]],
        [names[label] for label in predictions.predicted[rows]],
        predictions.confidences[rows].tolist(),
        predictions.losses[rows].tolist(),
    )
    return Table(("sample", "label", "prediction", "confidence", "loss"), list(zip(*columns, strict=True)))


def class_scores(predictions: Predictions, rankings: dict[int, Ranking], names: Sequence[str]) -> Scores:
    """Of the classes that rank worst, at most 12."""
    assert predictions.probabilities is not None
    shown = {number: names[number] for number in weakest(rankings, _MOST_CURVES)}
    return Scores(predictions.labels, predictions.probabilities, shown)


def sample_gallery(data: Data) -> Gallery:
    """The first training images."""
    first, names = np.arange(min(_GALLERY, len(data.train))), class_names(data)
    return Gallery(pixels(data.train, first), [names[max(int(label), 0)] for label in data.train.labels[: len(first)]])


def augmentation_gallery(config: Config, data: Data) -> Gallery | None:
    """The first training images as they are, and as the first epochs see them; None if these are the same."""
    samples, names = augmented_samples(config, data), class_names(data)
    if not samples:
        return None
    when = ["as it is", *(f"epoch {epoch}" for epoch in range(1, 1 + EPOCHS))]
    captions = [f"{names[int(data.train.labels[index])]}, {time}" for index in samples for time in when]
    return Gallery(np.concatenate(list(samples.values())), captions)


def mistake_gallery(predictions: Predictions, images: ImageSet, names: Sequence[str]) -> Gallery:
    """The wrong predictions with the highest losses."""
    worst = worst_mistakes(predictions, _GALLERY)
    rows = zip(predictions.labels[worst], predictions.predicted[worst], predictions.losses[worst], strict=True)
    captions = [f"{names[label]}, taken for {names[taken]} (loss {loss:.2f})" for label, taken, loss in rows]
    return Gallery(pixels(images, predictions.samples[worst]), captions)


def results(predictions: Predictions, images: ImageSet, data: Data) -> dict[str, Callable[[], Exhibit]]:
    """What a network does on a set, by name, each built when it is asked for."""
    names = class_names(data)
    shown: dict[str, Callable[[], Exhibit]] = {}
    if len(names) <= _MOST_CLASSES:
        shown["confusion"] = lambda: Confusion(predictions.labels, predictions.predicted, names)
    if rankings := rank_classes(predictions):
        shown["pr_curves"] = lambda: class_scores(predictions, rankings, names)
    shown["predictions"] = lambda: prediction_table(predictions, images, names)
    if (predictions.predicted != predictions.labels).any():
        shown["mistake_gallery"] = lambda: mistake_gallery(predictions, images, names)
    return shown


def show_results(tracker: Tracker, config: Config, predictions: Predictions, data: Data) -> None:
    """Show what the best checkpoint does on the test set, and what the training set looks like."""
    for name, build in results(predictions, data.test, data).items():
        tracker.exhibit(name, build)
    tracker.exhibit("sample_gallery", lambda: sample_gallery(data))
    tracker.exhibit("augmentation_gallery", lambda: augmentation_gallery(config, data))


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
