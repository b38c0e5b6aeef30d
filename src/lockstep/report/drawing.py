"""Pictures, ready to be drawn, and several of them drawn at once.

matplotlib is Python: threads would take turns. So copies of this process draw, which have all that is shown at hand.
"""

import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

from lockstep.launch.copies import begin_copy
from lockstep.launch.machine import signal_at_death_of_parent
from lockstep.launch.threads import allowed_cores

_LONGEST_SECONDS = 60
"""A copy that takes longer hangs: it lacks the threads of this process, and one may have held a lock"""


class Drawing(NamedTuple):
    """A picture with all that it shows; it is drawn without torch, whose threads a copy of a process lacks."""

    path: Path
    plot: Callable[[Path], object]

    def draw(self) -> Path:
        """Write the picture; returns its path."""
        self.plot(self.path)
        return self.path


@contextmanager
def drawn_beside(drawings: Sequence[Drawing]) -> Iterator[None]:
    """Draw them beside what is done within it, by a copy of this process for each core; all are there at its end.

    What no copy could draw (one core, another system than Linux, no memory) is drawn here in the end, which raises
    what is wrong with it.
    """
    copies = _begin(drawings)
    try:
        yield
    finally:
        left = [drawing for share, copy in copies if not _is_done(copy) for drawing in share]
    for drawing in left if copies else drawings:
        drawing.draw()


def _begin(drawings: Sequence[Drawing]) -> list[tuple[Sequence[Drawing], BaseProcess | None]]:
    number = min(allowed_cores(), len(drawings))
    if number < 2 or sys.platform != "linux":
        return []
    return [(share, _copy(share)) for share in (drawings[first::number] for first in range(number))]


def _copy(share: Sequence[Drawing]) -> BaseProcess | None:
    """A copy of this process that draws its share, and ends; None where the system has no room for it."""
    try:
        return begin_copy(_draw, share)
    except OSError:
        return None


def _draw(share: Sequence[Drawing]) -> None:
    signal_at_death_of_parent(signal.SIGKILL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal, for the process that waits for this one
    try:
        for drawing in share:
            drawing.draw()
    except Exception:
        sys.exit(1)  # where it is drawn again it says what is wrong


def _is_done(copy: BaseProcess | None) -> bool:
    """Waits for it."""
    if copy is None:
        return False
    try:
        copy.join(_LONGEST_SECONDS)
    finally:
        copy.kill()  # nothing, if it has ended
        copy.join()
    return copy.exitcode == 0
