"""Files that are whole or not there: flushed to the disk, described by checksums."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

MANIFEST = "manifest.json"


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


def manifest_problem(folder: Path, required: Sequence[str]) -> str | None:
    """What is wrong with a folder, or None if it has the required files and every file is as its manifest says."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        unlisted = [name for name in required if name not in manifest]
        if unlisted:
            return f"{MANIFEST} does not list {unlisted[0]}"
        for name, expected in manifest.items():
            path = folder / name
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
            if checksum(path) != expected["sha256"]:
                return f"{name} was altered"
    except FileNotFoundError as missing:
        return f"{Path(missing.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as damage:
        return f"{MANIFEST} is not readable: {damage}"
    return None
