"""The lines of metrics.jsonl, as dictionaries."""

from typing import Any

from lockstep.evaluation.metrics import Predictions
from lockstep.training.calendar import Calendar
from lockstep.training.meter import means
from lockstep.training.progress import Progress
from lockstep.training.stopwatch import Lap


def train_record(
    progress: Progress, calendar: Calendar, lr: float, grad_norm: float, digest: str, lap: Lap
) -> dict[str, Any]:
    """A training line: means since the line before, without bad steps; their number if there were any.

    `lr` and `grad_norm` are the last step's, `digest` is that of all weights after it.
    """
    bad = progress.bad_steps.since_log
    return {
        **calendar.place(progress.step),
        "split": "train",
        **means(progress.window),
        **({"bad_steps": bad} if bad else {}),
        "lr": lr,
        "grad_norm": grad_norm,
        "digest": digest,
        "images_per_second": lap.steps_per_second * calendar.batch_size,
        "data_share": lap.data_share,
    }


def val_record(progress: Progress, calendar: Calendar, predictions: Predictions) -> dict[str, Any]:
    """A validation line: the best so far, and the means of training since the validation before, beside it."""
    train = means(progress.epoch)
    return {
        **calendar.place(progress.step),
        "split": "val",
        **predictions.headline(),
        **({"best_accuracy": progress.best_accuracy} if progress.best_step else {}),
        "train_loss": train["loss"],
        "train_accuracy": train["accuracy"],
        "train_val_loss_ratio": train["loss"] / max(predictions.loss, 1e-12),
    }


def test_record(progress: Progress, calendar: Calendar, predictions: Predictions) -> dict[str, Any]:
    """The test line: the best checkpoint on the test set."""
    place = {**calendar.place(progress.step), "best_step": progress.best_step or progress.step}
    return {**place, "split": "test", **predictions.headline()}
