"""Where images come from: one string, `kind:name`, opens any data set as lazily read, labelled splits."""

import contextlib
import difflib
import errno
import hashlib
import inspect
import io
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lockstep.data.split import draw_validation_split
from lockstep.settings.config import DataConfig

_logger = logging.getLogger(__name__)

_VAL_NAMES = ("validation", "valid", "val", "dev")
_HELD_OUT_SHARE = 0.2  # the test set of a source that has none
_HELD_OUT_SEED = 0  # fixed, so that the test set never depends on run.seed


@dataclass(frozen=True, eq=False)
class Split:
    """Labelled images that are read one by one; can be pickled for workers.

    `labels` is int64 (N,). `read(row)` opens an image (lazily: decoding errors come when its pixels are used);
    `where(row)` names its file or row for messages.
    """

    name: str
    labels: np.ndarray
    read: Callable[[int], Image.Image]
    where: Callable[[int], str]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: np.ndarray, name: str) -> "Split":
        """The samples at `rows`, int (M,), as a split of their own."""
        return Split(name, self.labels[rows], _AtRows(self.read, rows), _AtRows(self.where, rows))


@dataclass(frozen=True, eq=False)
class Source:
    """A data set: `splits` has "train" and "test", and "val" where the data set brings one.

    `fingerprint` changes when the images do; it is the key of the cache.
    """

    name: str
    classes: tuple[str, ...]
    splits: dict[str, Split]
    fingerprint: str


def open_source(config: DataConfig) -> Source:
    """Open `config.source`; nothing is decoded yet.

    A source without a test split tests on its own validation split, or, without that too, on a fixed stratified
    fifth of its images. Raises ValueError, in one line, for an unknown kind or name, missing or damaged files, no
    network, fewer than two classes, an empty class, or a label outside the classes.
    """
    kind, _, name = config.source.partition(":")
    if kind not in _KINDS or not name:
        known = ", ".join(f"{known}:..." for known in _KINDS)
        raise ValueError(
            f"--data.source={config.source!r} is not of a known kind: {known}{_did_you_mean(kind, _KINDS)}"
        )
    source = _KINDS[kind](name, config)
    splits = dict(source.splits)
    for split in splits.values():
        if not len(split):
            raise ValueError(f"{source.name}: the {split.name} split is empty")
        _check_labels(split, len(source.classes))
    if len(np.unique(splits["train"].labels)) < 2:
        raise ValueError(f"{source.name}: only one class has training images: classification needs two")
    if "test" not in splits and "val" in splits:
        _logger.info("%s has no test split: its validation split is the test set too", source.name)
        splits["test"] = splits["val"]
    elif "test" not in splits:
        train, test = draw_validation_split(splits["train"].labels, _HELD_OUT_SHARE, _HELD_OUT_SEED)
        splits |= {"train": splits["train"].take(train, "train"), "test": splits["train"].take(test, "test")}
    return Source(source.name, source.classes, splits, source.fingerprint)


def _check_labels(split: Split, num_classes: int) -> None:
    outside = np.flatnonzero((split.labels < 0) | (split.labels >= num_classes))
    if len(outside):
        row = int(outside[0])
        raise ValueError(
            f"{split.where(row)}: label {split.labels[row]} lies outside 0..{num_classes - 1} "
            f"({len(outside)} such labels): correct or remove them"
        )


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    by_lower = {candidate.lower(): candidate for candidate in known}
    near = [by_lower[lower] for lower in difflib.get_close_matches(name.lower(), by_lower, cutoff=0.5)]
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def _digest(*parts: bytes | np.ndarray) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(np.ascontiguousarray(part).tobytes() if isinstance(part, np.ndarray) else part)
        digest.update(b"|")
    return digest.hexdigest()


# ---- readers: small callables, picklable, one per way of keeping images


@dataclass(frozen=True, eq=False)
class _AtRows:
    call: Callable[[int], Any]
    rows: np.ndarray

    def __call__(self, row: int) -> Any:
        return self.call(int(self.rows[row]))


@dataclass(frozen=True)
class _RowName:
    source: str
    split: str

    def __call__(self, row: int) -> str:
        return f"{self.source}, {self.split} row {row}"


@dataclass(frozen=True, eq=False)
class _Files:
    """Paths as a bytes array: forked workers share it, a list of strings they would copy by counting references."""

    root: Path
    paths: np.ndarray

    def path(self, row: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.paths[row]))

    def __call__(self, row: int) -> Image.Image:
        return Image.open(self.path(row))


# ---- embedded


@dataclass(frozen=True, eq=False)
class _Arrays:
    pixels: np.ndarray

    def __call__(self, row: int) -> Image.Image:
        return Image.fromarray(self.pixels[row])


def _open_embedded(name: str, config: DataConfig) -> Source:
    if name != "digits":
        raise ValueError(f"--data.source={config.source!r} is unknown: the only embedded data set is embedded:digits")
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    pixels = np.rint(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    train = Split("train", labels.astype(np.int64), _Arrays(pixels), _RowName(config.source, "train"))
    return Source(config.source, tuple("0123456789"), {"train": train}, _digest(pixels, train.labels))


# ---- torchvision

# Data sets with a `split` argument instead of `train`: ours -> theirs.
_TORCHVISION_SPLITS: dict[str, dict[str, str]] = {
    "SVHN": {"train": "train", "test": "test"},
    "STL10": {"train": "train", "test": "test"},
    "DTD": {"train": "train", "val": "val", "test": "test"},
    "Flowers102": {"train": "train", "val": "val", "test": "test"},
    "FGVCAircraft": {"train": "train", "val": "val", "test": "test"},
    "Food101": {"train": "train", "test": "test"},
    "OxfordIIITPet": {"train": "trainval", "test": "test"},
}


@dataclass(frozen=True, eq=False)
class _Torchvision:
    dataset: Any

    def __call__(self, row: int) -> Image.Image:
        return self.dataset[row][0]


def _torchvision_arguments() -> dict[str, dict[str, dict[str, Any]]]:
    """name -> split -> arguments, for the image classification sets that torchvision can download."""
    from torchvision import datasets

    known: dict[str, dict[str, dict[str, Any]]]
    known = {name: {ours: {"split": theirs} for ours, theirs in splits.items()}
             for name, splits in _TORCHVISION_SPLITS.items()}  # fmt: skip
    for name, thing in vars(datasets).items():
        parameters = inspect.signature(thing).parameters if inspect.isclass(thing) else {}
        if {"train", "download", "target_transform"} <= parameters.keys() and name != "Kitti":  # Kitti has boxes
            known[name] = {"train": {"train": True}, "test": {"train": False}}
    return known


def _open_torchvision(name: str, config: DataConfig) -> Source:
    from torchvision import datasets

    known = _torchvision_arguments()
    if name not in known:
        near = _did_you_mean(name, known) or f" (known: {', '.join(sorted(known))})"
        raise ValueError(f"--data.source={config.source!r}: no such torchvision data set{near}")
    root = Path(config.root).expanduser()
    splits, digests = {}, [name]
    for split, arguments in known[name].items():
        dataset = _load_torchvision(getattr(datasets, name), root, arguments)
        labels = next(getattr(dataset, key) for key in ("targets", "labels", "_labels") if hasattr(dataset, key))
        labels = np.asarray(labels, dtype=np.int64)
        splits[split] = Split(split, labels, _Torchvision(dataset), _RowName(config.source, split))
        digests.append(_digest(labels, np.asarray(getattr(dataset, "data", ()))))
    classes = getattr(dataset, "classes", None) or range(int(splits["train"].labels.max()) + 1)
    return Source(config.source, tuple(map(str, classes)), splits, _digest(*(digest.encode() for digest in digests)))


def _load_torchvision(dataset_class: Any, root: Path, arguments: Mapping[str, Any]) -> Any:
    """Open what is there; else download it. One process downloads, the others wait and then find it."""
    name = f"torchvision:{dataset_class.__name__}"
    folder = _torchvision_folder(dataset_class, root)
    with _locked(root / f".{dataset_class.__name__}.lock"):
        try:
            return dataset_class(root, download=False, **arguments)
        except (
            Exception
        ) as error:  # a damaged file can end in any error; absence, or a wrong checksum, reads "not found"
            if not isinstance(error, FileNotFoundError) and "not found" not in str(error):
                raise ValueError(f"{name}: the files in {folder} are damaged: remove them and start again") from error
        try:
            return dataset_class(root, download=True, **arguments)
        except Exception as error:
            reason = " ".join(str(error).split()) or repr(error)
            raise ValueError(
                f"{name} is not in {folder} and cannot be downloaded ({reason}): "
                "put its files there, set --data.root, or use another --data.source"
            ) from error


def _torchvision_folder(dataset_class: Any, root: Path) -> Path:
    if isinstance(folder := getattr(dataset_class, "base_folder", None), str):
        return root / folder
    return root / dataset_class.__name__ / "raw" if hasattr(dataset_class, "raw_folder") else root


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    from filelock import FileLock

    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:  # a folder that nobody here can write to needs no lock
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise ValueError(f"--data.root={path.parent} cannot be used ({error}): set --data.root") from error
    try:
        yield
    finally:
        lock.release()


# ---- Hugging Face datasets


@dataclass(frozen=True, eq=False)
class _HubImages:
    """A column of encoded images: {"bytes", "path"} per row."""

    dataset: Any
    column: str
    name: str

    def __call__(self, row: int) -> Image.Image:
        image = self.dataset[row][self.column]
        if image is None or (image["bytes"] is None and image["path"] is None):
            raise OSError("the image is missing")
        return Image.open(io.BytesIO(image["bytes"]) if image["bytes"] is not None else image["path"])

    def where(self, row: int) -> str:
        image = self.dataset[row][self.column]
        path = f" ({image['path']})" if image and image["path"] else ""
        return f"{self.name} row {row}{path}"


def _open_hub(name: str, config: DataConfig) -> Source:
    loaded = _load_hub(name, config)
    found = {split: next((theirs for theirs in names if theirs in loaded), None)
             for split, names in {"train": ("train",), "val": _VAL_NAMES, "test": ("test",)}.items()}  # fmt: skip
    if found["train"] is None:
        raise ValueError(f"{config.source} has no train split, only {', '.join(loaded)}")
    image_column, label_column = _columns(loaded["train"], config.source)
    splits: dict[str, Split] = {}
    for split, theirs in found.items():
        if theirs is None:
            continue
        read = _HubImages(_undecoded(loaded[theirs], image_column), image_column, f"{config.source}, {theirs}")
        labels = _column_labels(loaded[theirs], label_column, read.where)
        if split != "train" and len(labels) and (labels < 0).all():
            _logger.info("%s: the %s split has no labels and is left out", config.source, theirs)
            continue
        splits[split] = Split(split, labels, read, read.where)
    feature = loaded["train"].features[label_column]
    names = getattr(feature, "names", None) or range(int(splits["train"].labels.max(initial=0)) + 1)
    fingerprint = _digest(*(loaded[theirs]._fingerprint.encode() for theirs in found.values() if theirs))
    return Source(config.source, tuple(map(str, names)), splits, fingerprint)


def _load_hub(name: str, config: DataConfig) -> Mapping[str, Any]:
    import datasets

    folder = Path(name).expanduser()
    if not folder.is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ValueError(f"--data.source={config.source!r}: there is no folder {folder.resolve()}")
    try:
        with _quiet_hub():
            return datasets.load_dataset(str(folder) if folder.is_dir() else name)
    except Exception as error:  # the library raises nearly everything, down to plain ValueError
        cause: BaseException = error
        while not isinstance(error, OSError) and (deeper := cause.__cause__ or cause.__context__):
            cause = deeper
        reason = " ".join(str(cause).split())[:300] or repr(cause)
        hint = (
            "check or remove its files"
            if folder.is_dir()
            else "check the name and the network, or give the path of a local copy (hf:./folder)"
        )
        raise ValueError(f"--data.source={config.source!r} cannot be loaded ({reason}): {hint}") from error


@contextlib.contextmanager
def _quiet_hub() -> Iterator[None]:
    """No progress bars, and no line per retry: what matters is said once, by us."""
    import datasets
    import huggingface_hub.utils.logging as hub_logging

    had_bars, verbosity = datasets.are_progress_bars_disabled() is False, hub_logging.get_verbosity()
    datasets.disable_progress_bars()
    hub_logging.set_verbosity_error()
    try:
        yield
    finally:
        hub_logging.set_verbosity(verbosity)
        if had_bars:
            datasets.enable_progress_bars()


def _columns(dataset: Any, source: str) -> tuple[str, str]:
    import datasets

    features = dataset.features
    images = [name for name, feature in features.items()
              if isinstance(feature, datasets.Image)
              or (isinstance(feature, dict) and feature.keys() == {"bytes", "path"})]  # fmt: skip
    classes = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    labels = [name for name in ("label", "labels", "fine_label") if name in features] + classes
    if not images or not labels:
        missing = "image" if not images else "label (ClassLabel, or an integer called label)"
        raise ValueError(f"{source} has no column of type {missing}: its columns are {', '.join(features)}")
    return images[0], labels[0]


def _undecoded(dataset: Any, column: str) -> Any:
    import datasets

    return dataset.select_columns([column]).cast_column(column, datasets.Image(decode=False))


def _column_labels(dataset: Any, column: str, where: Callable[[int], str]) -> np.ndarray:
    values = dataset.select_columns([column]).with_format("arrow")[:][column]
    if values.null_count:
        row = values.is_null().to_pylist().index(True)
        raise ValueError(f"{where(row)}: the label is missing ({values.null_count} such rows): remove them")
    labels = values.to_numpy()
    if labels.dtype.kind not in "iub":
        raise ValueError(f"{where(0)}: column {column!r} holds {values.type}, not integer labels")
    return labels.astype(np.int64)


# ---- folders of image files

_EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


def _open_folder(name: str, config: DataConfig) -> Source:
    root = Path(name).expanduser()
    if not root.is_dir():
        raise ValueError(f"--data.source={config.source!r}: there is no folder {root.resolve()}")
    folders = {"train": root}
    if (root / "train").is_dir():
        candidates = {"train": ("train",), "val": _VAL_NAMES, "test": ("test",)}
        folders = {split: root / found for split, names in candidates.items()
                   if (found := next((name for name in names if (root / name).is_dir()), None))}  # fmt: skip
    classes = _class_folders(folders["train"])
    splits, listing = {}, []
    for split, folder in folders.items():
        strangers = set(_class_folders(folder)) - set(classes)
        if strangers:
            raise ValueError(f"{folder / min(strangers)} is a class that {folders['train']} does not have")
        paths, labels, stamps = _list_images(folder, classes)
        listing += [split.encode(), *stamps]
        reader = _Files(folder, np.array(paths, dtype=np.bytes_))
        splits[split] = Split(split, np.array(labels, dtype=np.int64), reader, reader.path)
    return Source(config.source, tuple(classes), splits, _digest(str(root.resolve()).encode(), *listing))


def _class_folders(folder: Path) -> list[str]:
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise ValueError(f"{folder} holds no class folders: images belong in {folder}/<class>/<image>.png")
    if len(names) == 1:
        raise ValueError(f"{folder} holds only one class, {names[0]}: classification needs two")
    return names


def _list_images(folder: Path, classes: Sequence[str]) -> tuple[list[bytes], list[int], list[bytes]]:
    """Paths below `folder`, labels, and a stamp (path, size, time of change) per file."""
    paths: list[bytes] = []
    labels: list[int] = []
    stamps: list[bytes] = []
    for label, name in enumerate(classes):
        files = sorted(
            os.path.join(place, file)
            for place, _, files in os.walk(folder / name, followlinks=True)
            for file in files
            if file.lower().endswith(_EXTENSIONS) and not file.startswith(".")
        )
        if not files and (folder / name).is_dir():
            raise ValueError(f"{folder / name} holds no images ({' '.join(_EXTENSIONS)}): fill or remove the class")
        for file in files:
            path = os.fsencode(os.path.relpath(file, folder))
            status = os.stat(file) if os.path.exists(file) else None  # a broken link is reported when it is read
            paths.append(path)
            labels.append(label)
            stamps.append(path + (f"|{status.st_size}|{status.st_mtime_ns}".encode() if status else b""))
    return paths, labels, stamps


# ---- synthetic


@dataclass(frozen=True)
class _Patterns:
    """Plane waves, one direction and frequency per class, under noise; image `row` is a function of its number."""

    height: int
    width: int
    channels: int
    stream: int

    def __call__(self, row: int) -> Image.Image:
        label = row % _SYNTHETIC_CLASSES
        y, x = np.mgrid[: self.height, : self.width]
        angle = np.pi * label / _SYNTHETIC_CLASSES
        periods = 1 + label % 3
        wave = np.sin(2 * np.pi * periods * (np.cos(angle) * x / self.width + np.sin(angle) * y / self.height))
        noise = np.random.Generator(np.random.Philox(key=row + (self.stream << 64)))
        pixels = noise.normal(128, 32, (self.height, self.width, self.channels)) + 64 * wave[..., None]
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8).squeeze())


_SYNTHETIC_CLASSES = 10


def _open_synthetic(name: str, config: DataConfig) -> Source:
    numbers = re.fullmatch(r"(\d+)x(\d+)x(\d+)x(\d+)", name)
    height, width, channels, count = map(int, numbers.groups()) if numbers else (0, 0, 0, 0)
    if min(height, width) < 2 or channels not in (1, 3) or count < 2 * _SYNTHETIC_CLASSES:
        raise ValueError(
            f"--data.source={config.source!r} must read synthetic:HxWxCxN with 1 or 3 channels and "
            f"at least {2 * _SYNTHETIC_CLASSES} images, for example synthetic:32x32x3x1000"
        )
    splits = {}
    for stream, (split, size) in enumerate({"train": count, "test": max(count // 5, _SYNTHETIC_CLASSES)}.items()):
        labels = np.arange(size, dtype=np.int64) % _SYNTHETIC_CLASSES
        read = _Patterns(height, width, channels, stream)
        splits[split] = Split(split, labels, read, _RowName(config.source, split))
    return Source(config.source, tuple(map(str, range(_SYNTHETIC_CLASSES))), splits, _digest(name.encode(), b"1"))


_KINDS: dict[str, Callable[[str, DataConfig], Source]] = {
    "embedded": _open_embedded,
    "torchvision": _open_torchvision,
    "hf": _open_hub,
    "folder": _open_folder,
    "synthetic": _open_synthetic,
}
