"""How far training has come, and the running sums of what is logged. All of it goes into every checkpoint."""

import math
import time
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from lockstep.evaluation.evaluate import Metrics
from lockstep.settings.config import Config


@dataclass
class Progress:
    """The position of a run and what its decisions rest on."""

    step: int = 0
    """Optimizer updates done; the position is step * batch_size"""
    val_losses: list[float] = field(default_factory=list)
    """One per validation, for the plateau schedule"""
    best_step: int = 0
    best_accuracy: float = -1.0
    validations_since_best: int = 0
    validated_step: int = 0
    """The step of the last validation; behind `step` at an epoch's end if it was interrupted"""
    train_seconds: float = 0.0
    wall_seconds: float = 0.0
    restarts: int = 0
    window: list[float] = field(default_factory=lambda: [0.0] * 4)
    """Loss, hits, samples and skipped images summed since the last log line"""
    epoch: list[float] = field(default_factory=lambda: [0.0] * 4)
    """The same since the epoch began"""
    bad: list[int] = field(default_factory=lambda: [0] * 3)
    """Bad steps (skipped for want of a finite gradient): since the last log line, in a row until now, in all"""

    def judge(self, loss: float, accuracy: float) -> bool:
        """Note a validation result; true if none was better so far.

        Of equal accuracies, which small validation sets often give, the later counts: it has the lower learning rate.
        """
        self.val_losses.append(loss)
        self.validated_step = self.step
        self.validations_since_best = 0 if accuracy > self.best_accuracy else self.validations_since_best + 1
        if accuracy < self.best_accuracy:
            return False
        self.best_step, self.best_accuracy = self.step, accuracy
        return True

    def has_stalled(self, early_stop_epochs: int | None) -> bool:
        """Whether so many validations in a row were no better that training should stop."""
        return early_stop_epochs is not None and self.validations_since_best >= early_stop_epochs

    @property
    def bad_streak(self) -> int:
        """Bad steps in a row until the last time the sums were read."""
        return self.bad[1]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Meter:
    """Sums of loss, hits and samples on the device, and counts of bad steps, so that no step waits for the host."""

    def __init__(self, progress: Progress, accelerator: Accelerator) -> None:
        """Goes on from the sums in `progress`, which are over all processes and therefore kept by one of them."""
        dtype = torch.float32 if accelerator.device.type == "mps" else torch.float64
        start = [progress.window, progress.epoch] if accelerator.is_main_process else [[0.0] * 4] * 2
        self._sums = torch.tensor(start, dtype=dtype, device=accelerator.device)
        self._step = torch.zeros_like(self._sums[0])
        self._bad = torch.tensor(progress.bad, dtype=dtype, device=accelerator.device)
        self._accelerator = accelerator

    @torch.no_grad()
    def add(self, losses: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Count a microbatch: losses (B,), logits (B, C), targets (B,) or soft (B, C); skipped images have none."""
        if targets.ndim == 1:
            labels, used = targets, (targets >= 0).sum()
        else:
            # Mixing moves parts of targets between rows, so only their sum tells how many images had one.
            labels, used = targets.argmax(1).where(targets.sum(1) > 0, -1), targets.sum().round()
        hits = (logits.detach().argmax(1) == labels).sum()
        self._step += torch.stack([losses.detach().sum(), hits, used, len(labels) - used]).to(self._sums)

    def finish_step(self, bad: Tensor) -> None:
        """Count the microbatches added since the last step, or the step as a bad one if the flag on the device is set.

        The flag is the same on all processes.
        """
        self._sums += self._step.where(~bad, 0)
        self._step.zero_()
        self._bad += bad
        self._bad[1] *= bad  # one good step ends the row

    def read(self, progress: Progress) -> Progress:
        """Put the sums over all processes into `progress`; every process must take part, and waits for the device."""
        sums = self._sums.flatten()
        if self._accelerator.num_processes > 1:
            sums = self._accelerator.reduce(sums, reduction="sum")
        numbers = torch.cat([sums, self._bad]).tolist()
        progress.window, progress.epoch = numbers[:4], numbers[4:8]
        progress.bad = [int(count) for count in numbers[8:]]
        return progress

    def start_window(self) -> None:
        self._sums[0].zero_()
        self._bad[0] = 0

    def start_epoch(self) -> None:
        self._sums.zero_()


def means(sums: list[float]) -> dict[str, float]:
    """loss and accuracy from sums of loss, hits, samples and skipped images; skipped_images if there were any.

    Without a sample, as where all steps were bad, both are NaN.
    """
    loss, hits, samples, skipped = sums
    counted = {"loss": loss / (samples or math.nan), "accuracy": hits / (samples or math.nan)}
    return {**counted, "skipped_images": skipped} if skipped else counted


class Due(NamedTuple):
    """What the end of a step calls for."""

    log: bool
    validate: bool
    save: bool
    histograms: bool
    epoch_ends: bool


@dataclass(frozen=True)
class Calendar:
    """When things happen, in steps. `after(step)` is asked when `step` updates are done."""

    steps_per_epoch: int
    planned_steps: int
    """All epochs: what schedules are laid out for"""
    total_steps: int
    """Where training ends: train.epochs, or train.max_steps if that is sooner"""
    batch_size: int
    log_every_steps: int
    save_every_steps: int | None
    save_every_epochs: int
    histogram_every_steps: int | None = None
    early_stop_epochs: int | None = None

    def after(self, step: int) -> Due:
        is_last = step == self.total_steps
        epoch_ends = is_last or step % self.steps_per_epoch == 0
        validate = is_last or (epoch_ends and self.epoch_of(step) % self.save_every_epochs == 0)
        return Due(
            log=epoch_ends or step % self.log_every_steps == 0,
            validate=validate,
            save=validate or _divides(self.save_every_steps, step),
            histograms=_divides(self.histogram_every_steps, step),
            epoch_ends=epoch_ends,
        )

    def validates(self, progress: Progress) -> bool:
        """Whether a validation is due and not done yet, perhaps because the run was stopped within it."""
        return progress.step > progress.validated_step and self.after(progress.step).validate

    def is_over(self, progress: Progress) -> bool:
        """Whether training ends here: all steps are done, or validations have not got better for long enough."""
        return progress.step >= self.total_steps or progress.has_stalled(self.early_stop_epochs)

    def epoch_of(self, step: int) -> int:
        """The epoch, counted from 1, that the last of `step` updates belongs to."""
        return max(1, -(-step // self.steps_per_epoch))

    def place(self, step: int) -> dict[str, int]:
        """step, epoch and position of a log record."""
        return {"step": step, "epoch": self.epoch_of(step), "position": step * self.batch_size}


def build_calendar(config: Config, steps_per_epoch: int) -> Calendar:
    """The calendar of a run over data with this many steps per epoch."""
    planned_steps = config.train.epochs * steps_per_epoch
    total_steps = min(planned_steps, config.train.max_steps or planned_steps)
    return Calendar(
        steps_per_epoch,
        planned_steps,
        total_steps,
        config.train.batch_size,
        config.log.every_steps,
        config.checkpoint.every_steps,
        config.checkpoint.every_epochs,
        config.log.histogram_every_steps,
        config.train.early_stop_epochs,
    )


def _divides(every_steps: int | None, step: int) -> bool:
    return every_steps is not None and step % every_steps == 0


class Stopwatch:
    """Seconds spent on training steps, without validation; adds up over restarts in `progress.train_seconds`."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._started = time.perf_counter()
        self._lap_step = progress.step
        self._wall_start = self._started - progress.wall_seconds

    def lap(self) -> float:
        """Steps per second since the last lap. Call when the device has been waited for, then `skip` other work."""
        seconds = time.perf_counter() - self._started
        rate = (self._progress.step - self._lap_step) / max(seconds, 1e-9)
        self._progress.train_seconds += seconds
        self._lap_step = self._progress.step
        self._started = time.perf_counter()
        return rate

    def skip(self) -> None:
        """Leave out the time since the lap, spent on validation."""
        self._started = time.perf_counter()
        self._progress.wall_seconds = self._started - self._wall_start


def train_record(
    progress: Progress, calendar: Calendar, lr: float, grad_norm: float, steps_per_second: float
) -> dict[str, Any]:
    """A line of metrics.jsonl: means since the line before, without bad steps; their number if there were any."""
    return {
        **calendar.place(progress.step),
        "split": "train",
        **means(progress.window),
        **({"bad_steps": progress.bad[0]} if progress.bad[0] else {}),
        "lr": lr,
        "grad_norm": grad_norm,
        "images_per_second": steps_per_second * calendar.batch_size,
    }


def val_record(progress: Progress, calendar: Calendar, metrics: Metrics) -> dict[str, Any]:
    """A line of metrics.jsonl: a validation, beside the means of the epoch's training."""
    train = means(progress.epoch)
    return {
        **calendar.place(progress.step),
        "split": "val",
        **metrics.headline(),
        "train_loss": train["loss"],
        "train_accuracy": train["accuracy"],
        "train_val_loss_ratio": train["loss"] / max(metrics.loss, 1e-12),
    }


def test_record(progress: Progress, calendar: Calendar, metrics: Metrics) -> dict[str, Any]:
    """A line of metrics.jsonl: the best checkpoint on the test set."""
    place = {**calendar.place(progress.step), "best_step": progress.best_step or progress.step}
    return {**place, "split": "test", **metrics.headline()}
