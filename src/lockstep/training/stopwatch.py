"""The time that training takes."""

import time

from lockstep.training.progress import Progress


class Stopwatch:
    """Seconds of training, in `progress`, over restarts: those spent on steps, and all of them."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._lap_started = time.perf_counter()
        self._lap_step = progress.step
        self._wall_started = self._lap_started - progress.wall_seconds

    def lap(self) -> float:
        """Steps per second since the last lap. Call when the device has been waited for, then `skip` other work."""
        now = time.perf_counter()
        seconds = now - self._lap_started
        rate = (self._progress.step - self._lap_step) / max(seconds, 1e-9)
        self._progress.train_seconds += seconds
        self._progress.wall_seconds = now - self._wall_started
        self._lap_started, self._lap_step = now, self._progress.step
        return rate

    def read(self) -> None:
        """Put the time until now into `progress`."""
        self._progress.wall_seconds = time.perf_counter() - self._wall_started

    def skip(self) -> None:
        """Leave the time since the last lap out of that of steps: it went into validation, say."""
        self._lap_started = time.perf_counter()
