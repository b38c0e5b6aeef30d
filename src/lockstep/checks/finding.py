"""What the checks of `lockstep doctor` find, and what they hand on to one another."""

import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

from accelerate import Accelerator

from lockstep.data.images import Data
from lockstep.errors import is_first_of_machine
from lockstep.launch.accelerator import Launch
from lockstep.run.folder import Run
from lockstep.settings.config import Config
from lockstep.training.learner import Learner

Status = Literal["ok", "skipped", "warning", "failed"]
_SEVERITY: tuple[Status, ...] = ("ok", "skipped", "warning", "failed")


class Finding(NamedTuple):
    """What a check found."""

    status: Status
    text: str


@dataclass
class Parts:
    """What the checks have built so far, for those that come after; None where that failed."""

    config: Config
    accelerator: Accelerator | None = None
    launch: Launch | None = None
    micro_batch_size: int | None = None
    run: Run | None = None
    data: Data | None = None
    signature: dict[str, int | str] | None = None
    learner: Learner | None = None

    @property
    def is_main(self) -> bool:
        return self.launch is None or self.launch.is_main


Check = Callable[[Parts], Finding | None]
"""None: nothing to say on this process"""

NO_LAUNCH = Finding("skipped", "the launch failed")


def combine(findings: Sequence[Finding | None]) -> Finding | None:
    """One finding from those of all ranks: the worst, each text once, naming the ranks where others differ."""
    by_rank = {rank: finding for rank, finding in enumerate(findings) if finding is not None}
    if not by_rank:
        return None
    worst = max((finding.status for finding in by_rank.values()), key=_SEVERITY.index)
    ranks: dict[str, list[int]] = defaultdict(list)
    for rank, finding in by_rank.items():
        if finding.status == worst:
            ranks[finding.text].append(rank)
    if worst == "ok" or (len(ranks) == 1 and len(next(iter(ranks.values()))) == len(by_rank)):
        return Finding(worst, next(iter(ranks)))
    texts = (f"rank{'s' * (len(who) > 1)} {', '.join(map(str, who))}: {text}" for text, who in ranks.items())
    return Finding(worst, "; ".join(texts))


def line_of(name: str, finding: Finding) -> str:
    """What is printed of a check."""
    return f"{finding.status:<8} {name:<11} {finding.text}"


@contextmanager
def time_limit(seconds: float, name: str, problem: str) -> Iterator[None]:
    """End the process with a `failed` line if the body takes longer: nothing gentler ends a waiting collective."""

    def end() -> None:
        if is_first_of_machine():
            print(line_of(name, Finding("failed", f"{problem} (gave up after {seconds:g} s)")), flush=True)
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
