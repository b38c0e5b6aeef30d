"""Everything a run writes down while it trains: metrics.jsonl, its copies, and what the console shows.

metrics.jsonl is the source of truth and the only one whose failure ends training. A copy that fails is dropped with
one warning line. `history.scalars_of` says what of a record they get.
"""

import contextlib
import io
import json
import logging
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lockstep.errors import first_line
from lockstep.files import plain, write_json
from lockstep.run.console import Console
from lockstep.run.exhibit import Exhibit
from lockstep.run.history import ENVIRONMENT, HISTORY, read_starts, scalars_of, truncate_history
from lockstep.settings.config import Config

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

_logger = logging.getLogger(__name__)


class Sink(Protocol):
    """A place that gets a copy; it may raise anything at any time."""

    name: str

    def scalars(self, step: int, axes: dict[str, float], values: dict[str, float]) -> None: ...
    def histogram(self, step: int, name: str, values: "np.ndarray") -> None: ...
    def image(self, step: int, name: str, path: Path) -> None: ...
    def text(self, step: int, name: str, text: str) -> None: ...
    def graph(self, model: "nn.Module", images: "torch.Tensor") -> None: ...
    def exhibit(self, step: int, name: str, item: Exhibit) -> None: ...
    def alert(self, title: str, text: str) -> None: ...
    def close(self, summary: dict[str, Any], exit_code: int) -> None: ...


class Tracker:
    """Everything a run writes down; made by `build_tracker`. On a process that is not main all methods do nothing."""

    def __init__(
        self, run_dir: Path, console: Console | None = None, sinks: Sequence[Sink] = (), *, step: int = 0
    ) -> None:
        self._step = step
        self._path = run_dir / HISTORY
        self._console = console
        self._sinks = list(sinks)
        # Unbuffered: a record is in the hands of the operating system when log returns, whatever happens then.
        self._file = None if console is None else open(self._path, "ab", buffering=0)

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes."""
        return self._console is not None

    def start(self, total_steps: int, step: int) -> None:
        """Begin the progress display: `step` of `total_steps` are done."""
        if self._console is not None:
            self._console.start(total_steps, step)

    def advance(self, step: int) -> None:
        """Move the progress display; cheap enough for every step."""
        if self._console is not None:
            self._console.advance(step)

    def say(self, text: str) -> None:
        """Print one line, without breaking the bar."""
        if self._console is not None:
            self._console.say(text)

    def log(self, record: dict[str, Any]) -> None:
        """Append one record (see the module's text) to metrics.jsonl, copy its numbers, and show it.

        Raises OSError, naming the file, if it cannot be written: a full disk.
        """
        if self._file is None:
            return
        if os.fstat(self._file.fileno()).st_nlink == 0 and self._path.parent.is_dir():
            _logger.warning("%s was removed: its lines are lost, training goes on with a new one", self._path)
            self._file.close()
            self._file = open(self._path, "ab", buffering=0)
        try:
            self._file.write((json.dumps(plain(record)) + "\n").encode())
        except OSError as error:
            raise OSError(error.errno, f"cannot write metrics: {error.strerror}", str(self._path)) from error
        axes, values = scalars_of(record)
        self._step = int(axes.get("step", self._step))
        self._each(lambda sink: sink.scalars(self._step, axes, values))
        if self._console is not None:
            self._console.show(record)

    def histograms(self, step: int, tensors: dict[str, "torch.Tensor"]) -> None:
        """Copy the distribution of each tensor (any shape) to W&B and TensorBoard, without its NaN and infinities."""
        import numpy as np

        for name, tensor in tensors.items() if self._sinks else ():
            values = tensor.detach().float().flatten().cpu().numpy()
            values = values[np.isfinite(values)]
            if values.size:
                self._each(lambda sink, name=name, values=values: sink.histogram(step, name, values))  # type: ignore[misc]

    def figure(self, name: str, path: Path) -> None:
        """Copy a PNG file to W&B and TensorBoard, at the step of the last record."""
        self._each(lambda sink: sink.image(self._step, name, path))

    def text(self, name: str, text: str) -> None:
        """Copy a text (Markdown in TensorBoard) to W&B and TensorBoard."""
        self._each(lambda sink: sink.text(self._step, name, text))

    def exhibit(self, name: str, build: Callable[[], Exhibit | None]) -> None:
        """Show something, if it is something, to the copies, at the step of the last record.

        It is built only where there is a copy.
        """
        if self._sinks and (item := build()) is not None:
            self._each(lambda sink: sink.exhibit(self._step, name, item))

    def alert(self, title: str, text: str) -> None:
        """Have W&B write to whoever wants to be told (by W&B's own settings), if it is online."""
        self._each(lambda sink: sink.alert(title, text))

    def graph(self, model: "nn.Module", images: "torch.Tensor") -> None:
        """Draw the unwrapped network in TensorBoard, traced with the first image of (N, C, H, W); never fatal.

        The model, its running statistics and all random generators are left as they were.
        """
        for sink in self._sinks:
            try:
                with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                    warnings.simplefilter("ignore")
                    sink.graph(model, images)
            except Exception as error:
                self.say(f"note: no graph of the network in {sink.name} ({first_line(error)})")

    def finish(self, summary: dict[str, Any], *, exit_code: int = 0) -> None:
        """Hand the final metrics to the copies and close everything; takes a limited time, may be called twice.

        `exit_code` other than 0 marks the W&B run as failed. TensorBoard's table of settings and final metrics is
        written when `summary["state"]` is absent or "finished".
        """
        self._each(lambda sink: sink.close(summary, exit_code))
        self._sinks.clear()
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._console is not None:
            self._console.close()

    def _each(self, action: Callable[[Sink], None]) -> None:
        for sink in list(self._sinks):
            try:
                action(sink)
            except Exception as error:
                self._sinks.remove(sink)
                self.say(f"warning: {sink.name} stopped ({first_line(error)}); metrics.jsonl goes on without it")


def _open_sinks(
    config: Config, run_dir: Path, resume_step: int, environment: dict[str, Any] | None, say: Callable[[str], None]
) -> list[Sink]:
    """The copies that the settings ask for; their libraries take seconds to import, so only these are imported."""
    sinks: list[Sink] = []
    try:
        if config.log.tensorboard:
            from lockstep.run.tensorboard import TensorBoard

            sinks.append(TensorBoard(config, run_dir, resume_step))
    except Exception as error:
        say(f"warning: TensorBoard is off ({first_line(error)})")
    try:
        if config.log.wandb != "disabled":
            from lockstep.run.wandb import Wandb, open_wandb

            run = open_wandb(config, run_dir, environment, say)
            if run:
                sinks.append(Wandb(run))
    except Exception as error:
        say(f"warning: W&B is off ({first_line(error)})")
    for name in config.log.trackers:
        try:
            from lockstep.run.accelerate import AccelerateTracker

            sinks.append(AccelerateTracker(name, config, run_dir))
        except Exception as error:
            say(f"warning: {name} is off ({first_line(error)})")
    return sinks


def build_tracker(
    config: Config, run_dir: Path, is_main: bool, resume_step: int = 0, environment: dict[str, Any] | None = None
) -> Tracker:
    """Open the run for training from `resume_step` on; what was logged after that step is dropped.

    `is_main`: false gives a tracker that does nothing, not even make a file. `environment` is appended to
    `<run_dir>/environment.json`, a list with one entry per start, and kept in the W&B config. W&B: one run for life,
    its id in `<run_dir>/wandb/run_id`; without an API key or a server it goes offline, says so, and never asks.
    """
    if not is_main:
        return Tracker(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    truncate_history(run_dir, resume_step)
    if environment is not None:
        write_json(run_dir / ENVIRONMENT, [*read_starts(run_dir), environment])
    console = Console(config.train.epochs)
    sinks = _open_sinks(config, run_dir, resume_step, environment, console.say)
    return Tracker(run_dir, console, sinks, step=resume_step)
