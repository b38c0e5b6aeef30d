"""Training the tasks of a sweep on this machine: each a process of its own, some at once.

Finished tasks are left out, begun ones go on: the same command continues a sweep. SIGTERM and Ctrl-C ask the tasks to
save and stop, as does the sweep's own `early_terminate`, by the file `stop` in a run folder.
"""

import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from lockstep.errors import print_line
from lockstep.launch.machine import signal_at_death_of_parent
from lockstep.launch.preemption import MARKER, REQUEUE_CODE, STOP_FILE
from lockstep.sweep.file import Sweep
from lockstep.sweep.results import EarlyStops, TaskRun, folder_of, read_result

_LOOK_SECONDS = 0.1
_JUDGE_SECONDS = 1.0
"""Between looks at the validations of running tasks"""
_AGAIN_SECONDS = 3.0
"""A Ctrl-C later than this after the first is another one, and does not wait for anybody"""
_MOST_SHOWN = 500
_TAIL_BYTES = 20_000

Command = Callable[[TaskRun], Sequence[str]]
"""The program that trains a task"""


@dataclass
class _Child:
    run: TaskRun
    process: subprocess.Popen[bytes]
    began: float
    judged: int = 0
    """Validations at the last look"""
    lost_at: int | None = None
    """The bracket that it failed, once it was asked to stop for that"""

    @property
    def has_saved(self) -> bool:
        """Whether it left the mark of a run that was stopped and waits; launchers turn its code into another."""
        marker = self.run.path / MARKER
        fresh = marker.is_file() and marker.stat().st_mtime >= self.began - 1
        return self.process.returncode == REQUEUE_CODE or fresh


@dataclass(frozen=True)
class Failure:
    """A task that ended without a result."""

    run: TaskRun
    code: int

    def __str__(self) -> str:
        return (
            f"task {self.run.index} failed with {self.code}: {self.run.label}\n"
            f"  {last_words(self.run.log)}\n  all of it: {self.run.log}"
        )


class Runner:
    """Trains the tasks that are not done yet; `run` may be called once."""

    def __init__(self, sweep: Sweep, runs: Sequence[TaskRun], command: Command, jobs: int = 1) -> None:
        self._sweep, self._runs, self._command, self._jobs = sweep, runs, command, jobs
        self.stops = EarlyStops(folder_of(sweep, runs[0].config))
        self.failures: list[Failure] = []
        self._waiting = deque(run for run in runs if not run.is_finished and run not in self.stops)
        self._done = len(runs) - len(self._waiting)
        self._children: list[_Child] = []
        self._histories: dict[str, list[float]] = {}
        self._paused = self._is_passed_on = False
        self._asked: signal.Signals | None = None
        self._asked_at = self._judged_at = 0.0

    def run(self) -> int:
        """Train; returns the exit code: 0, 1 if a task failed, or REQUEUE_CODE if some wait to be continued."""
        begins = f", {self._done} of them done before" if self._done else ""
        print_line(f"{len(self._runs)} tasks{begins}; logs in {self._runs[0].log.parent}")
        with self._signals_taken():
            while self._waiting or self._children:
                while self._waiting and len(self._children) < self._jobs and self._asked is None:
                    self._children.append(self._start(self._waiting.popleft()))
                self._pass_on()
                time.sleep(_LOOK_SECONDS)
                for child in [child for child in self._children if child.process.poll() is not None]:
                    self._children.remove(child)
                    self._note(child)
                self._stop_losers()
        if self.failures:
            return 1
        return REQUEUE_CODE if self._paused or self._asked is not None else 0

    def _start(self, run: TaskRun) -> _Child:
        run.log.parent.mkdir(parents=True, exist_ok=True)
        with run.log.open("ab") as log:
            process = subprocess.Popen(
                self._command(run),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a terminal's Ctrl-C reaches it once, through us
                preexec_fn=_end_with_parent,
            )
        return _Child(run, process, time.time())

    def _note(self, child: _Child) -> None:
        """Say and keep what has come of a task."""
        self._done += 1
        run = child.run
        self._histories.pop(run.path.name, None)
        result = read_result(run, self._sweep.metric, self.stops)
        if child.lost_at is not None:
            (run.path / STOP_FILE).unlink(missing_ok=True)  # where the run was over before it saw it
        if child.process.returncode == 0 and result.state == "finished":
            outcome = f"{self._sweep.metric.name} {result.value:.4f}, test/accuracy {result.test_accuracy:.4f}"
        elif child.lost_at is not None and child.has_saved:
            self.stops.add(run, child.lost_at)
            outcome = f"stopped early at bracket {child.lost_at}, {self._sweep.metric.name} {result.value:.4f}"
        elif child.has_saved or self._asked is not None:
            self._paused = True
            outcome = "stopped; the same command continues"
        else:
            self.failures.append(Failure(run, child.process.returncode))
            outcome = f"failed with {child.process.returncode}: {last_words(run.log)}"
        seconds = time.time() - child.began
        print_line(f"[{self._done}/{len(self._runs)}] task {run.index}: {run.label}: {outcome}, {seconds:.0f} s")

    def _stop_losers(self) -> None:
        """Ask the runs that fail a bracket to stop; a look at all validations, about once a second."""
        running = {child.run.path.name: child for child in self._children if child.lost_at is None}
        if self._sweep.hyperband is None or not running or time.monotonic() < self._judged_at + _JUDGE_SECONDS:
            return
        self._judged_at = time.monotonic()
        for run in self._runs:
            name = run.path.name
            if name in running or name not in self._histories:  # nothing is added to those that do not train
                self._histories[name] = run.validations(self._sweep.metric)
        judged = {name: child.judged for name, child in running.items()}
        for name, bracket in self._sweep.hyperband.losers(self._histories, judged).items():
            running[name].lost_at = bracket
            (running[name].run.path / STOP_FILE).touch()
        for name, child in running.items():
            child.judged = len(self._histories[name])

    @contextmanager
    def _signals_taken(self) -> Iterator[None]:
        """Within it SIGTERM and Ctrl-C stop the tasks; whatever else ends us ends them, too."""
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        except BaseException:
            for child in self._children:
                child.process.kill()
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._asked is not None and number == signal.SIGINT and time.monotonic() > self._asked_at + _AGAIN_SECONDS:
            raise KeyboardInterrupt
        if self._asked is None:
            self._asked, self._asked_at = signal.Signals(number), time.monotonic()

    def _pass_on(self) -> None:
        """Tell the tasks, once, that we were asked to stop."""
        if self._asked is None or self._is_passed_on:
            return
        self._is_passed_on = True
        self._waiting.clear()
        print_line(f"{self._asked.name}: {len(self._children)} running tasks save and stop")
        for child in self._children:
            child.process.terminate()


def _end_with_parent() -> None:
    """In the child: whatever ends the sweep, its tasks save and end."""
    signal_at_death_of_parent(signal.SIGTERM)


def last_words(log: Path) -> str:
    """The line of a log that says best why its program failed: its last error, else its last line."""
    try:
        text = log.read_bytes()[-_TAIL_BYTES:].decode(errors="replace")
    except OSError as problem:
        return f"no log ({problem.strerror})"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or ["(it said nothing)"])[-1][:_MOST_SHOWN]
