"""The time that training takes, and how much of it goes by waiting for images."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import psutil

from lockstep.data.loader import Batch
from lockstep.training.progress import Progress


class Lap(NamedTuple):
    """What a stretch of training took."""

    steps_per_second: float
    data_share: float
    """Of the time, what the host spent on bringing images: near 1 where the device starves"""


Errand = Literal["validation", "saving", "logging"]
"""What a training does beside its steps"""


class Spent(NamedTuple):
    """What a start's time went into."""

    seconds: float
    steps: int
    shares: dict[str, float]
    """compute, data, validation, saving, logging and waiting for other processes; they add up to 1"""


class Stopwatch:
    """Seconds of training, in `progress`, over restarts: those spent on steps, and all of them.

    And what this start has spent its time on.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._lap_started = time.perf_counter()
        self._lap_step = progress.step
        self._data_seconds = 0.0
        self._wall_started = self._lap_started - progress.wall_seconds
        self._begun, self._begun_step = self._lap_started, progress.step
        self._spent: dict[str, float] = {"data": 0.0, "validation": 0.0, "saving": 0.0, "logging": 0.0}
        self.started_seconds = time.time() - psutil.Process().create_time()
        """From the start of this process to the first step"""

    def next_of(self, batches: Iterator[Batch]) -> Batch:
        """The next batch, its time counted as that of data."""
        begun = time.perf_counter()
        batch = next(batches)
        seconds = time.perf_counter() - begun
        self._data_seconds += seconds
        self._spent["data"] += seconds
        return batch

    @contextmanager
    def errand(self, name: Errand) -> Iterator[None]:
        """Within it time is spent on something else than steps; not one within another."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self._spent[name] += time.perf_counter() - begun

    def spent(self, waited_seconds: float) -> "Spent":
        """What the time since this start's first step went into; `waited_seconds`: for other processes, in steps."""
        seconds = max(time.perf_counter() - self._begun, 1e-9)
        parts = {**self._spent, "waiting": waited_seconds}
        shares = {name: min(part / seconds, 1.0) for name, part in parts.items()}
        compute = max(0.0, 1 - sum(shares.values()))
        return Spent(seconds, self._progress.step - self._begun_step, {"compute": compute, **shares})

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
