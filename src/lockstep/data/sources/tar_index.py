"""Where the samples of tar shards lie: read from the headers once, then kept as a file in `data.cache_dir`."""

import json
import logging
import tarfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lockstep.data.sources.source import IMAGE_EXTENSIONS, digest_of
from lockstep.errors import UserError, first_line
from lockstep.files import path_of, remove_unfinished, require_plain_file, written_aside
from lockstep.lease import held
from lockstep.settings.config import DataConfig

_logger = logging.getLogger(__name__)

_RULE_VERSION = 1  # raise it when the same shards give another index
_THREADS = 16
"""That read shards: a network disk answers many questions at once as fast as one"""
_LABEL_BYTES = 1 << 20
"""Of a file that holds a label, more are not read"""
_LONGEST_LABEL = 1000
"""Bytes: the index has room for the longest one at every sample"""
_DAMAGE = (OSError, tarfile.TarError, ValueError, EOFError, LookupError, ArithmeticError)
"""What a damaged file may end in"""


@dataclass(frozen=True, eq=False)
class Index:
    """N samples in the order of shards and of their files: arrays, because forked workers would copy lists.

    Number of the shard, offset and size in bytes of the image, all int64 (N,), the size -1 where there is no image; and
    name of the file and label, bytes (N,).
    """

    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    name: np.ndarray
    label: np.ndarray

    def __len__(self) -> int:
        return len(self.shard)


class _File(NamedTuple):
    name: str
    offset: int
    size: int


def open_index(shards: Sequence[Path], config: DataConfig) -> tuple[Index, str]:
    """The index of the shards, and a fingerprint of their names, sizes and times of change.

    Of several processes that call this at once, one reads the headers and the others wait. Raises UserError for a shard
    that is damaged or compressed, a file that is there twice, and a sample without a label or with several images.
    """
    columns = f"{_RULE_VERSION}|{config.image_column}|{config.label_column}"
    fingerprint = digest_of(columns.encode(), *map(_stamp, shards))
    path = path_of(config.cache_dir) / f"shards-{fingerprint[:20]}.npz"
    index = None
    try:
        if (index := _read_kept(path)) is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with held(path.with_suffix(".lock")):
                if (index := _read_kept(path)) is None:
                    index = _read_shards(shards, config)
                    remove_unfinished(path.parent, path.name)
                    with written_aside(path) as file:
                        np.savez(file, **vars(index))
    except OSError as error:
        _logger.warning("the index of the shards cannot be kept in %s (%s)", path.parent, error.strerror or error)
    return _read_shards(shards, config) if index is None else index, fingerprint


def _stamp(path: Path) -> bytes:
    try:
        require_plain_file(path)
        status = path.stat()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): correct or remove it") from error
    return f"{path.absolute()}|{status.st_size}|{status.st_mtime_ns}".encode("utf-8", "surrogateescape")


def _read_kept(path: Path) -> Index | None:
    """The index of a file, whose checksums numpy's format has; None if it is not there, or damaged."""
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            index = Index(**arrays)
        if len({len(array) for array in vars(index).values()}) == 1:
            return index
        problem = "lengths differ"
    except (*_DAMAGE, TypeError, zipfile.BadZipFile) as error:
        problem = first_line(error)
    _logger.warning("the index %s is damaged (%s): reading the shards' headers again", path, problem)
    return None


def _read_shards(shards: Sequence[Path], config: DataConfig) -> Index:
    _logger.info("reading the headers of %d tar files, from %s on", len(shards), shards[0])
    with ThreadPoolExecutor(_THREADS) as pool:
        parts = list(pool.map(partial(_read_shard, config=config), range(len(shards)), shards))
    return Index(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def _read_shard(number: int, path: Path, config: DataConfig) -> tuple[np.ndarray, ...]:
    """The arrays of an Index of one shard."""
    try:
        samples = list(_samples(path, config))
    except UserError:
        raise
    except _DAMAGE as error:
        reason = f"{path} is damaged, or no uncompressed tar file ({first_line(error)})"
        raise UserError(f"{reason}: write it again") from error
    places = np.array([(number, file.offset, file.size) for file, _ in samples], dtype=np.int64).reshape(-1, 3)
    names = [file.name.encode("utf-8", "surrogateescape") for file, _ in samples]
    labels = [label.encode() for _, label in samples]
    return *places.T, np.array(names, dtype=np.bytes_), np.array(labels, dtype=np.bytes_)


def _samples(path: Path, config: DataConfig) -> Iterator[tuple[_File, str]]:
    """Image and label of every sample of a shard. One without an image has size -1: it is told when it is read."""
    with tarfile.open(path, "r:") as archive:
        assert archive.fileobj is not None
        samples = _grouped(archive, path)
        archive.fileobj.seek(archive.offset)
        if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            # Where a header is damaged, or the file cut off between two, tarfile sees the end and says nothing.
            raise tarfile.ReadError("no end of the archive where one must be")
        for files in samples.values():
            image, first = _image_of(files, path, config), next(iter(files.values()))
            label = _label_of(files, archive, path, config)
            if label and len(label.encode()) > _LONGEST_LABEL:
                raise UserError(f"{path}: {first.name} has a label of more than {_LONGEST_LABEL} bytes: shorten it")
            if label:
                yield image or first._replace(size=-1), label
            elif image is not None:
                wanted = config.label_column or "label"
                expected = f"it takes a file {first.name.partition('.')[0]}.cls, or a .json with {wanted!r}"
                raise UserError(f"{path}: {image.name} has no label: {expected}, or set --data.label_column")


def _grouped(archive: tarfile.TarFile, path: Path) -> dict[str, dict[str, _File]]:
    """The files of each sample by their extension: its name goes up to the first dot of theirs."""
    samples: dict[str, dict[str, _File]] = {}
    for member in iter(archive.next, None):
        archive.members.clear()  # type: ignore[attr-defined]  # which would be a GB for a million images
        folder, _, base = member.name.rpartition("/")
        if member.isdir() or base.startswith("."):
            continue
        if not member.isreg() or member.issparse() or member.size < 0:
            remedy = "write shards with tar's --dereference and --hard-dereference"
            raise UserError(f"{path}: {member.name} is a link or no plain file: {remedy}")
        stem, _, extension = base.partition(".")
        files = samples.setdefault(f"{folder}/{stem}", {})
        if extension.lower() in files:
            raise UserError(f"{path}: {member.name} is there twice: write the shard again, with one of each name")
        files[extension.lower()] = _File(member.name, member.offset_data, member.size)
    return samples


def _image_of(files: Mapping[str, _File], path: Path, config: DataConfig) -> _File | None:
    if config.image_column is not None:
        return files.get(config.image_column.lower())
    found = [file for extension, file in files.items() if f".{extension}" in IMAGE_EXTENSIONS]
    if len(found) > 1:
        names = " and ".join(file.name for file in found)
        raise UserError(f"{path}: {names} are one sample: set --data.image_column to the extension of the image")
    dotted = next((file.name for extension, file in files.items() if extension.endswith(IMAGE_EXTENSIONS)), None)
    if not found and dotted is not None:
        remedy = "leave other dots out, or set --data.image_column to all that follows"
        raise UserError(f"{path}: {dotted}: a sample's name ends at the first dot: {remedy}")
    return found[0] if found else None


def _label_of(files: Mapping[str, _File], archive: tarfile.TarFile, path: Path, config: DataConfig) -> str | None:
    """The text of the .cls file, or what the .json file says; `data.label_column` is another extension, or a key."""
    column = config.label_column or "cls"
    file = files.get(column.lower()) or files.get("json")
    if file is None:
        return None
    assert archive.fileobj is not None
    archive.fileobj.seek(file.offset)
    content = archive.fileobj.read(min(file.size, _LABEL_BYTES))
    try:
        if column.lower() in files:
            return content.decode().strip()
        described = json.loads(content)
        value = described.get(config.label_column or "label") if isinstance(described, dict) else None
        str(value).encode()  # JSON can hold what is no text
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: {file.name} cannot be read ({first_line(error)}): correct it") from error
    return str(value).strip() if isinstance(value, int | str) and not isinstance(value, bool) else None
