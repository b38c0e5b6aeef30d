"""How far training has come, and what its decisions rest on. All of it goes into every checkpoint."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple

Origin = dict[str, str]
"""run, checkpoint and the checksum of its manifest"""


class Validation(NamedTuple):
    """The result of a validation after so many epochs."""

    epoch: int
    loss: float


@dataclass
class Sums:
    """What was summed over samples since some moment."""

    losses: list[float] = field(default_factory=list)
    """By number of the microbatch within its step, so that their sum has one order on any number of processes"""
    hits: int = 0
    """Samples whose label had the highest output"""
    samples: int = 0
    """Samples with a label: without those whose image was skipped"""
    skipped: int = 0


@dataclass
class BadSteps:
    """Numbers of steps that were skipped for want of a finite gradient."""

    since_log: int = 0
    in_a_row: int = 0
    """Until the last time the counts were read"""
    total: int = 0


@dataclass
class Progress:
    """The position of a run and what its decisions rest on."""

    step: int = 0
    """Optimizer updates done; the position is step * batch_size"""
    validations: list[Validation] = field(default_factory=list)
    validated_step: int = 0
    """The step of the last validation; behind `step` at its time if it was interrupted"""
    best_step: int = 0
    best_accuracy: float = -1.0
    improved_epoch: int = 0
    """The epoch of the last validation with a higher accuracy than all before, from which early stopping counts"""
    train_seconds: float = 0.0
    """Spent on steps"""
    wall_seconds: float = 0.0
    """From the start of training to now, without the time between a stop and the next start"""
    restarts: int = 0
    window: Sums = field(default_factory=Sums)
    """Since the last log line"""
    epoch: Sums = field(default_factory=Sums)
    """Since the last validation, or without any since the epoch began"""
    bad_steps: BadSteps = field(default_factory=BadSteps)
    origin: Origin | None = None
    """The state of another run that this one began with"""

    def judge(self, epoch: int, loss: float, accuracy: float, *, competes: bool = True) -> bool:
        """Note a validation result; true if none of those that compete was better so far.

        Of equal accuracies, which small validation sets often give, the later counts: it has the lower learning rate.
        """
        self.validations.append(Validation(epoch, loss))
        self.validated_step = self.step
        if accuracy > self.best_accuracy or not competes:
            self.improved_epoch = epoch
        if accuracy < self.best_accuracy or not competes:
            return False
        self.best_step, self.best_accuracy = self.step, accuracy
        return True

    def has_stalled(self, early_stop_epochs: int | None) -> bool:
        """Whether the last validation came so many epochs after the last better one that training should stop."""
        if early_stop_epochs is None or not self.validations:
            return False
        return self.validations[-1].epoch - self.improved_epoch >= early_stop_epochs

    def as_dict(self) -> dict[str, Any]:
        """For progress.json."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Progress":
        """Of `as_dict`, perhaps by way of JSON; raises TypeError or ValueError if it is none."""
        parts: dict[str, Any] = {
            "validations": [Validation(int(epoch), float(loss)) for epoch, loss in values["validations"]],
            "window": Sums(**values["window"]),
            "epoch": Sums(**values["epoch"]),
            "bad_steps": BadSteps(**values["bad_steps"]),
        }
        progress = cls(**{**values, **parts})
        for record in (progress, progress.window, progress.epoch, progress.bad_steps):
            for entry in fields(record):
                value = getattr(record, entry.name)
                number = isinstance(value, int | float) and not isinstance(value, bool)
                numbers = isinstance(value, list) and all(isinstance(item, int | float) for item in value)
                if (entry.type in (int, float) and not number) or (entry.type == list[float] and not numbers):
                    raise TypeError(f"{entry.name} is {value!r}")
        return progress
