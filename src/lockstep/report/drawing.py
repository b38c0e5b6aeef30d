"""Pictures, ready to be drawn, and several of them drawn at once.

matplotlib is Python: threads would take turns. So copies of this process draw, which have all that is shown at hand.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from lockstep.launch.copies import copies_at_work, received
from lockstep.launch.threads import allowed_cores
from lockstep.report.canvas import new_figure

_LONGEST_SECONDS = 60
"""A copy that takes longer hangs: it lacks the threads of this process, and one may have held a lock"""


class Drawing(NamedTuple):
    """A picture with all that it shows; it is drawn without torch, whose threads a copy of a process lacks."""

    path: Path
    plot: Callable[[Path], object]
    title: str = ""
    """What it shows, in words"""

    def draw(self) -> Path:
        """Write the picture; returns its path."""
        self.plot(self.path)
        return self.path


@contextmanager
def drawn_beside(drawings: Sequence[Drawing]) -> Iterator[Iterator[Drawing]]:
    """Draw them beside what is done within it, by a copy of this process for each core; all are there at its end.

    Gives each drawing, in their order, when it is there. What no copy could draw (one core, another system than Linux,
    no memory, killed) is drawn here then. When all else is there, raises what was wrong with the first that cannot be.
    An error within it ends the copies.
    """
    workers = min(allowed_cores(), len(drawings))
    if workers > 1:
        new_figure(1, 1)  # matplotlib is imported once, and not by each copy
    with copies_at_work(Drawing.draw, drawings, workers if workers > 1 else 0) as copies:
        finished = _finished(drawings, copies)
        yield finished
        for _ in finished:  # what nobody within asked for
            pass


def _finished(drawings: Sequence[Drawing], copies: Sequence[Connection]) -> Iterator[Drawing]:
    trouble: list[Exception] = []
    answering: list[Connection | None] = [*copies] or [None]
    patience_ends = time.monotonic() + _LONGEST_SECONDS
    for index, drawing in enumerate(drawings):
        place = index % len(answering)
        copy = answering[place]
        try:
            if copy is not None and _is_drawn(copy, max(patience_ends - time.monotonic(), 0)):
                patience_ends = time.monotonic() + _LONGEST_SECONDS
            else:
                answering[place] = None  # a late answer would pass for that of the next
                drawing.draw()
        except Exception as error:
            trouble.append(error)
        else:
            yield drawing
    if trouble:
        raise trouble[0]


def _is_drawn(copy: Connection, most_seconds: float) -> bool:
    """Waits for the copy; whatever is wrong with a picture shows when it is drawn here."""
    try:
        received(copy, most_seconds)
    except Exception:
        return False
    return True
