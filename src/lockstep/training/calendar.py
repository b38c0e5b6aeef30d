"""When things happen, in steps."""

from dataclasses import dataclass
from typing import NamedTuple

from lockstep.errors import UserError
from lockstep.settings.config import Config
from lockstep.training.progress import Progress


class Due(NamedTuple):
    """What the end of a step calls for."""

    log: bool
    validate: bool
    save: bool
    histograms: bool
    epoch_ends: bool


@dataclass(frozen=True, kw_only=True)
class Calendar:
    """When things happen, in steps. `after(step)` is asked when `step` updates are done."""

    steps_per_epoch: int
    planned_steps: int
    """All epochs: what schedules are laid out for"""
    total_steps: int
    """Where training ends: train.epochs, or train.max_steps if that is sooner"""
    batch_size: int
    log_every_steps: int
    validate_every_epochs: int | None
    """None: there is nothing to validate on"""
    save_every_steps: int | None
    save_every_epochs: int
    histogram_every_steps: int | None = None
    early_stop_epochs: int | None = None

    def after(self, step: int) -> Due:
        """What is due when `step` updates are done."""
        is_last = step == self.total_steps
        epoch_ends = is_last or step % self.steps_per_epoch == 0
        epoch = self.epoch_of(step)
        validates = epoch_ends and self.validate_every_epochs is not None
        saves = is_last or (epoch_ends and epoch % self.save_every_epochs == 0)
        return Due(
            log=epoch_ends or step % self.log_every_steps == 0,
            validate=validates and (is_last or _divides(self.validate_every_epochs, epoch)),
            save=saves or _divides(self.save_every_steps, step),
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


def build_calendar(config: Config, steps_per_epoch: int, *, has_validation: bool) -> Calendar:
    """The calendar of a run over data with this many steps per epoch.

    Raises UserError for settings that wait for validations where there are none.
    """
    if not has_validation:
        waiting = ["--schedule.name=plateau"] if config.schedule.name == "plateau" else []
        waiting += ["--train.early_stop_epochs"] if config.train.early_stop_epochs else []
        if waiting:
            raise UserError(
                f"{' and '.join(waiting)} can never act: there is no validation set; set --data.val_fraction above 0"
            )
    planned_steps = config.train.epochs * steps_per_epoch
    return Calendar(
        steps_per_epoch=steps_per_epoch,
        planned_steps=planned_steps,
        total_steps=min(planned_steps, config.train.max_steps or planned_steps),
        batch_size=config.train.batch_size,
        log_every_steps=config.log.every_steps,
        validate_every_epochs=config.train.validate_every_epochs if has_validation else None,
        save_every_steps=config.checkpoint.every_steps,
        save_every_epochs=config.checkpoint.every_epochs,
        histogram_every_steps=config.log.histogram_every_steps,
        early_stop_epochs=config.train.early_stop_epochs,
    )


def _divides(every: int | None, number: int) -> bool:
    return every is not None and number % every == 0
