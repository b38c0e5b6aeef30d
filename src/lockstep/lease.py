"""Who owns a folder or a file: a lease beside it that one process holds and keeps alive, on any file system.

A lock of the operating system would hang or do nothing on some network file systems, and cannot say who holds it. A
lease is a small JSON file: made with a hard link, of which only one of many can succeed, rewritten every few seconds,
removed at the end. One whose process is gone is taken over: at once where that can be seen, on another machine when
there was no sign of life for a while.
"""

import contextlib
import json
import logging
import os
import platform
import secrets
import stat
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import psutil

from lockstep.errors import UserError
from lockstep.files import replace_file

_logger = logging.getLogger(__name__)

_LOOK_SECONDS = 0.05
BEAT_SECONDS = 10.0
SILENCE_SECONDS = 90.0
"""Network file systems show another machine's writing up to a minute late"""
ANCIENT_SECONDS = 600.0
"""By the clocks of two machines, which may differ by minutes"""


@dataclass(frozen=True)
class Owner:
    """The process that holds a lease, and its last sign of life."""

    host: str
    processes: str
    """Which table of processes `pid` belongs to: that of a boot, or of a container in it"""
    token: str
    pid: int
    born: float
    """Start of the process, in seconds since 1970: numbers are used again"""
    beat: float
    """Last sign of life, in seconds since 1970"""

    @property
    def is_gone(self) -> bool:
        """Whether this machine can tell that the process has ended."""
        if self.processes != _table_of_processes():
            return False
        try:
            return abs(psutil.Process(self.pid).create_time() - self.born) > 1
        except (psutil.Error, ValueError, OverflowError):
            return True

    @property
    def is_here(self) -> bool:
        """Whether the process is one of this machine, and lives."""
        return self.processes == _table_of_processes() and not self.is_gone

    def __str__(self) -> str:
        seen = datetime.fromtimestamp(self.beat, UTC).astimezone().isoformat(" ", "seconds")
        return f"process {self.pid} on {self.host} (last sign of life: {seen})"


def _table_of_processes() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return platform.node()


class Lease:
    """At most one process holds the lease of a path."""

    def __init__(self, path: Path) -> None:
        """`path` is the lease's own file."""
        self.path = path
        self._own: Owner | None = None
        self._writing = threading.Lock()
        self._ended = threading.Event()

    def take(self) -> Owner | None:
        """Take it, or return the owner, who lives; waits up to SILENCE_SECONDS for a sign of life of another machine's.

        Raises UserError if something else is in the file's place.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        watched, since, told = _read(self.path), time.monotonic(), False
        while not self._make():
            owner = _read(self.path)
            if owner is not None and owner.is_here:
                return owner
            if _token(owner) != _token(watched):
                watched, since, told = owner, time.monotonic(), False
            silent_seconds = time.monotonic() - since
            if owner is None:
                if silent_seconds > BEAT_SECONDS:  # of no lease: nobody writes like that
                    self._evict(None)
            elif owner.is_gone or silent_seconds > SILENCE_SECONDS or time.time() - owner.beat > ANCIENT_SECONDS:
                self._evict(owner)
            elif owner != watched:
                return owner
            elif not told:
                _logger.info("%s is held by %s: waiting up to %.0f s for another", self.path, owner, SILENCE_SECONDS)
                told = True
            time.sleep(_LOOK_SECONDS)
        return None

    def problem(self) -> str | None:
        """What has become of a lease that was taken, if it is lost: the file went, or another process has it."""
        if self._own is None:
            return None
        try:
            owner = _read(self.path)
        except OSError:  # of a file system that is in trouble: it says nothing of the lease
            return None
        if owner is not None and owner.token == self._own.token:
            return None
        return "was removed" if owner is None else f"was taken over by {owner}"

    def release(self) -> None:
        """Give it back, if it is still held."""
        self._ended.set()
        with self._writing:
            if self._own is not None and self.problem() is None:
                self.path.unlink(missing_ok=True)
            self._own = None

    def _make(self) -> bool:
        process = psutil.Process()
        born, token = process.create_time(), secrets.token_hex(8)
        own = Owner(platform.node(), _table_of_processes(), token, process.pid, born, time.time())
        aside = self.path.with_name(f".{self.path.name}.{own.token}.tmp")
        replace_file(aside, json.dumps(asdict(own)).encode())
        try:
            _link(aside, self.path)
        except FileExistsError:
            return False
        finally:
            aside.unlink(missing_ok=True)
        self._own = own
        threading.Thread(target=self._live, name="lease", daemon=True).start()
        return True

    def _live(self) -> None:
        """Rewrite the file every few seconds, as long as it is there and says that this process holds it."""
        while not self._ended.wait(BEAT_SECONDS):
            with self._writing, contextlib.suppress(OSError):  # a disk that is full for a while
                if self._own is None or self.problem() is not None:
                    return
                replace_file(self.path, json.dumps(asdict(replace(self._own, beat=time.time()))).encode())

    def _evict(self, owner: Owner | None) -> None:
        """Remove the file, if it is still this owner's: of several that try, only one renames it."""
        aside = self.path.with_name(f".{self.path.name}.{secrets.token_hex(8)}.tmp")
        with contextlib.suppress(FileNotFoundError):
            os.rename(self.path, aside)
            found = _read(aside)
            if found is not None and (owner is None or found.token != owner.token):
                with contextlib.suppress(FileExistsError):  # somebody took it in the meantime
                    _link(aside, self.path)
            aside.unlink()


def owner_of(path: Path) -> Owner | None:
    """Who holds a lease, by its file; None for one that has ended, or of whom there was no sign for minutes."""
    owner = _read(path)
    if owner is None or owner.is_gone or (not owner.is_here and time.time() - owner.beat > ANCIENT_SECONDS):
        return None
    return owner


def _link(source: Path, target: Path) -> None:
    """Give a file a second name, if nobody has that name; a copy where the file system knows no such links."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:
        with target.open("xb") as copy:
            copy.write(source.read_bytes())


def _read(path: Path) -> Owner | None:
    """What a lease says; None if it is not there or says nothing. Raises UserError if it is no plain file."""
    try:
        is_file = stat.S_ISREG(os.lstat(path).st_mode)
    except FileNotFoundError:
        return None
    if not is_file:
        raise UserError(f"{path} is not a file: remove it")
    try:
        said = json.loads(path.read_bytes())
        host, processes, token = (str(said[key]) for key in ("host", "processes", "token"))
        owner = Owner(host, processes, token, int(said["pid"]), float(said["born"]), float(said["beat"]))
    except (FileNotFoundError, ValueError, TypeError, KeyError, OverflowError):
        return None
    return owner if 0 <= owner.beat < 1e11 else None


def _token(owner: Owner | None) -> str | None:
    return None if owner is None else owner.token


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Within it this process holds the lease of that file; waits until nobody else does."""
    lease = Lease(path)
    while lease.take() is not None:
        time.sleep(0.1)
    try:
        yield
    finally:
        lease.release()
