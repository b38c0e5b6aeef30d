"""Files that are whole or not there: written aside, flushed to the disk, renamed; described by checksums."""

import contextlib
import hashlib
import json
import math
import os
import secrets
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from lockstep.errors import UserError

MANIFEST = "manifest.json"


def path_of(text: str | Path) -> Path:
    """A path of the settings: `~` is the user's home, also where no shell has said so."""
    return Path(os.path.expanduser(text))


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[BinaryIO]:
    """A file that gets its name when it is complete and on the disk, or never: readers see the old one or the new one.

    Folders above it are made. A kill leaves the unfinished file, which `remove_unfinished` finds. Raises OSError,
    naming the file, when the disk is full or cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        # A name that nobody else has, and no link that somebody may have put there.
        handle = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
        with open(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # a full disk comes without a name
    finally:
        with contextlib.suppress(OSError):  # on a file system that cannot be written it says so again, of this name
            aside.unlink()


def write_at(file: int, data: Any, offset: int) -> None:
    """Write all of a buffer into an open file at an offset; processes that share it may do so at once."""
    left = memoryview(data).cast("B")
    while left:
        written = os.pwrite(file, left, offset)
        left, offset = left[written:], offset + written


def replace_file(path: Path, data: bytes) -> None:
    """Write a file as `written_aside` does."""
    with written_aside(path) as file:
        file.write(data)


def remove_unfinished(folder: Path, name: str = "*") -> None:
    """Remove what killed writers of a file, or of all in a folder, have left; for whoever alone writes there."""
    for stray in folder.glob(f".{name}.*.tmp"):
        stray.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file as `written_aside` does; NaN and infinities become "NaN", "Infinity" and "-Infinity"."""
    replace_file(path, (json.dumps(plain(value), indent=2) + "\n").encode())


def read_json(path: Path) -> Any:
    """What a JSON file holds; raises FileNotFoundError, and UserError for what is no file: a pipe would be waited for.

    Or ValueError for all that is not JSON.
    """
    require_plain_file(path)
    try:
        return json.loads(path.read_bytes())
    except RecursionError as error:
        raise ValueError(f"{path.name} is nested too deep") from error


def plain(value: Any) -> Any:
    """The value in JSON's own types; tensors and arrays as numbers or lists, non-finite floats as strings."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return json.dumps(value)
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def flush(path: Path) -> None:
    """fsync a file or folder, so that it is there after a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def checksum(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path) -> None:
    """Describe the files of a folder by size and checksum, and flush all of it to the disk."""
    manifest = {}
    for path in sorted(folder.iterdir()):
        flush(path)
        manifest[path.name] = {"bytes": path.stat().st_size, "sha256": checksum(path)}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
    flush(folder / MANIFEST)
    flush(folder)


def manifest_problem(folder: Path, required: Sequence[str]) -> str | None:
    """What is wrong with a folder, or None if it has the required files and every file is as its manifest says."""
    try:
        manifest = read_json(folder / MANIFEST)
        unlisted = [name for name in required if name not in manifest]
        if unlisted:
            return f"{MANIFEST} does not list {unlisted[0]}"
        for name, expected in manifest.items():
            path = folder / name
            if path.parent != folder:
                return f"{MANIFEST} lists {name}, which lies elsewhere"
            require_plain_file(path)
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
            if checksum(path) != expected["sha256"]:
                return f"{name} was altered"
    except FileNotFoundError as missing:
        return f"{Path(missing.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as damage:
        return f"{MANIFEST} is not readable: {damage}"
    return None


def require_plain_file(path: Path) -> None:
    """Raise UserError for what could be read for ever, or waited for: pipes, devices, sockets."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise UserError(f"{path} is not a file: remove it")
