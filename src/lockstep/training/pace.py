"""How long each process computes before the others have what they wait for: the slowest one sets the pace."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lockstep.launch.accelerator import Launch

_MOST_SPANS = 1000
"""Steps that are measured between two lines of the log; on a GPU each keeps two events"""


class Pace:
    """Time of this process's own work in each step: from one exchange of gradients to its part of the next one.

    On a GPU it is the device's time, by events that nobody waits for.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._spans: list[tuple[Any, Any]] = []
        self._blocked_seconds = 0.0
        self._start: Any = None
        self._ready_at = time.perf_counter()
        self.waited_seconds = 0.0
        """For the messages of others, between gradients of its own and those of all; of a CPU, a GPU is not asked"""

    def ready(self) -> None:
        """This process's gradients of a step are complete."""
        if self._start is not None and len(self._spans) < _MOST_SPANS:
            self._spans.append((self._start, self._now()))
        self._start, self._ready_at = None, time.perf_counter()

    def exchanged(self) -> None:
        """Those of all processes are: the next step's work begins."""
        self._start = self._now()
        if not self._on_gpu:
            self.waited_seconds += time.perf_counter() - self._ready_at

    @contextmanager
    def blocked(self) -> Iterator[None]:
        """Within it a CPU waits for the others before its own gradients are complete."""
        begun = time.perf_counter()
        yield
        if not self._on_gpu:
            seconds = time.perf_counter() - begun
            self._blocked_seconds += seconds
            self.waited_seconds += seconds

    def restart(self) -> None:
        """Leave out what has come since the last exchange: a validation, say."""
        self._start = None

    def read(self, launch: Launch) -> dict[str, float | int]:
        """How many times the mean the slowest process takes, and which it is, since the last call.

        Every process must take part, and must have waited for its device. Empty where nothing was measured: of one
        process, or of sharded ones.
        """
        own = sum(map(_seconds, self._spans)) - self._blocked_seconds
        gathered = launch.gather(own / len(self._spans) if self._spans else None)
        self._spans, self._blocked_seconds = [], 0.0
        if self._start is not None:
            self._start = self._now()
        if len(gathered) == 1 or None in gathered:
            return {}
        slowest = max(range(len(gathered)), key=lambda rank: gathered[rank])
        return {"straggler": gathered[slowest] * len(gathered) / sum(gathered), "straggler_rank": slowest}

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _seconds(span: tuple[Any, Any]) -> float:
    start, end = span
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1000
