"""`tar:<folder of shards>`: WebDataset's tar files, whose images are reached at random by an index."""

import errno
import glob
import io
import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from lockstep.data.sources.source import (
    LOOKED_AT_BYTES,
    LOOKED_INTO,
    VAL_NAMES,
    Source,
    Split,
    digest_of,
    open_encoded,
    spread,
)
from lockstep.data.sources.tar_index import Index, open_index
from lockstep.errors import UserError
from lockstep.files import path_of, require_plain_file
from lockstep.settings.config import DataConfig
from lockstep.settings.types import is_name

_CLASSES = "classes.txt"
_SPLITS = {"train": ("train", "training"), "val": VAL_NAMES, "test": ("test", "testing")}
"""Words in the name of a shard, or of its folder, that say which split it is of"""
_COMPRESSED = re.compile(r"\.(tar\.\w+|tgz|tbz2?|txz)$", re.IGNORECASE)
_MOST_OPEN = 256
"""Shards that a process keeps open: the usual limit is 1,024 files, and data workers need some for images"""


class _Shard(NamedTuple):
    """A file as it was when its headers were read."""

    path: str
    bytes: int
    changed_ns: int

    @classmethod
    def of(cls, path: Path) -> "_Shard":
        status = path.stat()
        return cls(str(path), status.st_size, status.st_mtime_ns)


class _Handle:
    """An open file, closed when nobody reads it any longer."""

    def __init__(self, shard: _Shard) -> None:
        try:
            self._number = os.open(shard.path, os.O_RDONLY)
        except FileNotFoundError as error:  # which for one image would mean that it can be skipped
            raise OSError(errno.EIO, "its shard is gone") from error
        status = os.fstat(self._number)
        if (status.st_size, status.st_mtime_ns) != shard[1:]:
            raise OSError(errno.EIO, "its shard was changed since the start")

    def __del__(self) -> None:
        if hasattr(self, "_number"):
            os.close(self._number)

    def read(self, offset: int, size: int) -> bytes:
        """Bytes at a place of their own, so that threads and forked processes share the handle."""
        content = os.pread(self._number, size, offset)
        if len(content) < size:
            raise OSError(errno.EIO, "its shard has become shorter")
        return content


class _OpenShards:
    """The handles of the shards that were read last; a process that it is sent to opens its own."""

    def __init__(self) -> None:
        self.handle = lru_cache(_MOST_OPEN)(_Handle)

    def __reduce__(self) -> tuple[type["_OpenShards"], tuple[()]]:
        return _OpenShards, ()


@dataclass(frozen=True, eq=False)
class _Images:
    """The images of an index."""

    shards: Sequence[_Shard]
    index: Index
    opened: _OpenShards

    def read_bytes(self, row: int, most: int | None = None) -> bytes:
        """The encoded image, or its beginning."""
        size = int(self.index.size[row])
        if size < 0:
            raise OSError("the image is missing")
        handle = self.opened.handle(self.shards[self.index.shard[row]])
        return handle.read(int(self.index.offset[row]), size if most is None else min(size, most))

    def __call__(self, row: int) -> Image.Image:
        return open_encoded(io.BytesIO(self.read_bytes(row)))

    def where(self, row: int) -> str:
        return f"{self.shards[self.index.shard[row]].path}: {os.fsdecode(self.index.name[row])}"

    def beginnings(self) -> list[bytes]:
        """Of some images; of one that is missing, which is told when it is needed, none."""
        rows = [row for row in spread(len(self.index), LOOKED_INTO) if self.index.size[row] >= 0]
        return [self.read_bytes(row, LOOKED_AT_BYTES) for row in rows]


def open_tar(name: str, config: DataConfig) -> Source:
    """Open a folder of shards, or those of a pattern; raises UserError if one is not as it should be."""
    root, found = _find_shards(name, config)
    opened = _OpenShards()
    images: dict[str, _Images] = {}
    fingerprints: list[bytes] = []
    content: list[bytes | np.ndarray] = []
    for split, shards in _by_split(root, found).items():
        index, fingerprint = open_index(shards, config)
        images[split] = _Images([_Shard.of(path) for path in shards], index, opened)
        fingerprints += [split.encode(), fingerprint.encode()]
        content += [split.encode(), index.name, index.size, index.label, *images[split].beginnings()]
    classes, labels = _classes(root, images)
    splits = {split: Split(split, labels[split], read, read.where) for split, read in images.items()}
    return Source(config.source, classes, splits, digest_of(*fingerprints), digest_of(*content))


def _find_shards(name: str, config: DataConfig) -> tuple[Path, list[Path]]:
    """The folder that all shards lie in, and the shards, in the order of their names."""
    place = path_of(name)
    if place.is_dir():
        root = place
        found = [path for pattern in ("*", "*/*") for path in place.glob(pattern) if not path.name.startswith(".")]
        found = [path for path in found if path.suffix.lower() == ".tar" or _COMPRESSED.search(path.name)]
    else:
        found = []
        for pattern in [str(place)] if place.is_file() else _written_out(str(place)):
            paths = [pattern] if os.path.isfile(pattern) else glob.glob(pattern)
            if not paths:
                raise UserError(f"--data.source={config.source!r}: there is no {os.path.abspath(pattern)}")
            found += map(Path, paths)
        root = Path(os.path.commonpath([path.parent for path in found]))
    for path in found:
        if _COMPRESSED.search(path.name):
            remedy = "unpack it to .tar, or name the shards by a pattern, as tar:shards/*.tar"
            raise UserError(f"{path} is compressed, and its images cannot be reached at random: {remedy}")
    if not found:
        raise UserError(f"--data.source={config.source!r}: {root} holds no .tar files")
    return root, sorted(set(found))


def _written_out(pattern: str) -> list[str]:
    """`{000..012}` and `{train,val}` as bash expands them: to one width if a number begins with 0, or downwards."""
    braces = re.search(r"\{([^{}]+)\}", pattern)
    if braces is None:
        return [pattern]
    ends = re.fullmatch(r"(\d+)\.\.(\d+)", braces[1])
    options = braces[1].split(",")
    if ends is not None:
        first, last = int(ends[1]), int(ends[2])
        step = 1 if first <= last else -1
        width = max(map(len, ends.groups())) if re.match(r"0\d", ends[1]) or re.match(r"0\d", ends[2]) else 0
        options = [f"{number:0{width}d}" for number in range(first, last + step, step)]
    filled = [f"{pattern[: braces.start()]}{option}{pattern[braces.end() :]}" for option in options]
    return [path for text in filled for path in _written_out(text)]


def _by_split(root: Path, shards: Sequence[Path]) -> Mapping[str, list[Path]]:
    """The shards of each split, by the words in their names; all are for training where no name has such a word."""
    found: dict[str | None, list[Path]] = defaultdict(list)
    for path in shards:
        words = set(re.split(r"[^a-z]+", str(path.relative_to(root)).lower()))
        splits = [split for split, names in _SPLITS.items() if words & set(names)]
        if len(splits) > 1:
            raise UserError(f"{path} names several splits, {' and '.join(splits)}: rename it")
        found[splits[0] if splits else None].append(path)
    if list(found) == [None]:
        return {"train": found[None]}
    if None in found:
        raise UserError(f"{found[None][0]} is of no split, as others are: put train, val or test into its name")
    if "train" not in found:
        raise UserError(f"{root} holds shards for {' and '.join(map(str, found))}, and none for train")
    return {split: found[split] for split in _SPLITS if split in found}


def _classes(root: Path, images: Mapping[str, _Images]) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    """Names of the classes, and the labels of each split, int64 (N,).

    Labels are numbers, or names; the names of numbers are the lines of classes.txt, or the numbers.
    """
    listed = _listed_classes(root)
    rows: dict[str, np.ndarray] = {}
    found: dict[str, dict[str, int]] = {}
    for split, read in images.items():
        unique, first, rows[split] = np.unique(read.index.label, return_index=True, return_inverse=True)
        found[split] = dict(zip((text.decode() for text in unique), first.tolist(), strict=True))
    if all(re.fullmatch(r"-?\d{1,18}", text) for texts in found.values() for text in texts):
        count = max(map(int, found["train"]), default=-1) + 1
        if listed is None and count > len(rows["train"]):
            raise UserError(f"{root}: label {count - 1} of {len(rows['train'])} images: name all classes in {_CLASSES}")
        classes = listed or tuple(map(str, range(count)))
        numbers = {split: [int(text) for text in texts] for split, texts in found.items()}
    else:
        classes = listed or tuple(sorted(found["train"]))
        known = {name: number for number, name in enumerate(classes) if is_name(name)}
        for split, texts in found.items():
            if strangers := texts.keys() - known.keys():
                label = min(strangers)
                place = f"{images[split].where(texts[label])}: label {label[:100]!r}"
                raise UserError(f"{place} is no class of {_CLASSES if listed else 'train'}: correct or remove it")
        numbers = {split: [known[text] for text in texts] for split, texts in found.items()}
    return classes, {split: np.array(numbers[split], dtype=np.int64)[rows[split]] for split in images}


def _listed_classes(root: Path) -> tuple[str, ...] | None:
    """The lines of classes.txt beside the shards, if it is there."""
    path = root / _CLASSES
    try:
        require_plain_file(path)
        names = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeError) as error:
        raise UserError(f"{path} cannot be read ({error}): correct or remove it") from error
    names = [name.strip() for name in names]
    if not names or not all(map(is_name, names)) or len(set(names)) < len(names):
        raise UserError(f"{path} must have the name of a class in every line, each once: correct or remove it")
    return tuple(names)
