"""What is left of a run when it ends: figures, summary, predictions, the printed result."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn

import torch

from lockstep.data.crop import CROP_VERSION
from lockstep.data.images import SKIPPED_LABEL, Data
from lockstep.data.loader import crops_while_decoding
from lockstep.data.sampler import Sampler
from lockstep.errors import UserError
from lockstep.evaluation.metrics import Predictions
from lockstep.evaluation.probe import Probe
from lockstep.files import write_json
from lockstep.launch.accelerator import Launch
from lockstep.launch.guards import quicker_precision
from lockstep.launch.load import node_loads
from lockstep.launch.numerics import describe_changes, describe_exactness, numerics_of
from lockstep.launch.preemption import Preemption
from lockstep.report.diagnosis import Evidence, doubt_of, write_diagnosis
from lockstep.report.drawing import drawn_beside
from lockstep.report.exhibits import share_files, show_results
from lockstep.report.run_figures import drawings_of
from lockstep.report.run_page import PAGE, write_run_page
from lockstep.run.environment import describe_environment
from lockstep.run.folder import Run
from lockstep.run.history import read_history, read_starts
from lockstep.run.inputs import write_input
from lockstep.run.tracker import Tracker, build_tracker
from lockstep.settings.config import RuntimeConfig
from lockstep.training.calendar import Calendar
from lockstep.training.progress import Progress

_logger = logging.getLogger(__name__)


def open_tracker(
    run: Run, launch: Launch, data: Data, sampler: Sampler, progress: Progress, calendar: Calendar
) -> Tracker:
    """Make the run folder, open its logs where training goes on, and say what is in force."""
    config = run.config
    if launch.is_main:
        kept = {"micro_batch_size": sampler.micro_batch_size, "threads": torch.get_num_threads(), "data": data.identity}
        run.create(**kept, **({"origin": progress.origin} if progress.origin else {}))
        write_input(run.path, data)
    crops = {"crops": CROP_VERSION} if crops_while_decoding(data.train, config.augment) else {}
    changes, numerics = changed_numerics(run.path, config.runtime, launch, crops), numerics_of(config.runtime, launch)
    environment = (
        describe_environment()
        | launch.as_dict(sampler.microbatches_per_step)
        | {"step": progress.step, "numerics": numerics | crops}
    )
    tracker = build_tracker(config, run.path, launch.is_main, progress.step, environment)
    _say_where_it_goes_on(tracker, run, progress, changes)
    tracker.say(f"{run.path}: {launch.describe(config.train.batch_size, sampler.micro_batch_size)}")
    if advice := quicker_precision(config.runtime, launch.precision, launch.device.type == "cpu"):
        tracker.say(f"note: {advice}")
    if note := describe_exactness(config.runtime, launch):
        tracker.say(note)
    if config.train.micro_batch_size is None and progress.step == 0:
        tracker.say(
            f"note: this result belongs to {launch.num_processes} process{'es' * (launch.num_processes > 1)}, because "
            f"--train.micro_batch_size is left open (now {sampler.micro_batch_size}); set it to launch any number"
        )
    if config.optim.lr_scaling != "none":
        tracker.say(
            f"learning rate {config.lr:g}: --optim.lr={config.optim.lr:g}, scaled ({config.optim.lr_scaling}) from a "
            f"batch of {config.optim.lr_base_batch_size} to {config.train.batch_size}"
        )
    if config.log.all_nodes:
        node_loads(launch)  # the first answer of a process means nothing
    tracker.start(calendar.total_steps, progress.step)
    return tracker


def _say_where_it_goes_on(tracker: Tracker, run: Run, progress: Progress, changes: str) -> None:
    if run.old_epochs is not None:
        tracker.say(f"{run.path} is made longer: from {run.old_epochs} to {run.config.train.epochs} epochs")
    if progress.restarts:
        tracker.say(f"continuing {run.path} after step {progress.step}")
        if changes:
            tracker.say(f"note: from here on bits may differ from those of an unbroken run: {changes}")
    elif run.summary:
        tracker.say(f"{run.path} was begun before and has no checkpoint: from the beginning")


def changed_numerics(run_dir: Path, config: RuntimeConfig, launch: Launch, crops: dict[str, int] | None = None) -> str:
    """In what the numerics of now differ from those of the run's last start; empty if in nothing, or if it has none.

    `crops`: the rule of random crops of streamed images; None, where no data are open: that of now, if it had one.
    """
    if not (starts := read_starts(run_dir)):
        return ""
    before = starts[-1].get("numerics", {})
    if crops is None:
        crops = {"crops": CROP_VERSION} if "crops" in before else {}
    return describe_changes(before, numerics_of(config, launch) | crops)


def report_pause(run: Run, tracker: Tracker, progress: Progress, calendar: Calendar, preemption: Preemption) -> int:
    """Close a run that was asked to stop; returns the exit code."""
    summary = {
        "state": "preempted",
        "steps": progress.step,
        "epochs": calendar.epoch_of(progress.step),
        "best_val_accuracy": progress.best_accuracy if progress.best_step else None,
        **_times(progress),
    }
    if tracker.is_main:
        run.write_summary(**summary)
    told = f"stopped after step {progress.step} ({preemption.cause}), saved; the same command continues"
    tracker.say(told)
    tracker.alert(f"{run.path.name} was stopped", told)
    tracker.finish(summary)
    return preemption.leave(progress.step)


def _times(progress: Progress) -> dict[str, float]:
    return {
        "train_seconds": progress.train_seconds,
        "wall_seconds": progress.wall_seconds,
        "restarts": progress.restarts,
    }


class Diverged(UserError):
    """Too many bad steps in a row."""


def report_divergence(run: Run, tracker: Tracker, progress: Progress, sampler: Sampler) -> NoReturn:
    """Close the logs of a run whose last steps were all bad, and raise Diverged, on every process."""
    place, step = run.path / "bad_step.json", progress.step - 1
    if tracker.is_main:
        batch = sampler.microbatches(range(step, step + 1), range(sampler.microbatches_per_step))
        write_json(place, {"step": progress.step, "samples": [microbatch.samples for microbatch in batch]})
    bad = progress.bad_steps
    steps = f"steps {step + 2 - bad.in_a_row} to {progress.step}" if bad.in_a_row else "the test after all steps"
    told = (
        f"{run.path} diverged: {steps} had no finite loss or gradient "
        f"(samples of the last one: {place}); try a lower --optim.lr, --schedule.warmup_epochs or --optim.clip_norm"
    )
    tracker.alert(f"{run.path.name} diverged", told)
    tracker.finish({"state": "running", "bad_steps": bad.total}, exit_code=1)
    raise Diverged(told)


@contextmanager
def not_fatal(trouble: str) -> Iterator[None]:
    """Within it any error is a warning: no picture, page or diagnosis is worth a finished training."""
    try:
        yield
    except Exception as problem:
        _logger.warning("%s: %r", trouble, problem)


def report_training(
    run: Run, tracker: Tracker, progress: Progress, calendar: Calendar, predictions: Predictions, data: Data
) -> None:
    """Summary, figures and closing line of a finished training; `predictions`: the best checkpoint on the test set."""
    if not tracker.is_main:
        return
    images = progress.step * calendar.batch_size
    summary = {
        "state": "finished",
        "test_accuracy": predictions.accuracy,
        "test_loss": predictions.loss,
        "best_val_accuracy": progress.best_accuracy if progress.validations else None,
        "best_step": progress.best_step or progress.step,
        "steps": progress.step,
        "epochs": calendar.epoch_of(progress.step),
        "images_per_second": images / max(progress.train_seconds, 1e-9),
        "skipped_images": _skipped_images(run, data),
        "bad_steps": progress.bad_steps.total,
        **_times(progress),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if run.config.log.figures:
        with not_fatal(f"not all figures of {run.path} could be drawn"):
            _draw(run, tracker, predictions, data)
    if run.config.log.artifacts:
        with not_fatal(f"files of {run.path} could not be shared"):
            share_files(run, tracker)
    run.write_summary(**summary)
    if run.config.log.figures:
        with not_fatal(f"the page of {run.path} could not be written"):
            write_run_page(run.path)
    result = (
        f"test accuracy {predictions.accuracy:.2%}, loss {predictions.loss:.4f} (best: step {summary['best_step']})"
    )
    page = "; report.html there shows it" if (run.path / PAGE).is_file() else ""
    tracker.say(f"{result}, {summary['images_per_second']:,.0f} images/s. Everything is in {run.path}{page}")
    tracker.alert(f"{run.path.name} is finished", result)
    tracker.finish(summary)


def _draw(run: Run, tracker: Tracker, predictions: Predictions, data: Data) -> None:
    """The pictures, in the run folder and in the copies of the run, which have charts of their own."""
    with drawn_beside(drawings_of(run, predictions, data)) as finished:
        with not_fatal(f"the charts of {run.path} could not be shared"):
            show_results(tracker, run.config, predictions, data)
        for drawing in finished:
            tracker.figure(drawing.path.stem, drawing.path)


def report_findings(run: Run, tracker: Tracker, classes: int, seen: Probe | None, predictions: Predictions) -> None:
    """Say what is wrong with the training, if anything, with what to try."""
    if not tracker.is_main:
        return
    with not_fatal(f"{run.path} could not be diagnosed"):
        evidence = Evidence(run.config, classes, read_history(run.path), seen, doubt_of(predictions, "test"))
        findings = write_diagnosis(run.path, evidence)
        for finding in findings:
            tracker.say(f"diagnosis: {finding}")
        if findings:
            tracker.text("diagnosis", "\n\n".join(map(str, findings)))


def _skipped_images(run: Run, data: Data) -> int:
    """Images without pixels: those of decoded sets, and of streamed ones each time that one was left out."""
    decoded = [part for part in (data.train, data.val, data.test) if part and part.images is not None]
    streamed = {name for name, part in vars(data).items() if name in ("train", "val", "test") and part not in decoded}
    counts = [line.get("skipped_images", 0) for line in read_history(run.path) if line.get("split") in streamed]
    return sum(int((part.labels == SKIPPED_LABEL).sum()) for part in decoded) + sum(map(int, counts))
