"""The lines of metrics.jsonl."""

from lockstep.settings.config import Config, TrainConfig
from lockstep.training.calendar import build_calendar
from lockstep.training.progress import BadSteps, Progress, Sums
from lockstep.training.records import train_record
from lockstep.training.stopwatch import Lap

CALENDAR = build_calendar(Config(train=TrainConfig(batch_size=32)), 10, has_validation=True)


def test_a_train_record_tells_of_bad_steps_only_where_there_were_any() -> None:
    def record(bad: BadSteps) -> dict[str, object]:
        progress = Progress(step=20, bad_steps=bad)
        return train_record(progress, CALENDAR, lr=0.1, grad_norm=2.0, digest="00ff", lap=Lap(3.0, 0.25))

    assert record(BadSteps(2, 0, 5))["bad_steps"] == 2
    assert "bad_steps" not in record(BadSteps(0, 0, 5))


def test_a_train_record_holds_means_place_and_speed() -> None:
    progress = Progress(step=20, window=Sums([2.0, 4.0], 9, 12))
    record = train_record(progress, CALENDAR, lr=0.1, grad_norm=2.0, digest="00ff", lap=Lap(3.0, 0.25))
    assert record == {
        "step": 20,
        "epoch": 2,
        "position": 640,
        "split": "train",
        "loss": 0.5,
        "accuracy": 0.75,
        "lr": 0.1,
        "grad_norm": 2.0,
        "digest": "00ff",
        "images_per_second": 96.0,
        "data_share": 0.25,
    }
