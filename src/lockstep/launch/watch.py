"""Which process the others wait for: named within seconds, and the run ended if it never comes.

A collective says nothing about who is missing, and waits for as long as it is allowed to. So a thread of every process
tells the first one, every second, where it is; that one judges, and tells all. These beats are datagrams between hosts:
they never block, whatever happens to a process, a device or a network.
"""

import atexit
import contextlib
import json
import logging
import os
import platform
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lockstep.errors import end_at_once
from lockstep.launch.stack import START, place

_logger = logging.getLogger(__name__)

_BEAT_SECONDS = 1.0
NAMED_SECONDS = 8.0
"""Of others' waiting, or of silence: a process is named before 10 s have passed"""
_AGAIN_SECONDS = 60.0
"""Between two lines about the same processes, which may be slow at every step"""
_START_SECONDS = 60.0
"""Of others' waiting for one that prepares the data, which may take long, until it is named"""
_MEETING_SECONDS = 10.0
_LARGEST_DATAGRAM = 65_000
_MOST_NAMES = 4


@dataclass(frozen=True)
class Beat:
    """What a process says of itself."""

    rank: int
    host: str
    step: int = 0
    phase: str = START
    waits: bool = False
    seconds: float = 0.0
    """Since it came to this phase of this step"""
    stack: str = ""

    @property
    def suspicion(self) -> int:
        """0: it waits; 1: it may, because the end of the backward pass can be a wait of torch's own; 2: it works."""
        return 0 if self.waits else 1 if self.phase == "backward" else 2

    @property
    def where(self) -> str:
        return self.phase if self.phase == START else f"{self.phase} of step {self.step}"


@dataclass(frozen=True)
class Stall:
    """Others wait for these, and how to say so."""

    culprits: tuple[tuple[int, int, str], ...]
    """Rank, step, phase"""
    line: str
    may_last: bool = False
    """It is named, and does not end the run"""


def judge(beats: Sequence[Beat], silent: dict[int, float]) -> Stall | None:
    """Whom the others wait for, if they have waited for NAMED_SECONDS; `silent` has the ranks that do not beat.

    Those in an earlier step than the rest, and among them those that work rather than wait. All of them, if all wait.
    """
    gone = [beat for beat in beats if beat.rank in silent]
    if gone:
        who = f"{max(silent.values()):.0f} s from {_listed(gone)}, by its last word"
        line = f"no sign of life for {who}: machine, network or process stand still"
        return Stall(_places(gone), line)
    patience = max((beat.seconds for beat in beats if beat.suspicion < 2), default=0)
    first = min((beat.step, -beat.suspicion) for beat in beats)
    behind = [beat for beat in beats if (beat.step, -beat.suspicion) == first]
    prepares = any(beat.phase == START for beat in behind)
    if patience < (_START_SECONDS if prepares else NAMED_SECONDS):
        return None
    others = [beat for beat in beats if beat not in behind]
    if others:
        line = f"{len(others)} of {len(beats)} ranks wait for {_listed(behind)}; they wait in {others[0].where}"
        return Stall(_places(behind), line, may_last=prepares)
    # They all work, or they all wait: for different things, if not in the same place.
    if behind[0].suspicion or any(beat.seconds < NAMED_SECONDS for beat in behind):
        return None
    return Stall(_places(behind), f"all ranks wait for one another: {_listed(behind)}")


def _places(beats: Sequence[Beat]) -> tuple[tuple[int, int, str], ...]:
    return tuple((beat.rank, beat.step, beat.phase) for beat in beats)


def _listed(beats: Sequence[Beat]) -> str:
    """`rank 3 (node7) and 4 more [12 s in data of step 80, at loader.py:90 ...]`, and the like for other places."""
    groups: dict[str, list[Beat]] = {}
    for beat in beats:
        groups.setdefault(beat.where, []).append(beat)
    return ", ".join(map(_described, groups.values()))


def _described(group: list[Beat]) -> str:
    """Of processes in one place."""
    names = [f"rank {beat.rank} ({beat.host})" for beat in group[:_MOST_NAMES]]
    names += [f"{len(group) - _MOST_NAMES} more"] * (len(group) > _MOST_NAMES)
    return f"{' and '.join(names)} [{group[0].seconds:.0f} s in {group[0].where}, at {group[0].stack}]"


class _Patience:
    """How long a stall may last until it is named, and until it ends the run."""

    def __init__(self, stuck_seconds: int, say: Callable[[str], None]) -> None:
        self._stuck_seconds, self._say = stuck_seconds, say
        self._stall: Stall | None = None
        self._since = 0.0
        self._said: dict[tuple[int, ...], float] = {}

    def consider(self, stall: Stall | None) -> str | None:
        """Name a stall that is new; returns the line to end with if it has lasted too long."""
        now = time.monotonic()
        if stall is None or self._stall is None or stall.culprits != self._stall.culprits:
            self._since = now - NAMED_SECONDS
        self._stall = stall
        if stall is None:
            return None
        if not stall.may_last and now - self._since >= self._stuck_seconds:
            return f"{stall.line}. Nothing came for --runtime.stuck_seconds={self._stuck_seconds}: all end here"
        ranks = tuple(rank for rank, *_ in stall.culprits)
        if now - self._said.get(ranks, -_AGAIN_SECONDS) >= _AGAIN_SECONDS:
            self._said[ranks] = now
            self._say(stall.line)
        return None


class Watch:
    """Beats for this process, from a thread, and judges on the first one, until the program ends."""

    def __init__(self, rank: int, gather: Callable[[Any], list[Any]], stuck_seconds: int) -> None:
        """`gather` gives what every process has, by rank; all processes must make one at once."""
        self.step_of: Callable[[], int] = lambda: 0
        self._rank, self._host = rank, platform.node()
        self._hosts = gather(self._host)
        self._socket = socket.socket(_first_address(0)[0], socket.SOCK_DGRAM)
        self._socket.bind(("", 0))
        # Datagrams of others are none of ours: the token is known to this run alone.
        (port, self._token), *_ = gather((self._socket.getsockname()[1], secrets.token_bytes(16)))
        self._first = _first_address(port)[1]
        # Where the first process is silent, only one on each machine says so.
        speaks = rank < 2 or os.environ.get("LOCAL_RANK") == "0"
        self._patience = _Patience(stuck_seconds, _logger.warning if speaks else lambda line: None)
        self._speaks = speaks
        self._heard: dict[int, tuple[float, Beat]] = {}
        self._left: set[int] = set()
        self._addresses: dict[int, Any] = {}
        self._verdict_heard = 0.0
        self._place: tuple[int, str, bool] | None = None
        self._place_since = 0.0
        self._ended = threading.Event()
        self.is_on = all(gather(self._meets()))

    def _meets(self) -> bool:
        """Whether datagrams come through: to the first process from all, and from it to each."""
        deadline = time.monotonic() + _MEETING_SECONDS
        missing = set(range(1, len(self._hosts))) if self._rank == 0 else {0}
        while missing and time.monotonic() < deadline:
            if self._rank:
                self._send(self._first, {"beat": asdict(Beat(self._rank, self._host))})
            missing -= self._receive(_MEETING_SECONDS / 100)
            if self._rank == 0:
                self._tell({"end": None})
        return not missing

    def start(self) -> None:
        """Watch from now on; call it where `is_on`, which is the same on all processes."""
        self._verdict_heard = time.monotonic()
        self._heard = {rank: (self._verdict_heard, beat) for rank, (_, beat) in self._heard.items()}
        atexit.register(self.leave)
        threading.Thread(target=self._live, name="watch", daemon=True).start()

    def leave(self) -> None:
        """Say that this process is done, so that nobody waits for its beats."""
        self._ended.set()
        for _ in range(3):  # one may get lost
            self._send(self._first, {"left": self._rank})
            if self._rank == 0:
                self._tell({"left": True})

    def _live(self) -> None:
        try:
            self._watch()
        except Exception:  # a slip of this thread's: its silence must not end a training that is sound
            _logger.exception("the watch failed; this process is not watched any longer")
            self.leave()

    def _watch(self) -> None:
        due = time.monotonic()
        while not self._ended.is_set():
            self._receive(due - time.monotonic())
            if time.monotonic() < due or self._ended.is_set():
                continue
            due = time.monotonic() + _BEAT_SECONDS
            beat = self._beat()
            line = self._patience.consider(self._judge(beat) if self._rank == 0 else self._judge_first(beat))
            if self._rank == 0:
                self._tell({"end": line})
            else:
                self._send(self._first, {"beat": asdict(beat)})
            if line is not None:
                end_at_once(line, speaks=self._speaks)

    def _beat(self) -> Beat:
        here, now, step = place(), time.monotonic(), self.step_of()
        if self._place != (step, here.phase, here.waits):
            self._place, self._place_since = (step, here.phase, here.waits), now
        seconds = now - self._place_since
        return Beat(self._rank, self._host, step, here.phase, here.waits, round(seconds, 1), here.stack)

    def _judge(self, own: Beat) -> Stall | None:
        now = time.monotonic()
        silent = {rank: now - at for rank, (at, _) in self._heard.items() if now - at >= NAMED_SECONDS}
        return judge([own, *(beat for _, beat in self._heard.values())], silent)

    def _judge_first(self, own: Beat) -> Stall | None:
        """On the others: whether the first process is there, which alone can judge the rest."""
        silence = time.monotonic() - self._verdict_heard
        if silence < NAMED_SECONDS:
            return None
        last = Beat(0, self._hosts[0], own.step, own.phase, waits=False, seconds=silence, stack="")
        return judge([last, own], {0: silence})

    def _tell(self, verdict: dict[str, Any]) -> None:
        for address in list(self._addresses.values()):
            self._send(address, verdict)

    def _send(self, address: Any, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError, TypeError):  # of a network that is down for a while, or no address
            self._socket.sendto(self._token + json.dumps(message).encode(), address)

    def _receive(self, seconds: float) -> set[int]:
        """Take in what comes within so many seconds, or has come; returns whose."""
        came: set[int] = set()
        with contextlib.suppress(OSError):  # nothing more
            while True:
                self._socket.settimeout(0.001 if came else max(seconds, 0.001))
                content, address = self._socket.recvfrom(_LARGEST_DATAGRAM)
                if content.startswith(self._token):
                    came.add(self._take_in(json.loads(content[len(self._token) :]), address))
        return came

    def _take_in(self, message: dict[str, Any], address: Any) -> int:
        """Note a message; returns whose it is."""
        if "beat" in message:
            beat = Beat(**message["beat"])
            if beat.rank in self._left:  # one that overtook the word that it leaves
                return beat.rank
            self._heard[beat.rank], self._addresses[beat.rank] = (time.monotonic(), beat), address
            return beat.rank
        if self._rank == 0:
            self._left.add(message["left"])
            self._heard.pop(message["left"], None)
            return int(message["left"])
        self._verdict_heard = time.monotonic()
        if message.get("left"):
            self._ended.set()
        elif message["end"] is not None:
            end_at_once(message["end"], speaks=False)
        return 0


def _first_address(port: int) -> tuple[socket.AddressFamily, Any]:
    """Family and address of the first process, where all processes meet."""
    try:
        family, *_, address = socket.getaddrinfo(os.environ["MASTER_ADDR"], port, type=socket.SOCK_DGRAM)[0]
    except OSError:
        return socket.AF_INET, None
    return family, address
