"""Time of steps, and all of it."""

import math

import pytest

from lockstep.training.progress import Progress
from lockstep.training.stopwatch import Stopwatch


def test_the_stopwatch_counts_training_and_leaves_out_what_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("lockstep.training.stopwatch.time.perf_counter", lambda: now[0])
    progress = Progress(step=4, train_seconds=5.0, wall_seconds=50.0)
    stopwatch = Stopwatch(progress)
    progress.step, now[0] = 10, 103.0
    assert stopwatch.lap() == 2.0 and progress.train_seconds == 8.0
    now[0] = 163.0  # a minute of validation
    stopwatch.skip()
    progress.step, now[0] = 12, 164.0
    assert stopwatch.lap() == 2.0 and progress.train_seconds == 9.0
    assert math.isfinite(stopwatch.lap())  # no time, no steps
    assert progress.wall_seconds == 114.0
    now[0] = 170.0
    stopwatch.read()
    assert (progress.wall_seconds, progress.train_seconds) == (120.0, 9.0)
