"""Stopping on request, with nothing lost: signals, a stop file, a time limit, agreed by all processes at a step's end.

SIGTERM, SIGUSR2 (NCCL takes USR1 for itself) and Ctrl-C ask for it, and so do a file `stop` in the run folder and
`run.max_hours`. A request on any process reaches all of them: they ask one another in the background, every step or, if
steps are short, about four times a second (at most 16 steps apart), and read the answer a step later, so that nobody
waits. The program then saves and ends with REQUEUE_CODE; launchers turn every code into 1, so the run folder holds a
file `preempted` too, until the run goes on.
"""

import contextlib
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from lockstep.errors import UserError
from lockstep.files import write_json
from lockstep.launch.accelerator import Launch
from lockstep.settings.config import RunConfig

REQUEUE_CODE = 85
STOP_FILE = "stop"
MARKER = "preempted"
_STOP_FILE_SECONDS = 1.0  # between looks at the file, which may lie on a slow shared disk
_AGAIN_SECONDS = 3.0
"""A terminal sends Ctrl-C to all, and a launcher passes it on: later than this, somebody has pressed it again"""
_ASK_SECONDS = 0.25  # asking at every step of 25 ms took 1 to 4 % of the time of two CPU processes
_MOST_STEPS_BETWEEN = 15  # however short: a step that is suddenly slow must not delay the answer by minutes


class Preemption:
    """Knows whether the run should stop. Make it early: from then on the signals no longer kill."""

    def __init__(self, config: RunConfig, run_dir: Path, launch: Launch) -> None:
        """Takes over SIGTERM, SIGUSR2 and SIGINT of this process; every process of the run must make one.

        Raises UserError, on every process alike, if the stop file is no file.
        """
        self.reason: str | None = None
        self._run_dir, self._launch = run_dir, launch
        self._deadline = None if config.max_hours is None else time.monotonic() + 3600 * config.max_hours
        self._max_hours = config.max_hours
        self._next_look = 0.0
        self._group = launch.host_group
        self._pending: tuple[Any, torch.Tensor] | None = None
        self._asked, self._steps_since = time.monotonic(), 0
        self._steps_until = 0
        self._interrupted: float | None = None
        self._ends_at_once = False
        launch.decide(self._forget)
        for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _forget(self) -> None:
        """An old request was answered by the stop before this start."""
        for path in (self._run_dir / STOP_FILE, self._run_dir / MARKER):
            if path.is_dir():
                raise UserError(f"{path} is a folder: remove it")
            path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Within it a signal ends the main process at once: it decodes for long, and there is nothing to save yet."""
        self._ends_at_once = self._launch.is_main
        try:
            yield
        finally:
            self._ends_at_once = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._interrupted is not None and time.monotonic() - self._interrupted > _AGAIN_SECONDS:
                raise KeyboardInterrupt
            self._interrupted = time.monotonic()
        self.reason = self.reason or f"signal {signal.Signals(number).name}"
        if self._ends_at_once:
            self._launch.say(f"stopped before the first step ({self.reason}); the same command starts again")
            write_json(self._run_dir / MARKER, {"step": 0, "reason": self.reason})
            raise SystemExit(REQUEUE_CODE)

    @property
    def cause(self) -> str:
        """Of a stop that was agreed."""
        return self.reason or "asked on another process"

    def wanted(self) -> bool:
        """Whether this process has been asked to stop; cheap enough for every batch."""
        now = time.monotonic()
        if self.reason is None and self._launch.is_main and now >= self._next_look:
            self._next_look = now + _STOP_FILE_SECONDS
            if (self._run_dir / STOP_FILE).exists():
                self.reason = f"file {self._run_dir / STOP_FILE}"
            elif self._deadline is not None and now > self._deadline:
                self.reason = f"--run.max_hours={self._max_hours}"
        return self.reason is not None

    def agreed(self, *, wait: bool = False) -> bool:
        """Whether any process has been asked to stop, the same answer on all; every process calls it after every step.

        The answer to a question of an earlier step, which costs nobody any waiting; with `wait` it is as of now.
        """
        if self._group is None:
            return self.wanted()
        answer = self._answer()
        self._steps_since += 1
        if wait or self._steps_until == 0:
            self._ask()
            return (self._answer() or answer) if wait else answer
        self._steps_until -= 1
        return answer

    def _ask(self) -> None:
        """Send, in the background, whether this process should stop and after how many steps it would ask again."""
        now = time.monotonic()
        steps = _ASK_SECONDS * self._steps_since / max(now - self._asked, 1e-9)
        self._asked, self._steps_since = now, 0
        message = torch.tensor([self.wanted(), min(int(steps), _MOST_STEPS_BETWEEN)], dtype=torch.int32)
        work = dist.all_reduce(message, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._pending = (work, message)

    def _answer(self) -> bool:
        """What came of the last question; False if nothing was asked since."""
        if self._pending is None:
            return False
        work, message = self._pending
        self._pending = None
        work.wait()
        stop, self._steps_until = message.tolist()
        return bool(stop)

    def leave(self, step: int) -> int:
        """Note in the run folder that the run waits to be continued; returns the code to exit with, to all at once."""
        if self._launch.is_main:
            write_json(self._run_dir / MARKER, {"step": step, "reason": self.cause})
        if self._group is not None:
            dist.barrier(group=self._group)  # torchrun kills those who still save 30 s after the first one left
        return REQUEUE_CODE
