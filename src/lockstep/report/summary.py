"""What is left of a run when it ends: figures, summary, predictions, the printed result."""

from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn

import numpy as np

from lockstep.data.images import SKIPPED_LABEL, Data, ImageSet
from lockstep.data.sampler import Sampler
from lockstep.evaluation.evaluate import Metrics
from lockstep.launch.accelerator import Launch
from lockstep.launch.preemption import Preemption
from lockstep.report.figures import plot_confusion_matrix, plot_curves, plot_samples
from lockstep.run.folder import Run
from lockstep.run.tracker import Tracker, build_tracker, describe_environment, read_history, write_json
from lockstep.training.progress import Calendar, Progress

_GALLERY = 25


def open_tracker(run: Run, launch: Launch, sampler: Sampler, progress: Progress, calendar: Calendar) -> Tracker:
    """Make the run folder and open its logs where training goes on."""
    if launch.is_main:
        run.create(sampler.micro_batch_size)
    environment = describe_environment() | launch.as_dict(sampler.microbatches_per_step // launch.num_processes)
    tracker = build_tracker(run.config, run.path, launch.is_main, progress.step, environment)
    if progress.restarts:
        tracker.say(f"continuing {run.path} after step {progress.step}")
    tracker.start(calendar.total_steps, progress.step)
    return tracker


def report_pause(run: Run, tracker: Tracker, progress: Progress, preemption: Preemption) -> int:
    """Close a run that was asked to stop; returns the exit code."""
    summary = {"state": "preempted", "steps": progress.step, "restarts": progress.restarts}
    if tracker.is_main:
        run.write_summary(**summary)
    tracker.say(f"stopped after step {progress.step} ({preemption.reason}), saved; the same command continues")
    tracker.finish(summary)
    return preemption.leave(progress.step)


class Diverged(ValueError):
    """Too many bad steps in a row."""


def report_divergence(run: Run, tracker: Tracker, progress: Progress, sampler: Sampler) -> NoReturn:
    """Close the logs of a run whose last steps were all bad, and raise Diverged, on every process."""
    place, step = run.path / "bad_step.json", progress.step - 1
    if tracker.is_main:
        batch = sampler.microbatches(range(step, step + 1), range(sampler.microbatches_per_step))
        write_json(place, {"step": progress.step, "samples": [microbatch.samples for microbatch in batch]})
    tracker.finish({"state": "running", "bad_steps": progress.bad[2]}, exit_code=1)
    raise Diverged(
        f"{run.path} diverged: steps {step + 2 - progress.bad[1]} to {progress.step} had no finite loss or gradient "
        f"(samples of the last one: {place}); try a lower --optim.lr, --schedule.warmup_epochs or --optim.clip_norm"
    )


def report_training(
    run: Run, tracker: Tracker, progress: Progress, calendar: Calendar, metrics: Metrics, data: Data
) -> None:
    """Summary, figures and closing line of a finished training; `metrics`: the best checkpoint on the test set."""
    if not tracker.is_main:
        return
    images = progress.step * calendar.batch_size
    summary = {
        "state": "finished",
        "test_accuracy": metrics.accuracy,
        "test_loss": metrics.loss,
        "best_val_accuracy": progress.best_accuracy if progress.val_losses else None,
        "best_step": progress.best_step or progress.step,
        "steps": progress.step,
        "epochs": calendar.epoch_of(progress.step),
        "images_per_second": images / max(progress.train_seconds, 1e-9),
        "train_seconds": progress.train_seconds,
        "wall_seconds": progress.wall_seconds,
        "skipped_images": sum(
            int((part.labels == SKIPPED_LABEL).sum()) for part in (data.train, data.val, data.test) if part
        ),
        "bad_steps": progress.bad[2],
        "restarts": progress.restarts,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if run.config.log.figures:
        for name, path in draw_figures(run, metrics, data).items():
            tracker.figure(name, path)
    run.write_summary(**summary)
    tracker.say(
        f"test accuracy {metrics.accuracy:.2%}, loss {metrics.loss:.4f} (best: step {summary['best_step']}), "
        f"{summary['images_per_second']:,.0f} images/s. Everything is in {run.path}"
    )
    tracker.finish(summary)


def draw_figures(run: Run, metrics: Metrics, data: Data) -> dict[str, Path]:
    """Draw curves, confusion matrix and sample galleries into the run folder."""
    folder = run.path / "figures"
    paths = {name: folder / f"{name}.png" for name in ("curves", "confusion_matrix", "samples", "mistakes")}
    names = class_names(data)
    plot_curves(read_history(run.path), paths["curves"])
    draw_confusion(run.path, "test", metrics, data)
    first = np.arange(min(_GALLERY, len(data.train)))
    labels = data.train.labels[: len(first)].tolist()
    plot_samples(pixels(data.train, first), [names[max(label, 0)] for label in labels], paths["samples"])
    wrong = np.flatnonzero(metrics.predictions != metrics.labels)
    worst = wrong[np.argsort(-metrics.losses[wrong], kind="stable")][:_GALLERY]
    if not len(worst):
        del paths["mistakes"]
        return paths
    titles = [f"{names[metrics.labels[i]]}, taken for {names[metrics.predictions[i]]}" for i in worst]
    plot_samples(pixels(data.test, metrics.samples[worst]), titles, paths["mistakes"])
    return paths


def class_names(data: Data) -> list[str]:
    """Names of all outputs of the network, also of those that the data set does not show."""
    return [*data.classes, *(str(i) for i in range(len(data.classes), data.num_classes))]


def pixels(images: ImageSet, indices: np.ndarray) -> np.ndarray:
    """Images as the network sees them before augmentation, uint8 (N, H, W, C); black where one was skipped."""
    channels, height, width = images.shape
    blank = np.zeros((height, width, channels), np.uint8)
    loaded = (images.load(int(index)) for index in indices)
    return np.stack([blank if image is None else image.numpy() for image in loaded])


def draw_confusion(folder: Path, split: str, metrics: Metrics, data: Data) -> Path:
    """Draw the confusion matrix of a split; returns the picture's path."""
    path = folder / "figures" / ("confusion_matrix.png" if split == "test" else f"confusion_matrix_{split}.png")
    plot_confusion_matrix(metrics.confusion, class_names(data), path)
    return path


def class_table(metrics: Metrics, data: Data) -> str:
    """Precision, recall, F1 and number of samples of every class, and their means, as text."""
    names = class_names(data)
    width = max(len("macro mean"), *map(len, names))
    scores = metrics.per_class()
    lines = [f"{'class':<{width}}  precision  recall      f1  samples"]
    for name, precision, recall, f1, support in zip(names, *scores.values(), strict=True):
        lines.append(f"{name:<{width}}  {precision:9.4f}  {recall:6.4f}  {f1:6.4f}  {support:7d}")
    precision, recall, f1 = (float(scores[key].mean()) for key in ("precision", "recall", "f1"))
    lines.append(f"{'macro mean':<{width}}  {precision:9.4f}  {recall:6.4f}  {f1:6.4f}  {len(metrics.samples):7d}")
    return "\n".join(lines)


def write_predictions(folder: Path, split: str, metrics: Metrics, images: ImageSet, data: Data) -> Path:
    """One row per sample: row in the source's split, label, prediction, confidence, loss; returns the file's path."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = np.array(class_names(data))
    table = pa.table(
        {
            "sample": images.rows[metrics.samples].numpy(),
            "label": names[metrics.labels],
            "prediction": names[metrics.predictions],
            "confidence": metrics.confidences,
            "loss": metrics.losses,
        }
    )
    path = folder / f"predictions_{split}.parquet"
    pq.write_table(table, path)
    return path
