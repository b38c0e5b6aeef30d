"""The time that training takes, and how much of it goes by waiting for images."""

import time
from collections.abc import Iterator
from typing import NamedTuple

from lockstep.data.loader import Batch
from lockstep.training.progress import Progress


class Lap(NamedTuple):
    """What a stretch of training took."""

    steps_per_second: float
    data_share: float
    """Of the time, what the host spent on bringing images: near 1 where the device starves"""


class Stopwatch:
    """Seconds of training, in `progress`, over restarts: those spent on steps, and all of them."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._lap_started = time.perf_counter()
        self._lap_step = progress.step
        self._data_seconds = 0.0
        self._wall_started = self._lap_started - progress.wall_seconds

    def next_of(self, batches: Iterator[Batch]) -> Batch:
        """The next batch, its time counted as that of data."""
        begun = time.perf_counter()
        batch = next(batches)
        self._data_seconds += time.perf_counter() - begun
        return batch

    def lap(self) -> Lap:
        """Ends a lap. Call when the device has been waited for, then `skip` other work."""
        now = time.perf_counter()
        seconds = max(now - self._lap_started, 1e-9)
        lap = Lap((self._progress.step - self._lap_step) / seconds, min(self._data_seconds / seconds, 1.0))
        self._progress.train_seconds += now - self._lap_started
        self._progress.wall_seconds = now - self._wall_started
        self._lap_started, self._lap_step, self._data_seconds = now, self._progress.step, 0.0
        return lap

    def read(self) -> None:
        """Put the time until now into `progress`."""
        self._progress.wall_seconds = time.perf_counter() - self._wall_started

    def skip(self) -> None:
        """Leave the time since the last lap out of that of steps: it went into validation, say."""
        self._lap_started = time.perf_counter()
