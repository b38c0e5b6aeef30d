"""What is left of an evaluation: the printed result, the table of predictions, pictures, and a copy in W&B."""

from dataclasses import dataclass
from pathlib import Path

from lockstep.data.images import Data, ImageSet
from lockstep.evaluation.metrics import Predictions
from lockstep.report.exhibits import results
from lockstep.report.predictions import class_table, write_predictions
from lockstep.report.run_figures import draw_confusion, draw_rankings
from lockstep.report.summary import not_fatal
from lockstep.settings.config import Config


@dataclass(frozen=True, eq=False)
class Evaluated:
    """What was evaluated, and what came of it."""

    config: Config
    folder: Path
    """Where results go"""
    checkpoint: Path
    split: str
    images: ImageSet
    data: Data
    predictions: Predictions


def report_evaluation(e: Evaluated, how: str) -> None:
    """Print and write everything; `how`: precision and processes, in words. For the main process."""
    rows = e.predictions
    print(f"{e.checkpoint}, {e.split} split: {len(rows.samples)} samples, {how}")
    print(f"accuracy {rows.accuracy!r} ({rows.accuracy:.2%})  loss {rows.loss!r}")
    print(class_table(rows, e.data))
    print(f"predictions: {write_predictions(e.folder, e.split, rows, e.images, e.data)}")
    print(f"confusion matrix: {draw_confusion(e.folder, e.split, rows, e.data)}")
    if curves := draw_rankings(e.folder, e.split, rows, e.data):
        print(f"precision, recall and ROC: {curves}")
    if e.config.log.wandb != "disabled":
        with not_fatal("W&B has no copy of this evaluation"):
            _copy_to_wandb(e)


def _copy_to_wandb(e: Evaluated) -> None:
    from lockstep.run.wandb import Wandb, open_evaluation

    weights = e.checkpoint.resolve().stem
    run = open_evaluation(e.config, e.folder, f"{weights}-{e.split}", print)
    if run is None:
        return
    copy = Wandb(run)
    number = weights.removeprefix("step_")
    step = int(number) if number.isdecimal() else 0
    copy.scalars(step, {}, {f"{e.split}/{key}": value for key, value in e.predictions.headline().items()})
    for name, item in results(e.predictions, e.images, e.data).items():
        copy.exhibit(step, name, item())
    copy.close({"checkpoint": str(e.checkpoint), "split": e.split}, 0)
