"""What the end of a step calls for."""

import pytest

from lockstep.errors import UserError
from lockstep.settings.config import CheckpointConfig, Config, LogConfig, ScheduleConfig, TrainConfig
from lockstep.training.calendar import Calendar, Due, build_calendar
from lockstep.training.progress import Progress

STEPS_PER_EPOCH = 10


def calendar_of(
    *, log: int = 50, save: int | None = None, save_epochs: int = 1, histograms: int | None = None, **train: int | None
) -> Calendar:
    config = Config(
        train=TrainConfig(**{"epochs": 4, "batch_size": 32, **train}),
        checkpoint=CheckpointConfig(every_steps=save, every_epochs=save_epochs),
        log=LogConfig(every_steps=log, histogram_every_steps=histograms),
    )
    return build_calendar(config, STEPS_PER_EPOCH, has_validation=True)


def due_steps(calendar: Calendar, what: str) -> list[int]:
    return [step for step in range(1, calendar.total_steps + 1) if getattr(calendar.after(step), what)]


def test_an_epoch_ends_with_a_log_line_a_validation_and_a_checkpoint() -> None:
    calendar = calendar_of()
    for what in ("log", "validate", "save", "epoch_ends"):
        assert due_steps(calendar, what) == [10, 20, 30, 40]
    assert calendar.after(11) == Due(*[False] * len(Due._fields))


def test_max_steps_ends_training_within_an_epoch_with_everything() -> None:
    calendar = calendar_of(max_steps=25, save_epochs=2, validate_every_epochs=2)
    assert calendar.total_steps == 25
    due = calendar.after(25)
    assert due.log and due.validate and due.save and due.epoch_ends
    assert due_steps(calendar, "epoch_ends") == [10, 20, 25]
    assert due_steps(calendar, "validate") == due_steps(calendar, "save") == [20, 25]


def test_max_steps_never_lengthens_training() -> None:
    assert calendar_of(epochs=2, max_steps=1000).total_steps == 20


def test_log_lines_come_every_so_many_steps_and_at_epoch_ends() -> None:
    assert due_steps(calendar_of(epochs=2, log=4), "log") == [4, 8, 10, 12, 16, 20]


def test_checkpoints_every_so_many_steps_need_no_validation() -> None:
    calendar = calendar_of(epochs=2, save=7)
    assert due_steps(calendar, "save") == [7, 10, 14, 20]
    assert due_steps(calendar, "validate") == [10, 20]


def test_histograms_come_when_they_are_asked_for_and_otherwise_never() -> None:
    assert due_steps(calendar_of(epochs=2, histograms=6), "histograms") == [6, 12, 18]
    assert due_steps(calendar_of(epochs=2), "histograms") == []


def test_validations_and_checkpoints_have_intervals_of_their_own() -> None:
    calendar = calendar_of(epochs=5, save_epochs=3, validate_every_epochs=2)
    assert due_steps(calendar, "validate") == [20, 40, 50]
    assert due_steps(calendar, "save") == [30, 50]
    assert due_steps(calendar, "epoch_ends") == due_steps(calendar, "log") == [10, 20, 30, 40, 50]


def test_without_a_validation_set_nothing_is_validated() -> None:
    calendar = build_calendar(Config(), STEPS_PER_EPOCH, has_validation=False)
    assert due_steps(calendar, "validate") == [] and due_steps(calendar, "save") == list(range(10, 101, 10))


@pytest.mark.parametrize(
    ("config", "flag"),
    [
        (Config(schedule=ScheduleConfig(name="plateau")), "--schedule.name=plateau"),
        (Config(train=TrainConfig(early_stop_epochs=2)), "--train.early_stop_epochs"),
    ],
)
def test_what_waits_for_validations_is_refused_where_there_are_none(config: Config, flag: str) -> None:
    build_calendar(config, STEPS_PER_EPOCH, has_validation=True)
    with pytest.raises(UserError, match=rf"{flag} can never act.*--data\.val_fraction"):
        build_calendar(config, STEPS_PER_EPOCH, has_validation=False)


def test_early_stopping_counts_epochs_whatever_the_interval_of_validations() -> None:
    """Two epochs without a better result: with a validation every five, the first worse one ends training."""
    for every, ends in ((1, 30), (5, 100)):
        calendar = calendar_of(epochs=20, early_stop_epochs=2, validate_every_epochs=every)
        progress = Progress()
        for step in due_steps(calendar, "validate"):
            progress.step = step
            progress.judge(calendar.epoch_of(step), loss=1.0, accuracy=0.5 if step > 50 or every == 1 else step / 100)
            if calendar.is_over(progress):
                break
        assert progress.step == ends, every


def test_places_count_epochs_from_one_and_samples_from_zero() -> None:
    calendar = calendar_of()
    epochs = {step: calendar.epoch_of(step) for step in (0, 1, 10, 11, 20, 40)}
    assert epochs == {0: 1, 1: 1, 10: 1, 11: 2, 20: 2, 40: 4}
    assert calendar.place(12) == {"step": 12, "epoch": 2, "position": 12 * 32}
