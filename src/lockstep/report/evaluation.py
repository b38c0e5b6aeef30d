"""What is left of an evaluation: the printed result, metrics and predictions as files, pictures, and a copy in W&B."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lockstep.data.images import Data, ImageSet
from lockstep.errors import print_line
from lockstep.evaluation.calibration import at_temperature
from lockstep.evaluation.metrics import Predictions
from lockstep.evaluation.scores import mean_scores, scores
from lockstep.files import write_json
from lockstep.report.drawing import drawn_beside
from lockstep.report.exhibits import results
from lockstep.report.predictions import class_names, class_table, write_predictions
from lockstep.report.run_figures import drawings_of_split
from lockstep.report.summary import not_fatal
from lockstep.report.suspicious import report_suspicious
from lockstep.settings.config import Config


@dataclass(eq=False)
class Evaluated:
    """What was evaluated, and what came of it."""

    config: Config
    folder: Path
    """Where results go"""
    checkpoint: Path | None
    """None: the weights that the settings name"""
    split: str
    images: ImageSet
    data: Data
    predictions: Predictions
    temperature: tuple[float, str] | None = None
    """What logits are divided by, and where it comes from, in words"""

    @property
    def weights(self) -> str:
        """Which ones, for a reader."""
        model = self.config.model
        return str(self.checkpoint or f"{model.name} with {model.checkpoint or 'published weights'}")

    @cached_property
    def calibrated(self) -> Predictions | None:
        """The predictions at that temperature."""
        return None if self.temperature is None else at_temperature(self.predictions, self.temperature[0])


def report_evaluation(e: Evaluated, how: str) -> None:
    """Print and write everything; `how`: precision and processes, in words. For the main process."""
    rows = e.predictions
    print_line(f"{e.weights}, {e.split} split of {e.config.data.source}: {len(rows.samples)} samples, {how}")
    print_line(f"accuracy {rows.accuracy!r} ({rows.accuracy:.2%})  loss {rows.loss!r}")
    print_line(class_table(rows, e.data))
    metrics = metrics_of(e)
    print_line(describe_scores(metrics))
    write_json(e.folder / f"metrics_{e.split}.json", {**metrics, "how": how})
    print_line(f"metrics: {e.folder / f'metrics_{e.split}.json'}")
    print_line(f"predictions: {write_predictions(e.folder, e.split, rows, e.images, e.data)}")
    with drawn_beside(drawings_of_split(e.folder, e.split, rows, e.data, _calibrations(e))) as finished:
        print_line(report_suspicious(e.folder, e.split, rows, e.images, e.data))
        for drawing in finished:
            print_line(f"{drawing.title}: {drawing.path}")
    if e.config.log.wandb != "disabled":
        with not_fatal("W&B has no copy of this evaluation"):
            _copy_to_wandb(e, metrics["metrics"])


def metrics_of(e: Evaluated) -> dict[str, Any]:
    """All numbers of an evaluation, as metrics_<split>.json has them; None is what needs probabilities not kept."""
    rows = e.predictions
    per_class = {name: column.tolist() for name, column in rows.per_class().items()}
    columns = {"class": class_names(e.data), **per_class}
    found: dict[str, Any] = {
        "checkpoint": e.weights if e.checkpoint is None else str(e.checkpoint.resolve()),
        "data": e.config.data.source,
        "split": e.split,
        "samples": len(rows.samples),
        "metrics": {**rows.headline(), **scores(rows)},
        "means": mean_scores(rows),
        "classes": [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)],
    }
    if e.temperature is not None and e.calibrated is not None:
        found["temperature"] = dict(zip(("value", "from"), e.temperature, strict=True))
        found["calibrated"] = {"loss": e.calibrated.loss, **scores(e.calibrated, _CALIBRATED)}
    return found


def describe_scores(metrics: dict[str, Any]) -> str:
    """Lines with the numbers that are of all classes together."""
    found = metrics["metrics"]
    interval = f"{found['accuracy_low']:.2%} to {found['accuracy_high']:.2%}"
    others = {name: value for name, value in found.items() if name not in _TOLD and value is not None}
    lines = [f"accuracy, 95 % interval: {interval} (bootstrap over the samples)"]
    lines += ["  ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in others.items())]
    if missing := [name.replace("_", " ") for name, value in found.items() if value is None]:
        lines += [f"not computed: {', '.join(missing)}, for the probabilities of all classes take more than 1 GiB"]
    if "temperature" in metrics:
        changes = (f"{name} {found[name]:.4f} -> {after:.4f}" for name, after in metrics["calibrated"].items())
        lines += [f"temperature {metrics['temperature']['value']:.4f} ({metrics['temperature']['from']}): "]
        lines[-1] += "  ".join(changes).replace("_", " ")
    return "\n".join(lines)


def _calibrations(e: Evaluated) -> dict[str, Predictions]:
    shown = {"As trained": e.predictions}
    if e.temperature is not None and e.calibrated is not None:
        shown[f"At temperature {e.temperature[0]:.4g}"] = e.calibrated
    return shown


_CALIBRATED = ("calibration_error", "brier")
"""What a temperature changes beside the loss: accuracy stays, and ranks hardly move"""
_TOLD = ("accuracy", "loss", "accuracy_low", "accuracy_high", "skipped_images")


def _copy_to_wandb(e: Evaluated, metrics: dict[str, float | None]) -> None:
    from lockstep.run.wandb import Wandb, open_evaluation

    weights = "published" if e.checkpoint is None else e.checkpoint.resolve().stem
    run = open_evaluation(e.config, e.folder, f"{weights}-{e.split}", print)
    if run is None:
        return
    copy = Wandb(run)
    number = weights.removeprefix("step_")
    step = int(number) if number.isdecimal() else 0
    copy.scalars(step, {}, {f"{e.split}/{key}": value for key, value in metrics.items() if value is not None})
    for name, item in results(e.predictions, e.images, e.data).items():
        copy.exhibit(step, name, item())
    copy.close({"checkpoint": e.weights, "split": e.split}, 0)
