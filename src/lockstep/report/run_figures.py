"""The pictures in a run's `figures/`: what the training and its test look like."""

from pathlib import Path

import numpy as np

from lockstep.data.images import Data
from lockstep.evaluation.calibration import reliability
from lockstep.evaluation.metrics import Predictions
from lockstep.evaluation.ranking import rank_classes
from lockstep.report.augmented import EPOCHS, augmented_samples
from lockstep.report.figures import plot_confusion_matrix, plot_curves, plot_gallery, plot_samples
from lockstep.report.predictions import class_names, pixels, worst_mistakes
from lockstep.report.ranking_figure import plot_rankings
from lockstep.report.reliability_figure import plot_reliability
from lockstep.run.folder import Run
from lockstep.run.history import read_history
from lockstep.settings.config import Config

_GALLERY = 25


def draw_figures(run: Run, predictions: Predictions, data: Data) -> dict[str, Path]:
    """Draw all that there is to show of a run and its test set; returns the pictures by name."""
    curves = run.path / "figures" / "curves.png"
    plot_curves(read_history(run.path), curves)
    drawn = {
        "curves": curves,
        "confusion_matrix": draw_confusion(run.path, "test", predictions, data),
        "pr_roc": draw_rankings(run.path, "test", predictions, data),
        "samples": draw_samples(run.path / "figures", data),
        "augmentation": draw_augmentation(run.path / "figures", run.config, data),
        "mistakes": _draw_mistakes(run, predictions, data),
    }
    return {name: path for name, path in drawn.items() if path is not None}


def draw_confusion(folder: Path, split: str, predictions: Predictions, data: Data) -> Path:
    """Draw the confusion matrix of a split; returns the picture's path."""
    path = folder / "figures" / ("confusion_matrix.png" if split == "test" else f"confusion_matrix_{split}.png")
    plot_confusion_matrix(predictions.confusion, class_names(data), path)
    return path


def draw_rankings(folder: Path, split: str, predictions: Predictions, data: Data) -> Path | None:
    """Draw precision-recall and ROC curves of a split; returns the picture's path, None if no class can be ranked."""
    rankings = rank_classes(predictions)
    if not rankings:
        return None
    path = folder / "figures" / ("pr_roc.png" if split == "test" else f"pr_roc_{split}.png")
    plot_rankings(rankings, class_names(data), path)
    return path


def draw_reliability(folder: Path, split: str, shown: dict[str, Predictions]) -> Path:
    """Draw accuracy over confidence of a split, a panel for each title; returns the picture's path."""
    path = folder / "figures" / ("reliability.png" if split == "test" else f"reliability_{split}.png")
    plot_reliability({title: reliability(rows) for title, rows in shown.items()}, path)
    return path


def draw_samples(folder: Path, data: Data) -> Path:
    """Draw the first training images; returns the picture's path."""
    path, names = folder / "samples.png", class_names(data)
    first = np.arange(min(_GALLERY, len(data.train)))
    labels = data.train.labels[: len(first)].tolist()
    plot_samples(pixels(data.train, first), [names[max(label, 0)] for label in labels], path)
    return path


def draw_augmentation(folder: Path, config: Config, data: Data) -> Path | None:
    """Draw training images as epochs see them; returns the picture's path, None where augmentation changes nothing."""
    samples = augmented_samples(config, data)
    if not samples:
        return None
    path, names = folder / "augmentation.png", class_names(data)
    rows = [(names[int(data.train.labels[index])], images) for index, images in samples.items()]
    plot_gallery(rows, ["as it is", *(f"epoch {epoch}" for epoch in range(1, 1 + EPOCHS))], path)
    return path


def _draw_mistakes(run: Run, predictions: Predictions, data: Data) -> Path | None:
    worst, names = worst_mistakes(predictions, _GALLERY), class_names(data)
    if not len(worst):
        return None
    path = run.path / "figures" / "mistakes.png"
    titles = [f"{names[predictions.labels[i]]},\ntaken for {names[predictions.predicted[i]]}" for i in worst]
    plot_samples(pixels(data.test, predictions.samples[worst]), titles, path)
    return path
