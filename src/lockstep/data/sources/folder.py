"""`folder:<path>`: image files in class folders, `path/[train|val|test/]<class>/**/<image>`."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from lockstep.data.sources.source import (
    IMAGE_EXTENSIONS,
    LOOKED_AT_BYTES,
    LOOKED_INTO,
    VAL_NAMES,
    Source,
    Split,
    digest_of,
    open_encoded,
    spread,
)
from lockstep.errors import UserError
from lockstep.files import path_of
from lockstep.settings.config import DataConfig
from lockstep.settings.types import is_name

_SPLIT_NAMES = ("test", "testing", "training", *VAL_NAMES)
"""What may stand beside train, and is no class where nothing else stands there"""
_THREADS = 16
"""That list classes: a network disk answers many questions at once as fast as one"""


@dataclass(frozen=True, eq=False)
class _Files:
    """Paths as a bytes array: forked workers share it, a list of strings they would copy by counting references."""

    root: Path
    paths: np.ndarray

    def path(self, row: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.paths[row]))

    def __call__(self, row: int) -> Image.Image:
        return open_encoded(self.path(row))


class _Listing(NamedTuple):
    """Paths as bytes (N,); what tells of a change, and what stays in a copy: a string for all, as that takes less."""

    paths: np.ndarray
    stamps: bytes
    sizes: bytes


def open_folder(name: str, config: DataConfig) -> Source:
    """Open a folder of image files; raises UserError if it or its class folders are not as they should be."""
    root = path_of(name)
    if not root.is_dir():
        raise UserError(f"--data.source={config.source!r}: there is no folder {root.resolve()}")
    folders = {"train": root}
    if (root / "train").is_dir():
        candidates = {"train": ("train",), "val": VAL_NAMES, "test": ("test",)}
        folders = {split: root / found for split, names in candidates.items()
                   if (found := next((name for name in names if (root / name).is_dir()), None))}  # fmt: skip
    classes = _class_folders(folders["train"])
    splits: dict[str, Split] = {}
    listing, content = [], []
    for split, folder in folders.items():
        strangers = set(_class_folders(folder)) - set(classes)
        if strangers:
            raise UserError(f"{folder / min(strangers)} is a class that {folders['train']} does not have")
        with ThreadPoolExecutor(_THREADS) as pool:
            listings = list(pool.map(partial(_list_class, folder), classes))
        counts = [len(found.paths) for found in listings]
        listing += [split.encode(), *(found.stamps for found in listings if len(found.paths))]
        content += [split.encode(), *(found.sizes for found in listings if len(found.paths))]
        reader = _Files(folder, np.concatenate([found.paths for found in listings]))
        content += [_beginning(Path(reader.path(row))) for row in spread(sum(counts), LOOKED_INTO)]
        labels = np.repeat(np.arange(len(classes), dtype=np.int64), counts)
        splits[split] = Split(split, labels, reader, reader.path)
    fingerprint = digest_of(str(root.resolve()).encode(), *listing)
    return Source(config.source, tuple(classes), splits, fingerprint, digest_of(*content))


def _beginning(path: Path) -> bytes:
    """The first bytes of a file; none if it cannot be read, which is told when its image is needed."""
    try:
        with path.open("rb") as file:
            return file.read(LOOKED_AT_BYTES)
    except OSError:
        return b""


def _class_folders(folder: Path) -> list[str]:
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise UserError(f"{folder} holds no class folders: images belong in {folder}/<class>/<image>.png")
    for name in names:
        if not is_name(name):  # bytes that are no UTF-8 among them
            raise UserError(f"{folder} has a class whose name is no plain text, {name!r}: rename the folder")
    if all(name in _SPLIT_NAMES for name in names):
        raise UserError(f"{folder} holds {' and '.join(names)}, and no train: name the folder to train on train")
    if len(names) == 1:
        raise UserError(f"{folder} holds only one class, {names[0]}: classification needs two")
    return names


def _list_class(folder: Path, name: str) -> _Listing:
    """The images of a class that `folder` has, or none of one that it lacks."""
    place, above = folder / name, os.path.join(folder, "")
    files = sorted(_images_below(above + name, (str(place.resolve().parent),))) if place.is_dir() else []
    if not files and place.is_dir():
        raise UserError(f"{place} holds no images ({' '.join(IMAGE_EXTENSIONS)}): fill or remove the class")
    paths = [os.fsencode(file[len(above) :]) for file in files]
    sizes, times = [], []
    for file, path in zip(files, paths, strict=True):
        try:
            status = os.stat(file)
        except OSError:  # a broken link, or no permission: it is told when its image is read
            sizes.append(b"")
            times.append(path)
        else:
            sizes.append(b"%b|%d" % (path, status.st_size))
            times.append(b"%b|%d" % (sizes[-1], status.st_mtime_ns))
    return _Listing(np.array(paths, dtype=np.bytes_), b"|".join(times), b"|".join(sizes))


def _images_below(folder: str, above: tuple[str, ...]) -> Iterator[str]:
    """Paths of the images in a folder and those below it, through links too; `above` are the real folders above it.

    Raises UserError for a folder that cannot be read, for a pipe or a device, and for a link that leads back: it would
    show images of other classes, or the same ones without end.
    """
    own = os.path.realpath(folder)
    if any(os.path.commonpath((upper, own)) == own for upper in above):
        raise UserError(f"{folder} is a link to a folder that it lies in ({own}): remove it")
    try:
        with os.scandir(folder) as entries:
            inside = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror}): correct or remove it") from error
    for entry in inside:
        if entry.is_dir():
            yield from _images_below(entry.path, (*above, own))
        elif entry.name.lower().endswith(IMAGE_EXTENSIONS) and not entry.name.startswith("."):
            if not entry.is_file() and os.path.exists(entry.path):  # a pipe would be waited for; no file is told later
                raise UserError(f"{entry.path} is not a file: remove it")
            yield entry.path
