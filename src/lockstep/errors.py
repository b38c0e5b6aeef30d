"""What goes wrong, and how a program says so: a mistake of the user in one line, a slip of ours by its traceback."""

import difflib
import errno
import json
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from pathlib import Path
from typing import NoReturn

_FIRST_PROCESS_SPEAKS_SECONDS = 10
_EXIT_SECONDS = 20
"""What a process whose machine or peers failed it may take for its clean-up"""


class UserError(ValueError):
    """A mistake that whoever started the program can mend. The message is one line: what, where, what to do."""


class UsageError(UserError):
    """A mistake in the command line, found before anything was started."""


def did_you_mean(unknown: str, names: Iterable[str]) -> str:
    """` Did you mean ...?` for the one or two names nearest to an unknown one; empty where none is near.

    Upper and lower case count alike, and so does what follows a name's last dot.
    """
    whole = {name.lower(): name for name in sorted(names)}
    last_part = {name.rsplit(".", 1)[-1]: original for name, original in whole.items()}
    sought = unknown.lower()
    near = [whole[match] for match in difflib.get_close_matches(sought, whole, n=3, cutoff=0.6)]
    near += [last_part[match] for match in difflib.get_close_matches(sought.rsplit(".", 1)[-1], last_part, n=2)]
    unique = list(dict.fromkeys(near))[:2]
    return f" Did you mean {' or '.join(unique)}?" if unique else ""


def first_line(error: BaseException) -> str:
    """What an exception says, shortened to a line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def is_first_of_machine() -> bool:
    """Whether the launcher started no process before this one here; where its variable holds no number, it is alone."""
    local_rank = os.environ.get("LOCAL_RANK", "0")
    return not local_rank.isdecimal() or int(local_rank) == 0


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the program with one line for a UserError, and for what a machine or a peer does to it.

    That is a disk that is full or cannot be written, a killed data worker, a process of the run that is gone. The exit
    code is 2 for a mistake in the command line, 130 for Ctrl-C, else 1. Every other exception, also a plain ValueError,
    is a slip of ours or of a library and keeps its traceback. Processes that fail alike should say so once: all but the
    first of a machine give that one time to speak, and the launcher then ends them.
    """
    is_first = is_first_of_machine()
    for stream in (sys.stdout, sys.stderr):  # a name of the user's, where a terminal has another encoding
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    except KeyboardInterrupt:
        _print_last("interrupted", speaks=is_first)
        raise SystemExit(130) from None
    except UsageError as mistake:
        if is_first:
            _print_last(f"error: {mistake}")
        raise SystemExit(2) from None
    except UserError as mistake:
        if not is_first:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # nothing is left to save
            time.sleep(_FIRST_PROCESS_SPEAKS_SECONDS)
        _print_last(f"error: {mistake}")
        raise SystemExit(1) from None
    except (OSError, RuntimeError, MemoryError) as failure:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch raises from there, again, for each worker that ends
        line = _describe_outside_failure(failure)
        if line is None:
            raise
        _print_last(line)
        # Seen: a process that hangs in the clean-up of its interpreter, after its peers had been killed.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(_EXIT_SECONDS)
        raise SystemExit(1) from None


def end_at_once(line: str, *, speaks: bool) -> NoReturn:
    """End this process with a line, whatever its threads are in; unless it `speaks`, another process prints it."""
    _print_last(f"error: {line}; the same command continues", speaks=speaks)
    os._exit(1)


def print_line(text: str) -> None:
    """Print, also where nobody reads any longer: a closed pipe is no reason to end a training."""
    try:
        print(f"{text}\n", end="", flush=True)  # at once: a kill between text and newline would glue two lines together
    except BrokenPipeError:
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _print_last(line: str, *, speaks: bool = True) -> None:
    """Print the line, and leave it to torchrun, whose own report of the failure comes last and ends with it."""
    if speaks:
        print(line, file=sys.stderr, flush=True)
    if place := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with suppress(OSError):
            Path(place).write_text(json.dumps({"message": line, "timestamp": int(time.time())}))


_DISK_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
_ODD_PATHS = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP)
_MOST_SHOWN = 300
_PEER_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")


def _describe_outside_failure(failure: OSError | RuntimeError | MemoryError) -> str | None:
    """One line for what the program cannot help; None for an error of its own."""
    if isinstance(failure, MemoryError):
        return f"error: not enough memory ({first_line(failure)})"
    if isinstance(failure, OSError):
        place = f" ({os.fsdecode(failure.filename)[:_MOST_SHOWN]})" if isinstance(failure.filename, str | bytes) else ""
        return f"error: {failure.strerror}{place}" if failure.errno in _DISK_TROUBLE + _ODD_PATHS else None
    text = str(failure)
    if text.startswith("DataLoader worker"):  # torch raises it wherever the program is when a worker dies
        cause = text.split(". ")[0]
        return f"error: {cause}; if memory or /dev/shm is short, lower --data.workers. The same command continues"
    if "gloo" in text and any(sign in text for sign in _PEER_GONE):
        return "ended: another process of this run is gone; it, or the launcher, says why. The same command continues"
    return None
