"""The pictures in a run's `figures/`: what the training and its test look like."""

from functools import partial
from pathlib import Path

import numpy as np

from lockstep.data.images import Data
from lockstep.evaluation.calibration import reliability
from lockstep.evaluation.metrics import Predictions
from lockstep.evaluation.ranking import rank_classes
from lockstep.report.augmented import EPOCHS, augmented_samples
from lockstep.report.drawing import Drawing
from lockstep.report.figures import plot_confusion_matrix, plot_curves, plot_gallery, plot_samples
from lockstep.report.predictions import class_names, pixels, worst_mistakes
from lockstep.report.ranking_figure import plot_rankings
from lockstep.report.reliability_figure import plot_reliability
from lockstep.run.folder import Run
from lockstep.run.history import read_history
from lockstep.settings.config import Config

_GALLERY = 25


def drawings_of(run: Run, predictions: Predictions, data: Data) -> list[Drawing]:
    """All that there is to show of a run and its test set, in an order that shares the work of two fairly."""
    figures = run.path / "figures"
    drawings = (
        Drawing(figures / "curves.png", partial(plot_curves, read_history(run.path))),
        _confusion(run.path, "test", predictions, data),
        _samples(figures, data),
        _rankings(run.path, "test", predictions, data),
        _mistakes(figures, predictions, data),
        _augmentation(figures, run.config, data),
    )
    return [drawing for drawing in drawings if drawing is not None]


def drawings_of_split(
    folder: Path, split: str, predictions: Predictions, data: Data, calibrations: dict[str, Predictions]
) -> list[Drawing]:
    """What a network does on a split.

    `calibrations`: predictions whose reliability is shown, a panel for each title.
    """
    plot = partial(plot_reliability, {title: reliability(rows) for title, rows in calibrations.items()})
    drawings = (
        _confusion(folder, split, predictions, data),
        _rankings(folder, split, predictions, data),
        Drawing(_figure_of(folder, "reliability", split), plot, "calibration"),
    )
    return [drawing for drawing in drawings if drawing is not None]


def drawings_of_training_set(folder: Path, config: Config, data: Data) -> list[Drawing]:
    """The first training images, and where augmentation changes them, as epochs see them."""
    drawings = (_samples(folder, data), _augmentation(folder, config, data))
    return [drawing for drawing in drawings if drawing is not None]


def _figure_of(folder: Path, name: str, split: str) -> Path:
    return folder / "figures" / (f"{name}.png" if split == "test" else f"{name}_{split}.png")


def _confusion(folder: Path, split: str, predictions: Predictions, data: Data) -> Drawing:
    plot = partial(plot_confusion_matrix, predictions.confusion, class_names(data))
    return Drawing(_figure_of(folder, "confusion_matrix", split), plot, "confusion matrix")


def _rankings(folder: Path, split: str, predictions: Predictions, data: Data) -> Drawing | None:
    rankings = rank_classes(predictions)
    if not rankings:
        return None
    plot = partial(plot_rankings, rankings, class_names(data))
    return Drawing(_figure_of(folder, "pr_roc", split), plot, "precision, recall and ROC")


def _samples(folder: Path, data: Data) -> Drawing:
    names, first = class_names(data), np.arange(min(_GALLERY, len(data.train)))
    titles = [names[max(label, 0)] for label in data.train.labels[: len(first)].tolist()]
    return Drawing(folder / "samples.png", partial(plot_samples, pixels(data.train, first), titles))


def _augmentation(folder: Path, config: Config, data: Data) -> Drawing | None:
    samples, names = augmented_samples(config, data), class_names(data)
    if not samples:
        return None
    rows = [(names[int(data.train.labels[index])], images) for index, images in samples.items()]
    titles = ["as it is", *(f"epoch {epoch}" for epoch in range(1, 1 + EPOCHS))]
    return Drawing(folder / "augmentation.png", partial(plot_gallery, rows, titles))


def _mistakes(folder: Path, predictions: Predictions, data: Data) -> Drawing | None:
    worst, names = worst_mistakes(predictions, _GALLERY), class_names(data)
    if not len(worst):
        return None
    titles = [f"{names[predictions.labels[i]]},\ntaken for {names[predictions.predicted[i]]}" for i in worst]
    images = pixels(data.test, predictions.samples[worst])
    return Drawing(folder / "mistakes.png", partial(plot_samples, images, titles))
