"""Time of steps, and all of it."""

import math
from collections.abc import Iterator

import pytest

from lockstep.training.progress import Progress
from lockstep.training.stopwatch import Stopwatch


def test_the_stopwatch_counts_training_and_leaves_out_what_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("lockstep.training.stopwatch.time.perf_counter", lambda: now[0])
    progress = Progress(step=4, train_seconds=5.0, wall_seconds=50.0)
    stopwatch = Stopwatch(progress)
    progress.step, now[0] = 10, 103.0
    assert stopwatch.lap().steps_per_second == 2.0 and progress.train_seconds == 8.0
    now[0] = 163.0  # a minute of validation
    stopwatch.skip()
    progress.step, now[0] = 12, 164.0
    assert stopwatch.lap().steps_per_second == 2.0 and progress.train_seconds == 9.0
    assert math.isfinite(stopwatch.lap().steps_per_second)  # no time, no steps
    assert progress.wall_seconds == 114.0
    now[0] = 170.0
    stopwatch.read()
    assert (progress.wall_seconds, progress.train_seconds) == (120.0, 9.0)


def test_the_time_for_images_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("lockstep.training.stopwatch.time.perf_counter", lambda: now[0])

    def slow() -> Iterator[str]:
        for batch in "abc":
            now[0] += 3.0
            yield batch

    progress, batches = Progress(), slow()
    stopwatch = Stopwatch(progress)
    assert stopwatch.next_of(batches) == "a"  # type: ignore[comparison-overlap,arg-type]
    progress.step, now[0] = 1, 4.0
    assert stopwatch.lap().data_share == 0.75
    progress.step, now[0] = 2, 5.0
    assert stopwatch.lap().data_share == 0.0


def test_a_starts_time_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("lockstep.training.stopwatch.time.perf_counter", lambda: now[0])

    def slow() -> Iterator[str]:
        while True:
            now[0] += 2.0
            yield "batch"

    progress, batches = Progress(step=7), slow()
    stopwatch = Stopwatch(progress)
    assert stopwatch.started_seconds > 0
    stopwatch.next_of(batches)  # type: ignore[arg-type]
    with stopwatch.errand("validation"):
        now[0] += 3.0
    stopwatch.lap()
    stopwatch.next_of(batches)  # type: ignore[arg-type]
    with pytest.raises(OSError), stopwatch.errand("saving"):
        now[0] += 1.0
        raise OSError
    progress.step, now[0] = 9, 20.0
    spent = stopwatch.spent(waited_seconds=4.0)
    assert (spent.seconds, spent.steps) == (20.0, 2)
    expected = {"compute": 0.4, "data": 0.2, "validation": 0.15, "saving": 0.05, "logging": 0.0, "waiting": 0.2}
    assert spent.shares == pytest.approx(expected)
